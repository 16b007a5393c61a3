"""The operations of `kernels.ops` by our Triton kernels: NVIDIA, and AMD under torch's name cuda.

FP8 weights stay FP8: activations are quantized per token and 128 columns, and products are block-scaled.
INT8 and INT4 weights stay so as well, and meet activations that are not quantized. Products of weights that
are not quantized (BF16 checkpoints, the head, the gate, and the two per-head products of absorbed attention)
are cuBLAS's or hipBLASLt's, through torch; all else is ours. `tiled` gives those products one shape, a tile
of rows at a time, because a library may choose another kernel for another number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    ROW_TILE,
    fp8,
    gemm_fp8,
    int_gemm,
    int_moe_gemm,
    mla_cache,
    moe_combine,
    moe_gate,
    moe_gemm,
    moe_gemm_plain,
    moe_sort,
    norm,
    sampler,
    silu,
)
from kernels import rope as rope_kernel
from kernels.gqa import write_kv
from kernels.launch import native_fp8
from kernels.ops import BlockScaled, Cache, Draws, GroupScaled, ModelShape, Rotation, Routing, Weight
from kernels.reference import SortedRows
from kernels.triton_attention import gqa, mla_absorbed, mla_expanded, parts_of, plan_attention, refill_
from kernels.upload import upload

# Operations in a file of their own.
__all__ = ["gqa", "mla_absorbed", "mla_expanded", "plan_attention", "refill_"]

_Unscaled = Tensor | GroupScaled
KEEPS_FP8 = True
HAS_MOE = True

_GROUP = 128
_LEAST_WIDTH = 16  # of a matrix unit's operand
_INT32_MAX = 2**31 - 1
_MANY_ROWS = 64  # rows of an expert from which blocks of 128 pay


def faults(shape: ModelShape) -> list[str]:
    """See `Ops.faults`: what the kernels' blocks ask of a model."""
    found = []
    if shape.page_size % 16:
        found.append(f"engine.page_size {shape.page_size} is not a multiple of 16")
    for name, width in shape.head_widths.items():
        if width < _LEAST_WIDTH or width & (width - 1):
            found.append(f"{name} {width} is not a power of two of {_LEAST_WIDTH} or more")
    if shape.fp8_block not in (None, (_GROUP, _GROUP)):
        found.append(f"weight_block_size {list(shape.fp8_block)} is not [128, 128]")
    if odd := sorted({width for width in shape.inner_widths if width % _GROUP}):
        found.append(f"FP8 products of inner widths {odd} do not divide into groups of {_GROUP}")
    if odd := sorted({rows for rows in shape.stacked_rows if rows % _GROUP}):
        found.append(f"FP8 weights of {odd} rows have another below them, but do not end with a block")
    return found


def block_scaled(values: Tensor, scale: Tensor, block: tuple[int, int], device: torch.device) -> BlockScaled:
    """See `Ops.block_scaled`. FNUZ's exponents are biased by one more, so that the same bits mean half as
    much, and minus zero's bits mean NaN."""
    assert block == (_GROUP, _GROUP)
    dtype = native_fp8(device)
    values, scale = values.to(device), scale.to(device, torch.float32)
    if dtype == torch.float8_e4m3fnuz:
        bits = values.view(torch.uint8)
        values, scale = torch.where(bits == 0x80, 0, bits).view(dtype), scale * 2
    return BlockScaled(values.contiguous(), scale.contiguous())


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """See `Ops.dequantize`."""
    assert block == (_GROUP, _GROUP)
    return fp8.dequantize_weight(weight, scale.float().contiguous(), dtype)


def linear(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None, *, tiled: bool) -> Tensor:
    """See `Ops.linear`."""
    if isinstance(weight_OI, BlockScaled):
        out = _scaled_product(*fp8.quantize(x_TI, weight_OI.values.dtype), weight_OI, x_TI.dtype, tiled)
        return out if bias_O is None else out.add_(bias_O)
    if isinstance(weight_OI, GroupScaled):
        out = int_gemm.gemm_int(x_TI, weight_OI.values, weight_OI.scale, deterministic=tiled)
        return out if bias_O is None else out.add_(bias_O)
    if not tiled or len(x_TI) == ROW_TILE:
        return F.linear(x_TI, weight_OI, bias_O)
    return torch.cat([F.linear(tile, weight_OI, bias_O) for tile in torch.split(x_TI, ROW_TILE)])


def _scaled_product(
    q: Tensor, scale: Tensor, weight: BlockScaled, dtype: torch.dtype, deterministic: bool
) -> Tensor:
    return gemm_fp8.gemm_fp8(
        q, scale, weight.values, weight.scale, out_dtype=dtype, deterministic=deterministic
    )


def head_linear(x_THI: Tensor, weight_HIO: Tensor, *, tiled: bool) -> Tensor:
    """See `Ops.head_linear`."""
    num_rows, num_heads = x_THI.shape[:2]
    out_THO = torch.empty(num_rows, num_heads, weight_HIO.shape[2], dtype=x_THI.dtype, device=x_THI.device)
    size = ROW_TILE if tiled else max(num_rows, 1)
    for x_tile, out_tile in zip(torch.split(x_THI, size), torch.split(out_THO, size)):
        torch.bmm(x_tile.transpose(0, 1), weight_HIO, out=out_tile.transpose(0, 1))
    return out_THO


def mlp(x_TD: Tensor, gate_up_2FD: Weight, down_DF: Weight, *, tiled: bool) -> Tensor:
    """See `Ops.mlp`."""
    gate_up_T2F = linear(x_TD, gate_up_2FD, tiled=tiled)
    if isinstance(down_DF, BlockScaled):
        hidden = fp8.silu_mul_quantize(gate_up_T2F, down_DF.values.dtype)
        return _scaled_product(*hidden, down_DF, x_TD.dtype, tiled)
    return linear(silu.silu_mul(gate_up_T2F), down_DF, tiled=tiled)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `Ops.rms_norm`."""
    return norm.rms_norm(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `Ops.add_rms_norm`."""
    if delta_TD is None:
        return norm.rms_norm(x_TD, weight_D, eps), x_TD
    return norm.add_rms_norm(delta_TD, x_TD, weight_D, eps)


def rotation(table_PR: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Ops.rotation`: (cos, sin) [T, R/2] and the numbers of their rows."""
    pairs = table_PR.index_select(0, positions_T).view(len(positions_T), -1, 2)
    rows = torch.arange(len(pairs), dtype=torch.int32, device=pairs.device)
    return pairs[..., 0].contiguous(), pairs[..., 1].contiguous(), rows


def rope_(x_THR: Tensor, rotation: Rotation, *, interleaved: bool) -> None:
    """See `Ops.rope_`."""
    assert isinstance(rotation, tuple)
    rope_kernel.rope(x_THR, *rotation, interleaved=interleaved, in_place=True)


def store_latents(
    cache_PSL: Cache,
    slots_T: Tensor,
    latent_TL: Tensor,
    norm_weight_C: Tensor,
    eps: float,
    rotation: Rotation,
) -> None:
    """See `Ops.store_latents`."""
    assert isinstance(rotation, tuple)
    cos, sin, rows = rotation
    num_rows = len(slots_T)
    mla_cache.write_latent(
        latent_TL[:num_rows], norm_weight_C, eps, cos, sin, rows[:num_rows], slots_T, *parts_of(cache_PSL)
    )


def store_kv(cache_PS2KW: Cache, slots_T: Tensor, k_TKW: Tensor, v_TKW: Tensor, rotation: Rotation) -> None:
    """See `Ops.store_kv`."""
    assert isinstance(rotation, tuple)
    cos, sin, rows = rotation
    num_rows = len(slots_T)
    k_TKW, v_TKW = k_TKW[:num_rows], v_TKW[:num_rows]
    values_PS2KW, scale_PS2K = parts_of(cache_PS2KW)
    k_cache, v_cache = values_PS2KW.unbind(2)
    scales = None if scale_PS2K is None else scale_PS2K.unbind(2)
    write_kv(k_TKW, v_TKW, cos, sin, rows[:num_rows], slots_T, k_cache, v_cache, scales)


def gate(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, routing: Routing, *, tiled: bool
) -> tuple[Tensor, Tensor]:
    """See `Ops.gate`."""
    return moe_gate.gate(
        linear(x_TD.float(), weight_ED, tiled=tiled),
        bias_E,
        num_groups=routing.num_groups,
        top_groups=routing.top_groups,
        top_k=routing.top_k,
        normalize=routing.normalize,
        scaling=routing.scaling,
    )


def moe(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    gate_up_e2FD: Weight,
    down_eDF: Weight,
    *,
    num_tokens: Tensor | None,
    tiled: bool,
) -> Tensor:
    """See `DeviceOps.moe`."""
    num_rows, top_k = expert_ids_TK.shape
    num_experts = len(gate_up_e2FD if isinstance(gate_up_e2FD, Tensor) else gate_up_e2FD.values)
    # By the number of rows alone, which a captured graph fixes: whatever the routing, one launch shape.
    block = 128 if not tiled and num_rows * top_k >= _MANY_ROWS * num_experts else 16
    order = moe_sort.sort_rows(expert_ids_TK, num_experts, block, num_tokens)
    if isinstance(gate_up_e2FD, BlockScaled):
        assert isinstance(down_eDF, BlockScaled)
        y_MD = _scaled_experts(x_TD, order, top_k, gate_up_e2FD, down_eDF, tiled)
    else:
        assert not isinstance(down_eDF, BlockScaled)
        y_MD = _unscaled_experts(x_TD, order, top_k, gate_up_e2FD, down_eDF, tiled)
    return moe_combine.combine(y_MD, order.slot_of_row, weights_TK)


def _unscaled_experts(
    x_TD: Tensor, order: SortedRows, top_k: int, gate_up: _Unscaled, down: _Unscaled, tiled: bool
) -> Tensor:
    """The experts' outputs in the order of slots, by products of x that is not quantized."""
    num_slots = order.row_of_slot.numel()

    def product(a: Tensor, weight: _Unscaled, row_of_slot: Tensor | None, rows_per_source: int) -> Tensor:
        grouped = (
            partial(moe_gemm_plain.grouped_plain, a, weight)
            if isinstance(weight, Tensor)
            else partial(int_moe_gemm.grouped_int, a, weight.values, weight.scale)
        )
        return grouped(
            order.expert_of_block,
            row_of_slot,
            rows_per_source=rows_per_source,
            num_slots=num_slots,
            deterministic=tiled,
        )

    gate_up_M2F = product(x_TD, gate_up, order.row_of_slot, top_k)
    return product(silu.silu_mul(gate_up_M2F), down, None, 1)


def _scaled_experts(
    x_TD: Tensor,
    order: SortedRows,
    top_k: int,
    gate_up: BlockScaled,
    down: BlockScaled,
    tiled: bool,
) -> Tensor:
    """As `_unscaled_experts`; x is quantized once, not once for each of its experts."""
    q, scale = fp8.quantize(x_TD, gate_up.values.dtype)
    q, scale = moe_combine.spread_rows(q, scale, order.row_of_slot, top_k)
    index = order.expert_of_block
    hidden = moe_gemm.grouped_gate_up(q, scale, gate_up.values, gate_up.scale, index, deterministic=tiled)
    return moe_gemm.grouped_gemm(
        *hidden, down.values, down.scale, index, out_dtype=x_TD.dtype, deterministic=tiled
    )


def experts(
    x_ND: Tensor, counts: Sequence[int], gate_up_e2FD: Weight, down_eDF: Weight, *, tiled: bool
) -> Tensor:
    """See `Ops.experts`: a mixture of one expert a row, of weight one."""
    ids_N1 = torch.repeat_interleave(torch.tensor(counts))[:, None].to(torch.int32)
    (ids_N1,) = upload([ids_N1], x_ND.device)
    one_N1 = torch.ones(ids_N1.shape, dtype=torch.float32, device=x_ND.device)
    return moe(x_ND, one_N1, ids_N1, gate_up_e2FD, down_eDF, num_tokens=None, tiled=tiled)


def sample(logits_SV: Tensor, draws: Draws) -> list[int]:
    """See `Ops.sample`. The one place of a step where the host waits for the device."""
    columns = [
        torch.tensor(draws.temperatures, dtype=torch.float32),
        torch.tensor([min(max(k, 0), _INT32_MAX) for k in draws.top_ks], dtype=torch.int32),
        torch.tensor(draws.top_ps, dtype=torch.float32),
        torch.zeros(len(draws.seeds), dtype=torch.float32),  # min-p, which keeps everything
        torch.tensor([_wrapped(seed) for seed in draws.seeds], dtype=torch.int64),
        torch.tensor([_wrapped(position) for position in draws.positions], dtype=torch.int64),
    ]
    tokens: list[int] = sampler.sample(logits_SV, *upload(columns, logits_SV.device)).tolist()
    return tokens


def _wrapped(number: int) -> int:
    """The int64 that is equal to it modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63
