"""SiLU(gate)·up of rows that stay in their dtype; where they are quantized next, `fp8.silu_mul_quantize`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, x_stride: int, F: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * F + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside
    )


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """[T, F] in the dtype of [T, 2F]: SiLU of the first F columns times the last F; `reference.silu_mul`."""
    num_tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    assert rows_dense(gate_up_T2F), "rows must be contiguous"
    assert gate_up_T2F.shape[1] == 2 * width, f"rows of {gate_up_T2F.shape[1]} do not halve"
    out_TF = torch.empty(num_tokens, width, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    block = min(_BLOCK, triton.next_power_of_2(width))
    if num_tokens:
        silu_mul_kernel[(num_tokens, triton.cdiv(width, block))](
            gate_up_T2F, out_TF, gate_up_T2F.stride(0), F=width, BLOCK=block, num_warps=4
        )
    return out_TF
