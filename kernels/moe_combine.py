"""Rows on their way to experts and back: pack and unpack for dispatch, gather for the return, combine.

A dispatched row is D FP8 bytes, then D/128 float32 scales, moved as 32-bit words (7,168 + 224 bytes for R1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense

_BLOCK = 1024


@triton.jit
def _combine_kernel(
    rows_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows_stride: int,
    shared_stride: int,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    total = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slot_ptr + token * TOP_K + k).to(tl.int64)
        weight = tl.load(weight_ptr + token * TOP_K + k)
        width = tl.where(slot >= 0, D, 0)
        row = tl.load(rows_ptr + tl.maximum(slot, 0) * rows_stride + column, mask=column < width, other=0.0)
        total += weight * row.to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared_ptr + token * shared_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(
    rows_MD: Tensor, slot_of_row_N: Tensor, weights_TK: Tensor, shared_TD: Tensor | None = None
) -> Tensor:
    """[T, D] in the dtype of `rows_MD`: weighted sum in float32, k in order; see `reference.combine`."""
    num_tokens, top_k = weights_TK.shape
    width = rows_MD.shape[1]
    assert slot_of_row_N.numel() == num_tokens * top_k, "a slot for each of the T · K rows"
    assert slot_of_row_N.is_contiguous()
    assert weights_TK.is_contiguous()
    assert weights_TK.dtype == torch.float32
    assert rows_dense(rows_MD)
    assert shared_TD is None or (shared_TD.shape == (num_tokens, width) and rows_dense(shared_TD))
    shared = rows_MD if shared_TD is None else shared_TD
    out_TD = torch.empty(num_tokens, width, dtype=rows_MD.dtype, device=rows_MD.device)
    if num_tokens:
        _combine_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
            rows_MD,
            slot_of_row_N,
            weights_TK,
            shared,
            out_TD,
            rows_MD.stride(0),
            shared.stride(0),
            D=width,
            TOP_K=top_k,
            HAS_SHARED=shared_TD is not None,
            BLOCK_D=_BLOCK,
            num_warps=4,
        )
    return out_TD


@triton.jit
def _copy_rows_kernel(
    index_ptr: tl.tensor,
    from_ptr: tl.tensor,
    from_tail_ptr: tl.tensor,
    to_ptr: tl.tensor,
    to_tail_ptr: tl.tensor,
    from_stride: int,
    from_tail_stride: int,
    ROWS_PER_SOURCE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TO_STRIDE: tl.constexpr,
    TO_TAIL_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copies HEAD and TAIL words of each row from the indexed row; zeros where the index is -1."""
    out_row = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr + out_row).to(tl.int64)
    source = tl.maximum(index, 0) // ROWS_PER_SOURCE
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(
        from_ptr + source * from_stride + word, mask=word < tl.where(index >= 0, HEAD, 0), other=0
    )
    tl.store(to_ptr + out_row * TO_STRIDE + word, words, mask=word < HEAD)
    if TAIL > 0:
        at = word - HEAD
        inside = (at >= 0) & (at < tl.where(index >= 0, TAIL, 0))
        words = tl.load(from_tail_ptr + source * from_tail_stride + at, mask=inside, other=0)
        tl.store(to_tail_ptr + out_row * TO_TAIL_STRIDE + at, words, mask=(at >= 0) & (at < TAIL))


def _copy(index: Tensor, sources: list[Tensor], targets: list[Tensor], rows_per_source: int) -> None:
    """`sources` and `targets` are int32 views of one or two pieces, of the same widths."""
    assert index.is_contiguous()
    assert all(x.stride(1) == 1 and x.dtype == torch.int32 for x in (*sources, *targets))
    assert [x.shape[1] for x in sources] == [x.shape[1] for x in targets]
    head, tail = sources[0].shape[1], sources[1].shape[1] if len(sources) > 1 else 0
    if index.numel():
        _copy_rows_kernel[(index.numel(), triton.cdiv(head + tail, _BLOCK))](
            index,
            sources[0],
            sources[-1],
            targets[0],
            targets[-1],
            sources[0].stride(0),
            sources[-1].stride(0),
            ROWS_PER_SOURCE=rows_per_source,
            HEAD=head,
            TAIL=tail,
            TO_STRIDE=targets[0].stride(0),
            TO_TAIL_STRIDE=targets[-1].stride(0),
            BLOCK=_BLOCK,
            num_warps=4,
        )


def pack_rows(q_TD: Tensor, scale_TG: Tensor, row_of_slot_M: Tensor, top_k: int) -> Tensor:
    """int32 [M, D/4 + G]: in slot m, token `row_of_slot[m] // top_k`'s row and scales; zeros for -1."""
    width, groups = q_TD.shape[1], scale_TG.shape[1]
    assert q_TD.element_size() == 1
    assert width % 4 == 0
    assert scale_TG.dtype == torch.float32
    words = width // 4
    message = torch.empty(row_of_slot_M.numel(), words + groups, dtype=torch.int32, device=q_TD.device)
    sources = [q_TD.view(torch.int32), scale_TG.view(torch.int32)]
    _copy(row_of_slot_M, sources, [message[:, :words], message[:, words:]], top_k)
    return message


def unpack_rows(
    message_NW: Tensor, row_of_slot_M: Tensor, width: int, fp8_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`(q_MD, scale_MG)`: slot m takes message row `row_of_slot[m]`; zeros for -1."""
    words = width // 4
    num_slots, device = row_of_slot_M.numel(), message_NW.device
    q = torch.empty(num_slots, width, dtype=fp8_dtype, device=device)
    scale = torch.empty(num_slots, message_NW.shape[1] - words, dtype=torch.float32, device=device)
    sources = [message_NW[:, :words], message_NW[:, words:]]
    _copy(row_of_slot_M, sources, [q.view(torch.int32), scale.view(torch.int32)], 1)
    return q, scale


def spread_rows(q_TD: Tensor, scale_TG: Tensor, row_of_slot_M: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`(q_MD, scale_MG)`: slot m takes token `row_of_slot[m] // top_k`; zeros for -1. What `pack_rows` and
    `unpack_rows` do together, for experts that are in this process."""
    num_slots, device = row_of_slot_M.numel(), q_TD.device
    q = torch.empty(num_slots, q_TD.shape[1], dtype=q_TD.dtype, device=device)
    scale = torch.empty(num_slots, scale_TG.shape[1], dtype=torch.float32, device=device)
    sources = [q_TD.view(torch.int32), scale_TG.view(torch.int32)]
    _copy(row_of_slot_M, sources, [q.view(torch.int32), scale.view(torch.int32)], top_k)
    return q, scale


def gather_rows(rows_MD: Tensor, slot_of_row_N: Tensor) -> Tensor:
    """[N, D]: row n is `rows_MD[slot_of_row[n]]`, zeros for -1; rows are whole 32-bit words."""
    out_ND = torch.empty(slot_of_row_N.numel(), rows_MD.shape[1], dtype=rows_MD.dtype, device=rows_MD.device)
    _copy(slot_of_row_N, [rows_MD.view(torch.int32)], [out_ND.view(torch.int32)], 1)
    return out_ND
