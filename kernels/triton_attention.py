"""A step's attention on the device: which sequences are attended absorbed, which expanded, and where.

In deterministic mode all of them are absorbed, over fixed splits. Else a sequence that brings many tokens is
expanded: keys and values are projected from its latents, which is cheaper where many queries share them.
Grouped-query attention has nothing to expand, but takes the same parts: the context of sequences that bring
few tokens is split, that of the others is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gqa import paged_attention
from kernels.mla_cache import gather_latent
from kernels.mla_decode import mla_decode
from kernels.mla_prefill import mla_prefill
from kernels.ops import AttentionPlan, Cache, Fp8Cache
from kernels.upload import upload

_FEW_QUERIES = 4  # chunks as short as this are attended like decoded tokens
_MAX_KEYS = 16384  # expanded at once, unless one sequence has more: 64 KiB each for R1's 128 heads


@dataclass(frozen=True)
class Part:
    """Sequences attended by one call, in the order of their rows.

    `rows` are those of the step (None: every one, in order); `start_S1` where each sequence's begin among
    them, `key_start_S1` where its context would begin if all were end to end. Tensors are int32.
    """

    rows: Tensor | None
    page_table_SP: Tensor
    context_len_S: Tensor
    start_S1: Tensor
    key_start_S1: Tensor
    num_rows: int
    num_keys: int
    max_query_len: int
    max_context_len: int


@dataclass(frozen=True)
class TritonAttentionPlan:
    """See `AttentionPlan`."""

    absorbed: Part | None
    expanded: tuple[Part, ...]
    deterministic: bool

    @property
    def absorbed_rows(self) -> Tensor | None:
        if not self.expanded:
            return None
        return self.expanded[0].start_S1[:0] if self.absorbed is None else self.absorbed.rows

    @property
    def has_expanded(self) -> bool:
        return bool(self.expanded)


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_table_SP: Tensor,
    page_size: int,
    *,
    absorb_all: bool,
    along: Sequence[Tensor],
    device: torch.device,
) -> tuple[TritonAttentionPlan, list[Tensor]]:
    """See `Ops.plan_attention`."""
    short = [s for s, length in enumerate(query_lens) if absorb_all or length <= _FEW_QUERIES]
    chosen = set(short)
    long = [s for s in range(len(query_lens)) if s not in chosen]
    groups = ([short] if short else []) + _by_keys(long, context_lens)
    table = _widened(page_table_SP).to(torch.int32)
    host = [_host_tensors(group, query_lens, context_lens, table) for group in groups]
    there = upload([tensor for tensors in host for tensor in tensors] + list(along), device)
    parts = [
        _part(there[5 * i : 5 * i + 5], group, query_lens, context_lens, page_size, whole=len(groups) == 1)
        for i, group in enumerate(groups)
    ]
    absorbed = parts.pop(0) if short else None
    return TritonAttentionPlan(absorbed, tuple(parts), absorb_all), there[5 * len(groups) :]


def _widened(page_table_SP: Tensor) -> Tensor:
    """With a power of two of columns. By the longest context attention is cut into splits, and its kernel is
    tuned anew for each length of split that it has not met: so there are a dozen, not one for each step."""
    num_pages = page_table_SP.shape[1]
    return F.pad(page_table_SP, (0, (1 << (num_pages - 1).bit_length()) - num_pages))


def _by_keys(sequences: Sequence[int], context_lens: Sequence[int]) -> list[list[int]]:
    """Cuts sequences into groups whose contexts together fit the expanded workspace."""
    groups: list[list[int]] = []
    room = 0
    for sequence in sequences:
        room -= context_lens[sequence]
        if room < 0:
            groups.append([])
            room = _MAX_KEYS - context_lens[sequence]
        groups[-1].append(sequence)
    return groups


def _host_tensors(
    group: Sequence[int], query_lens: Sequence[int], context_lens: Sequence[int], table_SP: Tensor
) -> list[Tensor]:
    first_row = list(accumulate(query_lens, initial=0))
    rows = [row for s in group for row in range(first_row[s], first_row[s + 1])]
    starts = list(accumulate((query_lens[s] for s in group), initial=0))
    key_starts = list(accumulate((context_lens[s] for s in group), initial=0))
    numbers = (rows, [context_lens[s] for s in group], starts, key_starts)
    own_SP = table_SP.index_select(0, torch.tensor(group))
    return [own_SP, *(torch.tensor(values, dtype=torch.int32) for values in numbers)]


def _part(
    tensors: Sequence[Tensor],
    group: Sequence[int],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_size: int,
    *,
    whole: bool,
) -> Part:
    table, rows, context, start, key_start = tensors
    return Part(
        rows=None if whole else rows,
        page_table_SP=table,
        context_len_S=context,
        start_S1=start,
        key_start_S1=key_start,
        num_rows=len(rows),
        num_keys=sum(context_lens[s] for s in group),
        max_query_len=max(query_lens[s] for s in group),
        max_context_len=table.shape[1] * page_size,
    )


def refill_(plan: AttentionPlan, other: AttentionPlan) -> None:
    """See `DeviceOps.refill_`."""
    assert isinstance(plan, TritonAttentionPlan)
    assert isinstance(other, TritonAttentionPlan)
    static, part = plan.absorbed, other.absorbed
    assert static is not None
    assert part is not None
    num_sequences, num_pages = part.page_table_SP.shape
    static.context_len_S.fill_(1)
    static.context_len_S[:num_sequences].copy_(part.context_len_S)
    static.page_table_SP[:num_sequences, :num_pages].copy_(part.page_table_SP)


def parts_of(cache: Cache) -> tuple[Tensor, Tensor | None]:
    """Its values, and the scales of an FP8 one."""
    return (cache.values, cache.scale) if isinstance(cache, Fp8Cache) else (cache, None)


def mla_absorbed(
    q_latent_AHC: Tensor, q_rope_AHR: Tensor, cache_PSL: Cache, plan: AttentionPlan, *, scale: float
) -> Tensor:
    """See `Ops.mla_absorbed`."""
    assert isinstance(plan, TritonAttentionPlan)
    part = plan.absorbed
    assert part is not None
    values_PSL, scale_PS2 = parts_of(cache_PSL)
    out_AHC = mla_decode(
        q_latent_AHC,
        q_rope_AHR,
        values_PSL,
        part.page_table_SP,
        part.context_len_S,
        part.start_S1,
        scale,
        scale_PS2,
        max_query_len=part.max_query_len,
        max_context_len=part.max_context_len,
        deterministic=plan.deterministic,
    )
    out_AHC[part.num_rows :].zero_()
    return out_AHC


def mla_expanded(
    q_THQ: Tensor,
    cache_PSL: Cache,
    plan: AttentionPlan,
    weight_HOC: Tensor,
    out_THV: Tensor,
    *,
    scale: float,
) -> None:
    """See `Ops.mla_expanded`."""
    assert isinstance(plan, TritonAttentionPlan)
    num_heads, _, num_latent = weight_HOC.shape
    num_nope = weight_HOC.shape[1] - out_THV.shape[2]
    values_PSL, scale_PS2 = parts_of(cache_PSL)
    for part in plan.expanded:
        latent_LC = gather_latent(
            values_PSL,
            part.page_table_SP,
            part.key_start_S1,
            num_latent,
            scale_PS2,
            num_keys=part.num_keys,
            dtype=q_THQ.dtype,
        )
        expanded = F.linear(latent_LC[:, :num_latent], weight_HOC.flatten(0, 1))
        expanded_LHO = expanded.view(part.num_keys, num_heads, -1)
        q = q_THQ if part.rows is None else q_THQ.index_select(0, part.rows)
        attended = mla_prefill(
            q[..., :num_nope],
            q[..., num_nope:],
            expanded_LHO[..., :num_nope],
            latent_LC[:, num_latent:],
            expanded_LHO[..., num_nope:],
            part.start_S1,
            part.key_start_S1,
            scale,
            max_query_len=part.max_query_len,
        )
        if part.rows is None:
            out_THV.copy_(attended)
        else:
            out_THV.index_copy_(0, part.rows.long(), attended)


def gqa(q_THW: Tensor, cache_PS2KW: Cache, plan: AttentionPlan, *, scale: float) -> Tensor:
    """See `Ops.gqa`."""
    assert isinstance(plan, TritonAttentionPlan)
    parts = [*([] if plan.absorbed is None else [plan.absorbed]), *plan.expanded]
    if parts[0].rows is None:
        return _gqa_part(q_THW, cache_PS2KW, parts[0], scale, plan.deterministic)
    out_THW = torch.zeros(q_THW.shape, dtype=q_THW.dtype, device=q_THW.device)
    for part in parts:
        assert part.rows is not None
        q = q_THW.index_select(0, part.rows)
        out_THW.index_copy_(0, part.rows.long(), _gqa_part(q, cache_PS2KW, part, scale, plan.deterministic))
    return out_THW


def _gqa_part(q_THW: Tensor, cache_PS2KW: Cache, part: Part, scale: float, deterministic: bool) -> Tensor:
    values_PS2KW, scale_PS2K = parts_of(cache_PS2KW)
    k_cache, v_cache = values_PS2KW.unbind(2)
    out_THW = paged_attention(
        q_THW,
        k_cache,
        v_cache,
        part.page_table_SP,
        part.context_len_S,
        part.start_S1,
        scale,
        None if scale_PS2K is None else scale_PS2K.unbind(2),
        max_query_len=part.max_query_len,
        max_context_len=part.max_context_len,
        deterministic=deterministic,
    )
    out_THW[part.num_rows :].zero_()
    return out_THW
