"""What a worker needs of a device's memory beside its weights, and whether it is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from r1_cluster.comm.wire import MAX_PAYLOAD_BYTES
from r1_cluster.models.config import GqaShape

if TYPE_CHECKING:
    from r1_cluster.models.config import MlaShape, ModelConfig, MoeShape
    from r1_cluster.planning.layout import Layout, WorkerSpec

_EXPANDED_KEYS = 16384  # `kernels.triton_attention` expands no more at once, but for one longer sequence
_SLOT_BLOCK = 128  # rows to which an expert's part is padded at most
_DECODE_PARTS_BYTES = 64 << 20  # of split attention: two programs a processor, 64 rows each, in float32
_LINK_BYTES = 32 << 20  # a ring of CUDA IPC is 16 MiB, NCCL's buffers about twice that
_GRAPHS_BYTES = 256 << 20  # what the driver keeps of some dozen recorded graphs, beside their scratch


class OutOfDeviceMemory(RuntimeError):
    """Pages and workspace do not fit beside the weights; the text says what takes how much."""


def worker_bytes(
    config: ModelConfig,
    layout: Layout,
    worker: WorkerSpec,
    *,
    num_pages: int,
    page_size: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    max_context_len: int,
    item_bytes: int = 2,
    fp8_cache: bool = False,
) -> dict[str, int]:
    """Bytes by part for what a worker hosts, in BF16 (`item_bytes`), its pages perhaps in FP8: only what its
    own roles need."""
    num_tokens = max(max_batch_tokens, max_num_seqs)
    attention = _heads_of_rank(config.attention, worker.ranks)
    inner = -(-config.intermediate_size // worker.ranks)
    parts: dict[str, int] = {}
    if worker.stage is not None:
        first, last = worker.stage
        pages = (last - first) * num_pages * page_size
        parts["pages"] = pages * _slot_bytes(attention, item_bytes, fp8_cache)
        if expanded := _expanded(attention, max_context_len):
            parts["expanded keys and values"] = expanded * item_bytes
        row = 6 * config.hidden_size + _attention_row(attention) + 3 * inner
        parts["a stage's rows"] = num_tokens * row * item_bytes
        if worker.ranks > 1:
            # What this rank adds, every other one's part of it, and their sum in float32.
            parts["sums of ranks"] = num_tokens * config.hidden_size * (worker.ranks * item_bytes + 4)
        parts["attention parts and graphs"] = _DECODE_PARTS_BYTES + _GRAPHS_BYTES
        if last == layout.num_layers:
            parts["logits"] = 2 * max_num_seqs * config.vocab_size * 4
    if config.moe is not None:
        here = layout.has_its_experts(worker)
        parts |= _moe_bytes(
            config.moe,
            config.hidden_size,
            worker,
            here=here,
            num_tokens=num_tokens,
            num_sources=max(len(layout.exchange_of(worker)), 1),
            item_bytes=item_bytes,
        )
    if num_links := _num_links(layout, worker):
        parts["links"] = num_links * _LINK_BYTES
    return parts


class Room(NamedTuple):
    """What is in a worker's memory, in bytes: its weights, its workspace, and the rest, which its pages may
    take; below zero, so much is missing. Pages take `token_bytes` a token, 0 where there is no stage."""

    weights: int
    workspace: int
    rest: int
    token_bytes: int

    @property
    def tokens(self) -> int:
        """Of KV that fit."""
        return max(self.rest, 0) // self.token_bytes if self.token_bytes else 0


def room(
    config: ModelConfig,
    layout: Layout,
    worker: WorkerSpec,
    *,
    weights: int,
    device_bytes: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    max_context_len: int,
    fp8_cache: bool = False,
) -> Room:
    """How the `device_bytes` that a worker may have are taken, with so many bytes of `weights` among them."""
    parts = worker_bytes(
        config,
        layout,
        worker,
        num_pages=1,
        page_size=1,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_context_len=max_context_len,
        fp8_cache=fp8_cache,
    )
    token_bytes = parts.pop("pages", 0)
    workspace = sum(parts.values())
    return Room(weights, workspace, device_bytes - weights - workspace, token_bytes)


def _moe_bytes(
    moe: MoeShape,
    width: int,
    worker: WorkerSpec,
    *,
    here: bool,
    num_tokens: int,
    num_sources: int,
    item_bytes: int,
) -> dict[str, int]:
    """Of a router's and an expert shard's rows; `here` are both, and tokens are not sorted to be sent.
    `num_sources` routers may send all that they have at once: more than one where they exchange rows."""
    top_k = moe.num_experts_per_tok
    # What `LinkDispatcher` sends at once, were all of it for one shard.
    most = max(MAX_PAYLOAD_BYTES // (top_k * width * item_bytes), 1)
    num_piece = num_tokens if here else min(num_tokens, most)
    parts: dict[str, int] = {}
    if worker.router is not None:
        gate_bytes = 4 * width + 8 * moe.n_routed_experts
        row = (2 * width + 3 * moe.shared_intermediate_size) * item_bytes + gate_bytes
        parts["a router's rows"] = num_tokens * row
        if not here:
            # There, back, in order, and weighted in float32; and the sum.
            rows = num_piece * top_k
            parts["rows to and from experts"] = (rows * (4 * item_bytes + 4) + num_piece * 4) * width
    if worker.experts is not None:
        num_experts = worker.experts[1] - worker.experts[0]
        # Copies are computed while those are away that they stand in for.
        most_experts = num_experts + sum(end - first for first, end in worker.copies)
        rows = num_sources * num_piece * min(top_k, most_experts)
        if num_sources > 1:
            # All of it in the order of ranks, in that of experts, and so the answers.
            parts["rows of all ranks"] = rows * 4 * width * item_bytes
        slots = rows + min(num_experts, rows) * (_SLOT_BLOCK - 1)
        parts["experts' rows"] = slots * (2 * width + 3 * moe.moe_intermediate_size) * item_bytes
    return parts


def _slot_bytes(attention: MlaShape | GqaShape, item_bytes: int, fp8_cache: bool) -> int:
    """Of one token's place in one layer's pages; an FP8 cache has float32 scales beside it."""
    if fp8_cache:
        return attention.cache_width + 4 * attention.cache_scales
    return attention.cache_width * item_bytes


def _expanded(attention: MlaShape | GqaShape, max_context_len: int) -> int:
    """Elements of keys and values, and of the latents that they come from; none where pages have them as they
    are."""
    if isinstance(attention, GqaShape):
        return 0
    head = attention.qk_nope_head_dim + attention.v_head_dim
    widths = attention.num_attention_heads * head + attention.cache_width
    return max(_EXPANDED_KEYS, max_context_len) * widths


def _attention_row(attention: MlaShape | GqaShape) -> int:
    """Elements of a token's row within attention."""
    if isinstance(attention, GqaShape):
        # Queries as they come, normed, and those of a part of the step; what is attended, and its part.
        return 5 * attention.num_attention_heads * attention.head_dim + 2 * attention.cache_width
    return attention.num_attention_heads * (2 * attention.kv_lora_rank + 3 * attention.qk_nope_head_dim)


def _heads_of_rank(attention: MlaShape | GqaShape, ranks: int) -> MlaShape | GqaShape:
    """A rank's part: of latents, and of keys that are fewer than ranks, each has the whole, or one."""
    heads = attention.num_attention_heads // ranks
    if isinstance(attention, GqaShape):
        kv_heads = max(attention.num_key_value_heads // ranks, 1)
        return replace(attention, num_attention_heads=heads, num_key_value_heads=kv_heads)
    return replace(attention, num_attention_heads=heads)


def _num_links(layout: Layout, worker: WorkerSpec) -> int:
    """Links of a worker to others, whoever opens them."""
    return len(layout.connects_to(worker)) + sum(worker.name in layout.connects_to(w) for w in layout.workers)


def check_room(parts: Mapping[str, int], free_bytes: int) -> None:
    """Raises OutOfDeviceMemory where the parts exceed what is free once the weights are there."""
    if (needed := sum(parts.values())) > free_bytes:
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        pages = "num_pages, " if "pages" in parts else ""
        raise OutOfDeviceMemory(
            f"the device has {free_bytes / 2**30:.2f} GiB beside the weights, {needed / 2**30:.2f} GiB are "
            f"needed ({listed}): lower engine.{pages}max_batch_tokens or max_num_seqs"
        )
