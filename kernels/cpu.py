"""The operations of `kernels.ops` in plain torch: the CPU's, and those of devices without own kernels.

What keeps a row's bits free of its neighbours, beside the tiles: elementwise functions that have a vector
body and a scalar tail (exp2, silu, sigmoid) see at most `GRAIN` elements a call, in whole vectors or row by
row, so that neither the tail nor the split over threads falls elsewhere when other rows come; and
nothing is summed over a length that other sequences decide. Weights of few bits are dequantized some rows
at a time, whose number depends on the weight alone.

Measured with torch 2.13's MKL on one and two threads: in products of fewer than 12 columns a row's bits
depend on its place in the tile, and those of products of 1, 3, 5 or 6 rows on how many share the batch. So
columns are padded to `_MIN_COLUMNS`, and heads to 4 or a multiple of ROW_TILE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ROW_TILE
from kernels.cpu_attention import gqa, mla_absorbed, mla_expanded, plan_attention
from kernels.cpu_cache import write_slots
from kernels.cpu_elementwise import GRAIN, elementwise_
from kernels.cpu_sampler import sample
from kernels.int_weight import dequantize_groups, fp8_to_float
from kernels.ops import (
    Cache,
    GroupScaled,
    ModelShape,
    Rotation,
    Routing,
    Weight,
)

# Operations in files of their own.
__all__ = ["gqa", "mla_absorbed", "mla_expanded", "plan_attention", "sample"]

KEEPS_FP8 = True
HAS_MOE = False

_MIN_COLUMNS = 16
_MAX_DEQUANTIZED = 1 << 18  # elements of a weight dequantized at once


def faults(shape: ModelShape) -> list[str]:
    """See `Ops.faults`: plain torch serves every shape."""
    return []


def block_scaled(values: Tensor, scale: Tensor, block: tuple[int, int], device: torch.device) -> GroupScaled:
    """See `Ops.block_scaled`. Each row gets its blocks' scales, so that blocks of any size may be stacked."""
    num_rows, width = values.shape
    if width % block[1]:
        values = F.pad(values.view(torch.uint8), (0, -width % block[1])).view(values.dtype)
    scales = scale.float().repeat_interleave(block[0], 0)[:num_rows]
    return GroupScaled(values.to(device), scales.to(device), width)


def linear(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None, *, tiled: bool) -> Tensor:
    """See `Ops.linear`."""
    if bias_O is not None:
        return linear(x_TI, weight_OI, tiled=tiled).add_(bias_O)
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
    rows = max(1, GRAIN // gate.shape[1])
    if len(gate) <= rows:
        return F.silu(gate).mul_(up)
    return torch.cat([F.silu(part) for part in torch.split(gate, rows)]).mul_(up)


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def rotation(table_PR: Tensor, positions_T: Tensor) -> Tensor:
    """See `Ops.rotation`: the rows of cos and sin, [T, R]."""
    return table_PR.index_select(0, positions_T)


def rope_(x_THR: Tensor, rotation: Rotation, *, interleaved: bool) -> None:
    """See `Ops.rope_`."""
    assert isinstance(rotation, Tensor)
    if not interleaved:
        _rotate_halves_(x_THR, rotation)
        return
    turn = _as_pairs(rotation).unsqueeze(1)
    if x_THR.dtype == torch.float32:
        _as_pairs(x_THR).mul_(turn)
    else:
        turned = _as_pairs(x_THR.float()).mul_(turn)
        x_THR.copy_(torch.view_as_real(turned).flatten(-2))


def _rotate_halves_(x_THR: Tensor, rotation_TR: Tensor) -> None:
    """In float32, by products and sums alone, which round every element by itself."""
    cos_T1R, sin_T1R = rotation_TR[:, None, ::2], rotation_TR[:, None, 1::2]
    first, second = x_THR.float().chunk(2, -1)
    x_THR.copy_(torch.cat((first * cos_T1R - second * sin_T1R, first * sin_T1R + second * cos_T1R), -1))


def store_latents(
    cache_PSL: Cache,
    slots_T: Tensor,
    latent_TL: Tensor,
    norm_weight_C: Tensor,
    eps: float,
    rotation: Rotation,
) -> None:
    """See `Ops.store_latents`."""
    num_latent = len(norm_weight_C)
    latent_TC = latent_TL[:, :num_latent]
    rope_(latent_TL[:, None, num_latent:], rotation, interleaved=True)
    latent_TC.copy_(rms_norm(latent_TC, norm_weight_C, eps))
    widths = (num_latent, latent_TL.shape[1] - num_latent)
    write_slots(cache_PSL, slots_T, latent_TL[: len(slots_T)], widths)


def store_kv(cache_PS2KW: Cache, slots_T: Tensor, k_TKW: Tensor, v_TKW: Tensor, rotation: Rotation) -> None:
    """See `Ops.store_kv`."""
    rope_(k_TKW, rotation, interleaved=False)
    num_tokens = len(slots_T)
    both_T2KW = torch.stack((k_TKW[:num_tokens], v_TKW[:num_tokens]), 1)
    write_slots(cache_PS2KW, slots_T, both_T2KW, both_T2KW.shape[3:])


def gate(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, routing: Routing, *, tiled: bool
) -> tuple[Tensor, Tensor]:
    """See `Ops.gate`."""
    logits_TE = linear(x_TD.float(), weight_ED, tiled=tiled)
    scores_TE = elementwise_(torch.sigmoid_, logits_TE)
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
