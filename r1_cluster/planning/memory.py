"""What a stage needs of a device's memory beside its weights, and whether it is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1_cluster.models.config import ModelConfig

_EXPANDED_KEYS = 16384  # `kernels.triton_attention` expands no more at once, but for one longer sequence
_SLOT_BLOCK = 128  # rows to which an expert's part is padded at most
_DECODE_PARTS_BYTES = 64 << 20  # of split attention: two programs a processor, 64 rows each, in float32
_LINK_BYTES = 32 << 20  # a ring of CUDA IPC is 16 MiB, NCCL's buffers about twice that
_GRAPHS_BYTES = 256 << 20  # what the driver keeps of some dozen recorded graphs, beside their scratch


class OutOfDeviceMemory(RuntimeError):
    """Pages and workspace do not fit beside the weights; the text says what takes how much."""


def stage_bytes(
    config: ModelConfig,
    num_layers: int,
    *,
    num_pages: int,
    page_size: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    max_context_len: int,
    num_links: int = 0,
    item_bytes: int = 2,
) -> dict[str, int]:
    """Bytes by part for a stage of `num_layers` layers with its experts beside it, in BF16 (`item_bytes`)."""
    keys = max(_EXPANDED_KEYS, max_context_len)
    widths = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) + config.latent_dim
    rows = max(max_batch_tokens, max_num_seqs)
    routed = rows * config.num_experts_per_tok
    slots = routed + min(config.n_routed_experts, routed) * (_SLOT_BLOCK - 1)
    expert_row = 2 * config.hidden_size + 3 * config.moe_intermediate_size
    query = config.num_attention_heads * (2 * config.kv_lora_rank + 3 * config.qk_nope_head_dim)
    dense_row = 6 * config.hidden_size + query + 3 * config.intermediate_size
    return {
        "pages": num_layers * num_pages * page_size * config.latent_dim * item_bytes,
        "expanded keys and values": keys * widths * item_bytes,
        "rows of a step": (slots * expert_row + rows * dense_row) * item_bytes,
        "logits": 2 * max_num_seqs * config.vocab_size * 4,
        "attention parts and graphs": _DECODE_PARTS_BYTES + _GRAPHS_BYTES,
        "links": num_links * _LINK_BYTES,
    }


def check_room(parts: Mapping[str, int], free_bytes: int) -> None:
    """Raises OutOfDeviceMemory where the parts exceed what is free once the weights are there."""
    if (needed := sum(parts.values())) > free_bytes:
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        raise OutOfDeviceMemory(
            f"the device has {free_bytes / 2**30:.2f} GiB beside the weights, {needed / 2**30:.2f} GiB are "
            f"needed ({listed}): lower engine.num_pages, max_batch_tokens or max_num_seqs"
        )
