"""The operations of `kernels.ops` in plain torch: the CPU's, and those of devices without own kernels.

What keeps a row's bits free of its neighbours, beside the tiles: elementwise functions that have a vector
body and a scalar tail (exp2, silu, sigmoid) see at most `_GRAIN` elements a call, in whole vectors or row by
row, so that neither the tail nor the split over threads falls elsewhere when other rows come; and
nothing is summed over a length that other sequences decide. Weights of few bits are dequantized some rows
at a time, whose number depends on the weight alone.

Measured with torch 2.13's MKL on one and two threads: in products of fewer than 12 columns a row's bits
depend on its place in the tile, and those of products of 1, 3, 5 or 6 rows on how many share the batch. So
columns are padded to `_MIN_COLUMNS`, and heads to 4 or a multiple of ROW_TILE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ROW_TILE
from kernels.cpu_sampler import sample
from kernels.int_weight import dequantize_groups, fp8_to_float
from kernels.ops import (
    ATTENTION_SPLIT,
    AttentionPlan,
    GroupScaled,
    ModelShape,
    Rotation,
    Routing,
    Weight,
)

__all__ = ["sample"]  # of another file, and an operation like those below

KEEPS_FP8 = True
HAS_MOE = False

_GRAIN = 32768  # torch's own grain: fewer elements are never split over threads
_VECTOR = 32  # elements that the vector body takes at a time
_MIN_COLUMNS = 16
_FEW_QUERIES = 4  # chunks as short as this are attended like decoded tokens
_MAX_PAIRS = 256  # (token, split) pairs attended at once
_QUERY_BLOCK = 64  # queries of one sequence attended at once
_MAX_SCORES = 1 << 22  # scores held at once
_MAX_DEQUANTIZED = 1 << 18  # elements of a weight dequantized at once


def faults(shape: ModelShape) -> list[str]:
    """See `Ops.faults`: plain torch serves every shape."""
    return []


def block_scaled(values: Tensor, scale: Tensor, block: tuple[int, int], device: torch.device) -> GroupScaled:
    """See `Ops.block_scaled`. Each row gets its blocks' scales, so that blocks of any size may be stacked."""
    num_rows, width = values.shape
    padded = F.pad(values.view(torch.uint8), (0, -width % block[1])).view(values.dtype)
    scales = scale.float().repeat_interleave(block[0], 0)[:num_rows]
    return GroupScaled(padded.to(device), scales.to(device), width)


def linear(x_TI: Tensor, weight_OI: Weight, *, tiled: bool) -> Tensor:
    """See `Ops.linear`."""
    if isinstance(weight_OI, GroupScaled):
        return _scaled_linear(x_TI, weight_OI, tiled)
    assert isinstance(weight_OI, Tensor)
    num_columns = len(weight_OI)
    if tiled and num_columns < _MIN_COLUMNS:
        weight_OI = F.pad(weight_OI, (0, 0, 0, _MIN_COLUMNS - num_columns))
        return linear(x_TI, weight_OI, tiled=True)[:, :num_columns].contiguous()
    num_rows, width = x_TI.shape
    if not tiled or num_rows == ROW_TILE:
        return F.linear(x_TI, weight_OI)
    tiles = x_TI.reshape(-1, ROW_TILE, width)
    return torch.bmm(tiles, weight_OI.t().expand(len(tiles), -1, -1)).view(num_rows, -1)


def _scaled_linear(x_TI: Tensor, weight: GroupScaled, tiled: bool) -> Tensor:
    """By runs of the weight's rows: no more of it than `_MAX_DEQUANTIZED` elements is ever in full width."""
    num_columns = len(weight.values)
    out = x_TI.new_empty(len(x_TI), num_columns)
    step = max(_MIN_COLUMNS, _MAX_DEQUANTIZED // weight.width)
    for first in range(0, num_columns, step):
        run = slice(first, first + step)
        part = dequantize_groups(weight.values[run], weight.scale[run], weight.width, x_TI.dtype)
        out[:, run] = linear(x_TI, part, tiled=tiled)
    return out


def head_linear(x_THI: Tensor, weight_HIO: Tensor, *, tiled: bool) -> Tensor:
    """See `Ops.head_linear`."""
    num_rows, num_heads = x_THI.shape[:2]
    num_columns = weight_HIO.shape[2]
    if tiled and num_columns < _MIN_COLUMNS:
        weight_HIO = F.pad(weight_HIO, (0, _MIN_COLUMNS - num_columns))
        return head_linear(x_THI, weight_HIO, tiled=True)[..., :num_columns]
    if not tiled or num_rows == ROW_TILE:
        return torch.bmm(x_THI.transpose(0, 1), weight_HIO).transpose(0, 1)
    out = x_THI.new_empty(num_rows, num_heads, num_columns)
    for x_tile, out_tile in zip(torch.split(x_THI, ROW_TILE), torch.split(out, ROW_TILE)):
        out_tile.copy_(torch.bmm(x_tile.transpose(0, 1), weight_HIO).transpose(0, 1))
    return out


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `Ops.rms_norm`."""
    x = x_TD.float()
    norm_T1: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse_T1 = norm_T1.square_().mul_(1 / x.shape[1]).add_(eps).rsqrt_()
    normed: Tensor = (x * inverse_T1).to(x_TD.dtype).mul_(weight_D)
    return normed


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `Ops.add_rms_norm`."""
    if delta_TD is not None:
        x_TD += delta_TD
    return rms_norm(x_TD, weight_D, eps), x_TD


def mlp(x_TD: Tensor, gate_up_2FD: Weight, down_DF: Weight, *, tiled: bool) -> Tensor:
    """See `Ops.mlp`."""
    return linear(silu_mul(linear(x_TD, gate_up_2FD, tiled=tiled)), down_DF, tiled=tiled)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """SiLU of the first half of the columns times the second half, [T, F]."""
    gate, up = x_T2F.chunk(2, -1)
    rows = max(1, _GRAIN // gate.shape[1])
    if len(gate) <= rows:
        return F.silu(gate).mul_(up)
    return torch.cat([F.silu(part) for part in torch.split(gate, rows)]).mul_(up)


def _elementwise_(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies an in-place function to a contiguous tensor, in whole vectors and below the grain."""
    flat = x.view(-1)
    if whole := flat.numel() % _VECTOR:
        padded = F.pad(flat, (0, _VECTOR - whole))
        x.copy_(_elementwise_(function, padded)[: flat.numel()].view_as(x))
    elif flat.numel() <= _GRAIN:
        function(flat)
    else:
        for part in torch.split(flat, _GRAIN):
            function(part)
    return x


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def rotation(table_PR: Tensor, positions_T: Tensor) -> Tensor:
    """See `Ops.rotation`: the rows of cos and sin, [T, R]."""
    return table_PR.index_select(0, positions_T)


def rope_(x_THR: Tensor, rotation: Rotation) -> None:
    """See `Ops.rope_`."""
    assert isinstance(rotation, Tensor)
    turn = _as_pairs(rotation).unsqueeze(1)
    if x_THR.dtype == torch.float32:
        _as_pairs(x_THR).mul_(turn)
    else:
        turned = _as_pairs(x_THR.float()).mul_(turn)
        x_THR.copy_(torch.view_as_real(turned).flatten(-2))


def store_latents(
    cache_PSL: Tensor,
    slots_T: Tensor,
    latent_TL: Tensor,
    norm_weight_C: Tensor,
    eps: float,
    rotation: Rotation,
) -> None:
    """See `Ops.store_latents`."""
    num_latent = len(norm_weight_C)
    latent_TC = latent_TL[:, :num_latent]
    rope_(latent_TL[:, None, num_latent:], rotation)
    latent_TC.copy_(rms_norm(latent_TC, norm_weight_C, eps))
    cache_PSL.flatten(0, 1).index_copy_(0, slots_T, latent_TL[: len(slots_T)])


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
    q_latent_AHC: Tensor, q_rope_AHR: Tensor, cache_PSL: Tensor, plan: AttentionPlan, *, scale: float
) -> Tensor:
    """See `Ops.mla_absorbed`: DeepSeek-V2 report (arXiv:2405.04434), section 2.1.2, by splits."""
    assert isinstance(plan, PlainAttentionPlan)
    num_heads, num_latent = q_latent_AHC.shape[1:]
    q_AHL = torch.cat((q_latent_AHC, q_rope_AHR), -1)
    if spare := -num_heads % (4 if num_heads <= 4 else ROW_TILE):
        q_AHL = F.pad(q_AHL, (0, 0, 0, spare))
    out = q_AHL.new_zeros(*q_AHL.shape[:2], num_latent)
    cache = cache_PSL.flatten(0, 1)
    scale *= math.log2(math.e)  # powers of two from here on
    for packed in plan.packed:
        out.index_copy_(0, packed.rows_n, _attend_packed(q_AHL, cache, packed, num_latent, scale))
    if not plan.has_expanded:
        for span in plan.spans:
            _attend_span(q_AHL, cache, span, out, scale)
    return out[:, :num_heads]


def _attend_packed(q_AHL: Tensor, cache: Tensor, packed: _Packed, num_latent: int, scale: float) -> Tensor:
    num_tokens, num_heads = len(packed.rows_n), q_AHL.shape[1]
    num_pairs = len(packed.mask)
    num_splits = num_pairs // num_tokens
    q_nHL = q_AHL.index_select(0, packed.rows_n).float()
    latents = cache.index_select(0, packed.slots).float().view(num_pairs, ATTENTION_SPLIT, -1)
    q_pairs = q_nHL.repeat(num_splits, 1, 1)
    scores = torch.baddbmm(packed.mask, q_pairs, latents.transpose(1, 2), alpha=scale)
    weights, total_nH1 = _weights_(scores.view(num_splits, num_tokens, num_heads, ATTENTION_SPLIT))
    values = torch.bmm(weights.flatten(0, 1), latents[:, :, :num_latent])
    out_nHC, *others = values.view(num_splits, num_tokens, num_heads, num_latent).unbind(0)
    for other in others:
        out_nHC.add_(other)
    return out_nHC.div_(total_nH1).to(q_AHL.dtype)


def _attend_span(q_AHL: Tensor, cache: Tensor, span: _Span, out_AHC: Tensor, scale: float) -> None:
    num_heads = q_AHL.shape[1]
    latents = cache.index_select(0, span.slots).float().view(-1, ATTENTION_SPLIT, cache.shape[1])
    values = latents[:, :, : out_AHC.shape[2]]
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
            keys = latents[split].t().expand(num_tokens, -1, -1)
            torch.baddbmm(mask.unsqueeze(1), q_nHL, keys, alpha=scale, out=scores[split])
        weights, total_nH1 = _weights_(scores)
        out_nHC = torch.bmm(weights[0], values[0].expand(num_tokens, -1, -1))
        for split in range(1, num_splits):
            out_nHC.add_(torch.bmm(weights[split], values[split].expand(num_tokens, -1, -1)))
        out_AHC[row : row + num_tokens] = out_nHC.div_(total_nH1)


def _weights_(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [splits, n, H, ATTENTION_SPLIT] → powers of two over the rows' maximum, in place, and their
    sum [n, H, 1]: within a split by torch, over splits one after the other, so that further masked splits
    add exact zeros."""
    scores.sub_(scores.amax((0, 3), keepdim=True))
    _elementwise_(torch.exp2_, scores)
    total, *others = scores.sum(-1, keepdim=True).unbind(0)
    for other in others:
        total.add_(other)
    return scores, total


def mla_expanded(
    q_THQ: Tensor,
    cache_PSL: Tensor,
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
    cache = cache_PSL.flatten(0, 1)
    for span in plan.spans:
        context_len = span.position + span.last_row - span.first_row
        latents = cache.index_select(0, span.slots[:context_len])
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


def gate(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, routing: Routing, *, tiled: bool
) -> tuple[Tensor, Tensor]:
    """See `Ops.gate`."""
    logits_TE = linear(x_TD.float(), weight_ED, tiled=tiled)
    scores_TE = _elementwise_(torch.sigmoid_, logits_TE)
    choice_TE = scores_TE + bias_E
    if routing.top_groups < routing.num_groups:
        choice_TGE = choice_TE.view(len(choice_TE), routing.num_groups, -1)
        group_TG = choice_TGE.topk(2, dim=-1).values.sum(-1)
        out_TG = torch.ones_like(group_TG, dtype=torch.bool)
        out_TG.scatter_(1, group_TG.topk(routing.top_groups, dim=-1).indices, False)
        choice_TE = choice_TGE.masked_fill_(out_TG.unsqueeze(-1), -math.inf).flatten(1)
    ids_TK = choice_TE.topk(routing.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if routing.normalize:
        total_T1 = weights_TK[:, :1].clone()
        for k in range(1, routing.top_k):
            total_T1.add_(weights_TK[:, k : k + 1])
        weights_TK.div_(total_T1.add_(1e-20))
    return weights_TK.mul_(routing.scaling), ids_TK


def experts(
    x_ND: Tensor, counts: Sequence[int], gate_up_e2FD: Weight, down_eDF: Weight, *, tiled: bool
) -> Tensor:
    """See `Ops.experts`."""
    if isinstance(gate_up_e2FD, GroupScaled):
        assert isinstance(down_eDF, GroupScaled)
        return _scaled_experts(x_ND, counts, gate_up_e2FD, down_eDF, tiled)
    assert isinstance(gate_up_e2FD, Tensor)
    assert isinstance(down_eDF, Tensor)
    if tiled:
        return _tiled_experts(x_ND, counts, gate_up_e2FD, down_eDF)
    parts = []
    first = 0
    for expert, count in enumerate(counts):
        if count:
            hidden = silu_mul(F.linear(x_ND[first : first + count], gate_up_e2FD[expert]))
            parts.append(F.linear(hidden, down_eDF[expert]))
            first += count
    return torch.cat(parts) if parts else x_ND.clone()


def _scaled_experts(
    x_ND: Tensor, counts: Sequence[int], gate_up_e2FD: GroupScaled, down_eDF: GroupScaled, tiled: bool
) -> Tensor:
    """Expert by expert, each one's rows padded to whole tiles where they are `tiled`."""
    out = torch.empty_like(x_ND)
    first = 0
    for expert, count in enumerate(counts):
        if count:
            spare = -count % ROW_TILE if tiled else 0
            x = F.pad(x_ND[first : first + count], (0, 0, 0, spare))
            y = mlp(x, gate_up_e2FD.expert(expert), down_eDF.expert(expert), tiled=tiled)
            out[first : first + count] = y[:count]
            first += count
    return out


def _tiled_experts(x_ND: Tensor, counts: Sequence[int], gate_up_e2FD: Tensor, down_eDF: Tensor) -> Tensor:
    """Rows padded with zeros to whole tiles of each expert; neighbours of equally many tiles go together."""
    rows: list[int] = []  # where each row lies among the padded ones
    runs: list[tuple[int, int, int, int]] = []  # (first tile, first expert, experts, tiles of each)
    tiles = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        num_tiles = -(-count // ROW_TILE)
        rows.extend(range(tiles * ROW_TILE, tiles * ROW_TILE + count))
        if runs and num_tiles == 1 == runs[-1][3] and runs[-1][1] + runs[-1][2] == expert:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1, 1)
        else:
            runs.append((tiles, expert, 1, num_tiles))
        tiles += num_tiles
    index_N = torch.tensor(rows, dtype=torch.int64, device=x_ND.device)
    x_tRD = x_ND.new_zeros(tiles * ROW_TILE, x_ND.shape[1]).index_copy_(0, index_N, x_ND)
    x_tRD = x_tRD.view(tiles, ROW_TILE, -1)
    hidden = silu_mul(_run_products(x_tRD, gate_up_e2FD, runs).flatten(0, 1))
    y_tRD = _run_products(hidden.view(tiles, ROW_TILE, -1), down_eDF, runs)
    return y_tRD.flatten(0, 1).index_select(0, index_N)


def _run_products(x_tRI: Tensor, weight_eOI: Tensor, runs: list[tuple[int, int, int, int]]) -> Tensor:
    out = x_tRI.new_empty(*x_tRI.shape[:2], weight_eOI.shape[1])
    for tile, expert, num_experts, num_tiles in runs:
        weights = weight_eOI[expert : expert + num_experts].transpose(1, 2)
        end = tile + num_experts * num_tiles
        torch.bmm(x_tRI[tile:end], weights.expand(end - tile, -1, -1), out=out[tile:end])
    return out


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """See `Ops.dequantize`."""
    num_rows, num_columns = weight.shape
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=weight.device)
    for i, scale_row in enumerate(scale.float()):
        rows = slice(i * block[0], (i + 1) * block[0])
        out[rows] = fp8_to_float(weight[rows]) * scale_row.repeat_interleave(block[1])[:num_columns]
    return out
