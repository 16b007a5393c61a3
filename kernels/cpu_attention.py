"""A step's attention in plain torch: tokens that come alone or in a few are attended singly, over splits of
their contexts; spans of more tokens together, in deterministic mode over the same splits.

What keeps a row's bits free of its neighbours: products of one shape, whose rows are the heads that share
keys, padded to 4 or a multiple of ROW_TILE (see `kernels.cpu`); and splits of one length, added in ascending
order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ROW_TILE
from kernels.cpu_cache import entry_of, read_slots
from kernels.cpu_elementwise import elementwise_
from kernels.ops import ATTENTION_SPLIT, AttentionPlan, Cache

_FEW_QUERIES = 4  # chunks as short as this are attended like decoded tokens
_MAX_PAIRS = 256  # (token, split) pairs attended at once
_QUERY_BLOCK = 64  # queries of one sequence attended at once
_MAX_SCORES = 1 << 22  # scores held at once


@dataclass(frozen=True)
class _Packed:
    """Tokens attended together, each with its own context, padded to the same number of splits.

    `rows_n` are their rows among the absorbed ones; `slots` lists [splits, n, ATTENTION_SPLIT] cache slots,
    `mask` [splits · n, 1, ATTENTION_SPLIT] is -inf behind the context.
    """

    rows_n: Tensor
    slots: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _Span:
    """A run of one sequence's tokens: rows [first_row, last_row) of the step, from `position` on.

    `slots` covers the context in whole splits.
    """

    first_row: int
    last_row: int
    position: int
    slots: Tensor


@dataclass(frozen=True)
class PlainAttentionPlan:
    """See `AttentionPlan`: tokens that are attended singly, and spans that share a context."""

    absorbed_rows: Tensor | None
    has_expanded: bool
    packed: list[_Packed]
    spans: list[_Span]


def _context_slots(pages_P: Tensor, page_size: int, context_len: int) -> Tensor:
    """Slots of a context in whole splits. What lies behind it repeats the first, which is the sequence's own:
    masked slots enter products with weight zero, and another sequence's NaN would survive that."""
    slots = pages_P[: -(-context_len // page_size), None] * page_size + torch.arange(page_size)
    padded = slots.flatten()[:1].repeat(-(-context_len // ATTENTION_SPLIT) * ATTENTION_SPLIT)
    padded[:context_len] = slots.flatten()[:context_len]
    return padded


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_table_SP: Tensor,
    page_size: int,
    *,
    absorb_all: bool,
    along: Sequence[Tensor],
    device: torch.device,
) -> tuple[PlainAttentionPlan, list[Tensor]]:
    """See `Ops.plan_attention`."""
    singles: list[tuple[int, int, int]] = []  # (context length, row, sequence)
    spans: list[_Span] = []
    row = 0
    for sequence, (num_new, context_len) in enumerate(zip(query_lens, context_lens)):
        if num_new <= _FEW_QUERIES:
            singles += [
                (context_len - num_new + 1 + offset, row + offset, sequence) for offset in range(num_new)
            ]
        else:
            slots = _context_slots(page_table_SP[sequence], page_size, context_len).to(device)
            spans.append(_Span(row, row + num_new, context_len - num_new, slots))
        row += num_new
    absorbed = None
    if spans and not absorb_all:
        absorbed = torch.tensor([row for _, row, _ in singles], dtype=torch.int64, device=device)
        singles = [(length, i, sequence) for i, (length, _, sequence) in enumerate(singles)]
    packed = [_pack(group, page_table_SP, page_size, device) for group in _groups(singles)]
    plan = PlainAttentionPlan(absorbed, bool(spans) and not absorb_all, packed, spans)
    return plan, [part.to(device) for part in along]


def _num_splits(length: int) -> int:
    return -(-length // ATTENTION_SPLIT)


def _groups(singles: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts tokens, longest context first, where padding would double the work or the pairs are too many."""
    group: list[tuple[int, int, int]] = []
    for token in sorted(singles, key=lambda single: -_num_splits(single[0])):
        longest = _num_splits(group[0][0]) if group else 0
        if group and (2 * _num_splits(token[0]) < longest or (len(group) + 1) * longest > _MAX_PAIRS):
            yield group
            group = []
        group.append(token)
    if group:
        yield group


def _pack(
    group: list[tuple[int, int, int]], page_table_SP: Tensor, page_size: int, device: torch.device
) -> _Packed:
    lengths, rows, sequences = torch.tensor(group, dtype=torch.int64).t()
    positions = torch.arange(_num_splits(group[0][0]) * ATTENTION_SPLIT)
    hidden_nL = positions >= lengths[:, None]
    positions_nL = positions.expand_as(hidden_nL).masked_fill(hidden_nL, 0)
    pages_nL = page_table_SP[sequences[:, None], positions_nL // page_size]
    slots_nsB = (pages_nL * page_size + positions_nL % page_size).view(len(group), -1, ATTENTION_SPLIT)
    mask_nL = torch.zeros(hidden_nL.shape).masked_fill_(hidden_nL, -math.inf)
    mask_snB = mask_nL.view(len(group), -1, ATTENTION_SPLIT).transpose(0, 1)
    slots, mask = slots_nsB.transpose(0, 1).reshape(-1), mask_snB.reshape(-1, 1, ATTENTION_SPLIT)
    return _Packed(rows.to(device), slots.to(device), mask.to(device))


def mla_absorbed(
    q_latent_AHC: Tensor, q_rope_AHR: Tensor, cache_PSL: Cache, plan: AttentionPlan, *, scale: float
) -> Tensor:
    """See `Ops.mla_absorbed`: DeepSeek-V2 report (arXiv:2405.04434), section 2.1.2, by splits."""
    assert isinstance(plan, PlainAttentionPlan)
    num_heads, num_latent = q_latent_AHC.shape[1:]
    q_AHL = _padded_heads(torch.cat((q_latent_AHC, q_rope_AHR), -1))
    out = q_AHL.new_zeros(*q_AHL.shape[:2], num_latent)
    widths = (num_latent, q_rope_AHR.shape[2])
    scale *= math.log2(math.e)  # powers of two from here on
    for packed in plan.packed:
        latents = _in_splits(cache_PSL, packed.slots, widths)
        q_nHL = q_AHL.index_select(0, packed.rows_n).float()
        attended = _attend_packed(q_nHL, latents, latents[..., :num_latent], packed.mask, scale)
        out.index_copy_(0, packed.rows_n, attended.to(out.dtype))
    if not plan.has_expanded:
        for span in plan.spans:
            latents = _in_splits(cache_PSL, span.slots, widths)
            _attend_span(q_AHL, latents, latents[..., :num_latent], span, out, scale)
    return out[:, :num_heads]


def gqa(q_THW: Tensor, cache_PS2KW: Cache, plan: AttentionPlan, *, scale: float) -> Tensor:
    """See `Ops.gqa`: by splits as `mla_absorbed`, one key head after the other, whose group of heads are the
    rows of a product; but spans of a step that is not deterministic all at once."""
    assert isinstance(plan, PlainAttentionPlan)
    num_key_heads, width = entry_of(cache_PS2KW)[1:]
    q_TKGW = q_THW.view(len(q_THW), num_key_heads, -1, width)
    q_TKMW = _padded_heads(q_TKGW)
    out = torch.zeros_like(q_TKMW)
    scale_log2 = scale * math.log2(math.e)
    for packed in plan.packed:
        rows_n = packed.rows_n if plan.absorbed_rows is None else plan.absorbed_rows[packed.rows_n]
        keys, values = _in_splits(cache_PS2KW, packed.slots, (width,)).unbind(2)
        q_nKMW = q_TKMW.index_select(0, rows_n).float()
        for head in range(num_key_heads):
            parts = q_nKMW[:, head], keys[:, :, head], values[:, :, head]
            attended = _attend_packed(*parts, packed.mask, scale_log2)
            out[:, head].index_copy_(0, rows_n, attended.to(out.dtype))
    for span in plan.spans:
        if plan.has_expanded:
            _attend_at_once(q_TKGW, cache_PS2KW, span, out, scale)
            continue
        keys, values = _in_splits(cache_PS2KW, span.slots, (width,)).unbind(2)
        for head in range(num_key_heads):
            parts = q_TKMW[:, head], keys[:, :, head], values[:, :, head]
            _attend_span(*parts, span, out[:, head], scale_log2)
    return out[:, :, : q_TKGW.shape[2]].flatten(1, 2)


def _padded_heads(q: Tensor) -> Tensor:
    """Queries [..., H, L] with heads of zeros up to a number of rows whose bits do not depend on how many
    products go together."""
    num_heads = q.shape[-2]
    spare = -num_heads % (4 if num_heads <= 4 else ROW_TILE)
    return F.pad(q, (0, 0, 0, spare)) if spare else q


def _in_splits(cache: Cache, slots: Tensor, widths: Sequence[int]) -> Tensor:
    """What slots hold, in float32, [slots / ATTENTION_SPLIT, ATTENTION_SPLIT, ...]."""
    return read_slots(cache, slots, widths).view(-1, ATTENTION_SPLIT, *entry_of(cache))


def _attend_packed(q_nHL: Tensor, keys_pBL: Tensor, values_pBC: Tensor, mask: Tensor, scale: float) -> Tensor:
    """float32 queries of n tokens over their own pairs of (split, token) → float32 [n, H, C]."""
    num_tokens, num_heads = q_nHL.shape[:2]
    num_splits = len(mask) // num_tokens
    q_pairs = q_nHL.repeat(num_splits, 1, 1)
    scores = torch.baddbmm(mask, q_pairs, keys_pBL.transpose(1, 2), alpha=scale)
    weights, total_nH1 = _weights_(scores.view(num_splits, num_tokens, num_heads, ATTENTION_SPLIT))
    values = torch.bmm(weights.flatten(0, 1), values_pBC)
    out_nHC, *others = values.view(num_splits, num_tokens, num_heads, -1).unbind(0)
    for other in others:
        out_nHC.add_(other)
    return out_nHC.div_(total_nH1)


def _attend_span(
    q_AHL: Tensor, keys_sBL: Tensor, values_sBC: Tensor, span: _Span, out_AHC: Tensor, scale: float
) -> None:
    """The span's queries over the splits of its context; writes its rows of `out_AHC`."""
    num_heads = q_AHL.shape[1]
    block = max(1, min(_QUERY_BLOCK, _MAX_SCORES // (span.slots.numel() * num_heads)))
    for row in range(span.first_row, span.last_row, block):
        num_tokens = min(block, span.last_row - row)
        position = span.position + row - span.first_row
        num_splits = _num_splits(position + num_tokens)
        q_nHL = q_AHL[row : row + num_tokens].float()
        ends_n1 = torch.arange(position, position + num_tokens, device=q_nHL.device)[:, None]
        scores = q_nHL.new_empty(num_splits, num_tokens, num_heads, ATTENTION_SPLIT)
        for split in range(num_splits):
            columns = torch.arange(ATTENTION_SPLIT, device=q_nHL.device) + split * ATTENTION_SPLIT
            mask = q_nHL.new_zeros(num_tokens, ATTENTION_SPLIT).masked_fill_(columns > ends_n1, -math.inf)
            keys = keys_sBL[split].t().expand(num_tokens, -1, -1)
            torch.baddbmm(mask.unsqueeze(1), q_nHL, keys, alpha=scale, out=scores[split])
        weights, total_nH1 = _weights_(scores)
        out_nHC = torch.bmm(weights[0], values_sBC[0].expand(num_tokens, -1, -1))
        for split in range(1, num_splits):
            out_nHC.add_(torch.bmm(weights[split], values_sBC[split].expand(num_tokens, -1, -1)))
        out_AHC[row : row + num_tokens] = out_nHC.div_(total_nH1)


def _attend_at_once(q_TKGW: Tensor, cache_PS2KW: Cache, span: _Span, out_TKMW: Tensor, scale: float) -> None:
    """The span's queries over all of their context, a block of them at a time."""
    num_key_heads, share, width = q_TKGW.shape[1:]
    context_len = span.position + span.last_row - span.first_row
    keys_LKW, values_LKW = read_slots(cache_PS2KW, span.slots[:context_len], (width,)).unbind(1)
    block = max(1, min(_QUERY_BLOCK, _MAX_SCORES // (context_len * num_key_heads * share)))
    for row in range(span.first_row, span.last_row, block):
        end = min(row + block, span.last_row)
        first, last = span.position + row - span.first_row, span.position + end - span.first_row
        mask = torch.full((end - row, last), -math.inf, device=q_TKGW.device).triu_(first + 1)
        q_KnW = q_TKGW[row:end].transpose(0, 1).flatten(1, 2).float()
        keys_KWL = keys_LKW[:last].permute(1, 2, 0)
        scores = torch.baddbmm(mask.repeat_interleave(share, 0), q_KnW, keys_KWL, alpha=scale)
        attended_KnW = torch.bmm(scores.softmax(-1), values_LKW[:last].transpose(0, 1))
        attended_KTGW = attended_KnW.view(num_key_heads, end - row, share, -1)
        out_TKMW[row:end, :, :share] = attended_KTGW.transpose(0, 1)


def _weights_(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [splits, n, H, ATTENTION_SPLIT] → powers of two over the rows' maximum, in place, and their
    sum [n, H, 1]: within a split by torch, over splits one after the other, so that further masked splits
    add exact zeros."""
    scores.sub_(scores.amax((0, 3), keepdim=True))
    elementwise_(torch.exp2_, scores)
    total, *others = scores.sum(-1, keepdim=True).unbind(0)
    for other in others:
        total.add_(other)
    return scores, total


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
    assert isinstance(plan, PlainAttentionPlan)
    num_heads, _, num_latent = weight_HOC.shape
    num_values = out_THV.shape[2]
    num_keys = weight_HOC.shape[1] - num_values
    widths = (num_latent, entry_of(cache_PSL)[0] - num_latent)
    for span in plan.spans:
        context_len = span.position + span.last_row - span.first_row
        latents = read_slots(cache_PSL, span.slots[:context_len], widths).to(weight_HOC.dtype)
        expanded_LHO = F.linear(latents[:, :num_latent], weight_HOC.flatten(0, 1)).view(
            context_len, num_heads, -1
        )
        rope_LHR = latents[:, None, num_latent:].expand(-1, num_heads, -1)
        keys_HQL = torch.cat((expanded_LHO[..., :num_keys], rope_LHR), -1).permute(1, 2, 0)
        values_HLV = expanded_LHO[..., num_keys:].transpose(0, 1)
        block = max(1, min(_QUERY_BLOCK, _MAX_SCORES // (context_len * num_heads)))
        for row in range(span.first_row, span.last_row, block):
            end = min(row + block, span.last_row)
            first, last = span.position + row - span.first_row, span.position + end - span.first_row
            mask = torch.full((end - row, last), -math.inf, device=q_THQ.device)
            mask = mask.triu_(first + 1).to(q_THQ.dtype)
            scores = torch.baddbmm(mask, q_THQ[row:end].transpose(0, 1), keys_HQL[:, :, :last], alpha=scale)
            weights = scores.softmax(-1, dtype=torch.float32).to(q_THQ.dtype)
            out_THV[row:end] = torch.bmm(weights, values_HLV[:, :last]).transpose(0, 1)
