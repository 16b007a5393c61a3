"""Repetition, frequency and presence penalties on logits, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense

_BLOCK = 256


@triton.jit
def penalties_kernel(
    logits_ptr: tl.tensor,
    token_id_ptr: tl.tensor,
    output_count_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    logits_stride: int,
    num_listed: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    listed = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * num_listed + listed
    token = tl.load(token_id_ptr + at, mask=listed < num_listed, other=-1)
    count = tl.load(output_count_ptr + at, mask=listed < num_listed, other=0)
    logits_at = logits_ptr + row.to(tl.int64) * logits_stride + tl.maximum(token, 0)
    x = tl.load(logits_at, mask=token >= 0, other=0.0).to(tl.float32)
    repetition = tl.load(repetition_ptr + row)
    x = tl.where(x > 0, x / repetition, x * repetition)
    x -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    x -= tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(logits_at, x.to(logits_ptr.dtype.element_ty), mask=token >= 0)


def apply_penalties(
    logits_SV: Tensor,
    token_ids_SL: Tensor,
    output_count_SL: Tensor,
    repetition_S: Tensor,
    frequency_S: Tensor,
    presence_S: Tensor,
) -> None:
    """Applies penalties in place; `token_ids_SL` int32 lists each row's distinct tokens, -1 padded.

    See `reference.apply_penalties`. Distinct, because a token listed twice would be penalised by two lanes
    at once.
    """
    num_sequences, num_listed = token_ids_SL.shape
    scalars = (repetition_S, frequency_S, presence_S)
    assert rows_dense(logits_SV)
    assert token_ids_SL.dtype == output_count_SL.dtype == torch.int32
    assert output_count_SL.shape == token_ids_SL.shape
    assert logits_SV.shape[0] == num_sequences
    assert all(x.shape == (num_sequences,) and x.dtype == torch.float32 for x in scalars)
    assert all(x.is_contiguous() for x in (token_ids_SL, output_count_SL, *scalars))
    if token_ids_SL.numel():
        penalties_kernel[(num_sequences, triton.cdiv(num_listed, _BLOCK))](
            logits_SV,
            token_ids_SL,
            output_count_SL,
            *scalars,
            logits_SV.stride(0),
            num_listed,
            BLOCK=_BLOCK,
            num_warps=2,
        )
