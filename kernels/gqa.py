"""Grouped-query attention over paged keys and values, for the dense models: prefill and decode in one kernel.

A program takes one key head and a block of (query, head of its group) rows: in decode the group's heads
fill the rows, in prefill the queries do. Decode splits the context and merges; prefill, with rows enough,
does not. The cache is of the queries' dtype, or FP8 with a float32 scale for every key and every value of a
head: the former multiplies a column of scores, the latter one of probabilities.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_merge import check_paging, choose_split, merge_splits
from kernels.launch import num_processors, rows_dense
from kernels.mla_cache import within_fp8
from kernels.mla_decode import fitting
from kernels.rope import rotate
from kernels.tuned import autotune

DETERMINISTIC_SPLIT = 512
_LEAST_SPLIT = 256

CONFIGS = [
    triton.Config({"BLOCK_ROWS": rows, "BLOCK_N": tokens}, num_warps=warps, num_stages=stages)
    for rows, tokens, warps, stages in [
        (64, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (64, 32, 4, 3),
        (32, 64, 4, 3),
        (16, 64, 4, 3),
        (16, 64, 2, 4),
        (16, 32, 4, 3),
        (16, 16, 4, 2),
    ]
]


@triton.jit
def _attend_block(
    total: tl.tensor,
    largest: tl.tensor,
    weights: tl.tensor,
    q: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    context_len: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    table_at: tl.tensor,
    head: tl.tensor,
    entry: tl.tensor,
    scale_entry: tl.tensor,
    scale_log2: tl.tensor,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    # BLOCK_N divides a page and splits start on a block, so a block lies in one page.
    page = tl.load(table_at + first // PAGE)
    slot = page.to(tl.int64) * PAGE + first % PAGE
    block = slot * entry + head * D
    within = tl.arange(0, BLOCK_N)
    key = first + within
    at = within[:, None] * entry + tl.arange(0, D)[None, :]
    if MASKED:
        # Slots past the context hold anything, NaN included, and 0 · NaN would reach the sum.
        k = tl.load(k_ptr + block + at, mask=(key < context_len)[:, None], other=0.0)
        v = tl.load(v_ptr + block + at, mask=(key < context_len)[:, None], other=0.0)
    else:
        k, v = tl.load(k_ptr + block + at), tl.load(v_ptr + block + at)
    k, v = k.to(q.dtype), v.to(q.dtype)
    score = tl.dot(q, tl.trans(k)) * scale_log2
    if SCALED:
        scale_at = slot * scale_entry + head
        filled = key < context_len
        score *= tl.load(k_scale_ptr + scale_at + within * scale_entry, mask=filled, other=0.0)[None, :]
    if MASKED:
        score = tl.where(key[None, :] <= position[:, None], score, float("-inf"))
    larger = tl.maximum(largest, tl.max(score, 1))
    # A row that has seen nothing yet has no finite maximum to subtract.
    base = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger
    probability = tl.exp2(score - base[:, None])
    decay = tl.exp2(largest - base)
    weights = weights * decay + tl.sum(probability, 1)
    if SCALED:
        probability *= tl.load(v_scale_ptr + scale_at + within * scale_entry, mask=filled, other=0.0)[None, :]
    total = tl.dot(probability.to(v.dtype), v, total * decay[:, None])
    return total, larger, weights


@autotune(CONFIGS, key=["rows_bucket", "num_heads", "split_tokens"], fitting=fitting, interpreted=-1)
@triton.jit
def paged_attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    context_len_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale_log2: float,
    num_rows: int,
    rows_bucket: int,
    num_heads: int,
    num_key_heads: int,
    split_tokens: int,
    table_stride: int,
    entry: int,
    scale_entry: int,
    q_stride_t: int,
    q_stride_h: int,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Rows of one key head in split `program_id(1)` of sequence `program_id(2)`: output and log sum."""
    sequence = tl.program_id(2)
    head = tl.program_id(0) % num_key_heads
    first_row = tl.program_id(0) // num_key_heads * BLOCK_ROWS
    share = num_heads // num_key_heads
    context_len = tl.load(context_len_ptr + sequence)
    begin = tl.program_id(1) * split_tokens
    query_begin = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - query_begin
    if (begin >= context_len) | (first_row >= query_len * share):
        return
    row = first_row + tl.arange(0, BLOCK_ROWS)
    used = row < query_len * share
    query = row // share
    position = tl.where(used, context_len - query_len + query, -1)
    token = (query_begin + query).to(tl.int64)
    q_head = head * share + row % share
    column = tl.arange(0, D)[None, :]
    q_at = q_ptr + token * q_stride_t + q_head * q_stride_h
    q = tl.load(q_at[:, None] + column, mask=used[:, None], other=0.0)
    total = tl.zeros([BLOCK_ROWS, D], tl.float32)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK_ROWS], tl.float32)
    table_at = page_table_ptr + sequence * table_stride
    # What every row sees, in whole blocks, needs no masks; the rest, up to what the last row sees, does.
    visible = context_len - query_len + 1
    split_end = tl.minimum(begin + split_tokens, context_len)
    whole = tl.maximum(tl.minimum(split_end, visible + first_row // share) - begin, 0) // BLOCK_N * BLOCK_N
    for first in range(begin, begin + whole, BLOCK_N):
        total, largest, weights = _attend_block(
            total, largest, weights, q, position, first, context_len, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
            table_at, head, entry, scale_entry, scale_log2, D, PAGE, SCALED, False, BLOCK_N,
        )  # fmt: skip
    seen_by_last = visible + (first_row + BLOCK_ROWS - 1) // share
    for first in range(begin + whole, tl.minimum(split_end, seen_by_last), BLOCK_N):
        total, largest, weights = _attend_block(
            total, largest, weights, q, position, first, context_len, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
            table_at, head, entry, scale_entry, scale_log2, D, PAGE, SCALED, True, BLOCK_N,
        )  # fmt: skip
    seen = weights > 0
    total = total / tl.where(seen, weights, 1.0)[:, None]
    lse = tl.where(seen, largest + tl.log2(tl.where(seen, weights, 1.0)), float("-inf"))
    out_row = tl.program_id(1).to(tl.int64) * num_rows + token * num_heads + q_head
    tl.store(out_ptr + out_row[:, None] * D + column, total.to(out_ptr.dtype.element_ty), mask=used[:, None])
    tl.store(lse_ptr + out_row, lse, mask=used)


def paged_attention(
    q_THD: Tensor,
    k_cache_PSHD: Tensor,
    v_cache_PSHD: Tensor,
    page_table_SP: Tensor,
    context_len_S: Tensor,
    query_start_S1: Tensor,
    scale: float,
    kv_scale_PSH: Sequence[Tensor] | None = None,
    *,
    max_query_len: int,
    max_context_len: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """[T, H, D] in the queries' dtype; caches [pages, page_size, key heads, D], of which slots may lie apart;
    see `reference`.

    Caches are of the queries' dtype, or FP8 with float32 scales of keys and of values [pages, page_size, key
    heads]. New keys are in the cache already. `deterministic` fixes blocks and splits, as in `mla_decode`.
    """
    num_tokens, num_heads, width = q_THD.shape
    page_size, num_key_heads = k_cache_PSHD.shape[1:3]
    assert rows_dense(q_THD)
    assert width & (width - 1) == 0, f"heads of {width}: not a power of two"
    assert k_cache_PSHD.shape == v_cache_PSHD.shape, "caches differ in shape"
    assert k_cache_PSHD.shape[3] == width, f"cached heads of {k_cache_PSHD.shape[3]}"
    assert kv_scale_PSH is not None or k_cache_PSHD.dtype == q_THD.dtype, "a cache of another dtype"
    assert num_heads % num_key_heads == 0, f"{num_heads} heads on {num_key_heads} key heads"
    assert page_size % 16 == 0, f"pages of {page_size} tokens: not a multiple of 16"
    check_paging(page_table_SP, context_len_S, query_start_S1)
    entry = _slot_stride(k_cache_PSHD, v_cache_PSHD)
    scales, scale_entry = _scales(kv_scale_PSH, k_cache_PSHD, v_cache_PSHD)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if num_tokens == 0:
        return out_THD
    num_sequences, max_rows = context_len_S.numel(), max_query_len * (num_heads // num_key_heads)
    reach = page_table_SP.shape[1] * page_size
    longest = min(max_context_len or reach, reach)
    granule = math.lcm(64, page_size)
    programs = num_sequences * num_key_heads * triton.cdiv(max_rows, 64)
    split = choose_split(longest, programs, num_processors(out_THD.device), granule, _LEAST_SPLIT)
    if deterministic:
        split = triton.cdiv(DETERMINISTIC_SPLIT, granule) * granule
    splits = triton.cdiv(longest, split)
    shape = (splits, num_tokens * num_heads)
    part = out_THD
    if splits > 1:
        part = torch.empty(*shape, width, dtype=torch.float32, device=out_THD.device)
    lse = torch.empty(shape, dtype=torch.float32, device=out_THD.device)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(max_rows, meta["BLOCK_ROWS"]) * num_key_heads, splits, num_sequences

    kernel, fixed = paged_attention_kernel, {}
    if deterministic:
        chosen = next(c for c in CONFIGS if page_size % c.kwargs["BLOCK_N"] == 0)
        kernel, fixed = paged_attention_kernel.fn, chosen.all_kwargs()
    kernel[grid](
        q_THD,
        k_cache_PSHD,
        v_cache_PSHD,
        *scales,
        page_table_SP,
        context_len_S,
        query_start_S1,
        part,
        lse,
        scale * math.log2(math.e),
        shape[1],
        triton.next_power_of_2(max_rows),
        num_heads,
        num_key_heads,
        split,
        page_table_SP.stride(0),
        entry,
        scale_entry,
        *q_THD.stride()[:2],
        D=width,
        PAGE=page_size,
        SCALED=kv_scale_PSH is not None,
        **fixed,
    )
    if splits > 1:
        merge_splits(part, lse, context_len_S, query_start_S1, out_THD, split, max_query_len)
    return out_THD


def _slot_stride(*caches_PSHD: Tensor) -> int:
    """Elements from one slot to the next: in both caches the same, over the ends of pages as well; within a
    slot heads are dense."""
    strides = {cache.stride() for cache in caches_PSHD}
    assert len(strides) == 1, "caches lie differently"
    page, slot, head, element = strides.pop()
    page_size, num_heads, width = caches_PSHD[0].shape[1:]
    assert (page, head, element) == (page_size * slot, width, 1), "slots lie one after the other"
    assert slot >= num_heads * width
    return slot


def _scales(kv_scale_PSH: Sequence[Tensor] | None, *caches_PSHD: Tensor) -> tuple[Sequence[Tensor], int]:
    """Scales of keys and of values, and elements from one slot's to the next's; the caches themselves, which
    nobody then reads as scales, where there are none."""
    fp8 = {cache.element_size() == 1 for cache in caches_PSHD}
    assert fp8 == {kv_scale_PSH is not None}, "an FP8 cache, and no other, has scales"
    if kv_scale_PSH is None:
        return caches_PSHD, 0
    assert all(scale.dtype == torch.float32 for scale in kv_scale_PSH)
    assert [scale.shape for scale in kv_scale_PSH] == [cache.shape[:3] for cache in caches_PSHD]
    return kv_scale_PSH, _slot_stride(*(scale.unsqueeze(3) for scale in kv_scale_PSH))


@triton.jit
def _store_halves(
    low: tl.tensor,
    high: tl.tensor,
    cache_at: tl.tensor,
    scale_at: tl.tensor,
    head: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SCALED: tl.constexpr,
    FP8_MAX: tl.constexpr,
) -> None:
    """Writes every head's two halves [BLOCK_H, HALF] of a slot, and their scales."""
    if SCALED:
        largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        scale = tl.maximum(largest, 1e-12) / FP8_MAX
        tl.store(scale_at + head, scale, mask=head < NUM_HEADS)
        low = within_fp8(low / scale[:, None], FP8_MAX)
        high = within_fp8(high / scale[:, None], FP8_MAX)
    inside = (head < NUM_HEADS)[:, None]
    tl.store(cache_at, low.to(cache_at.dtype.element_ty), mask=inside)
    tl.store(cache_at + HALF, high.to(cache_at.dtype.element_ty), mask=inside)


@triton.jit
def write_kv_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    position_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    k_stride: int,
    v_stride: int,
    entry: int,
    scale_entry: int,
    D: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCALED: tl.constexpr,
    FP8_MAX: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot < 0:
        return
    half: tl.constexpr = D // 2
    pair = tl.arange(0, half)
    head = tl.arange(0, BLOCK_H)
    inside = (head < NUM_HEADS)[:, None]
    angle = tl.load(position_ptr + token).to(tl.int64) * half + pair
    cos = tl.load(cos_ptr + angle).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle).to(tl.float32)[None, :]
    at = head[:, None] * D + pair[None, :]
    low = tl.load(k_ptr + token * k_stride + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(k_ptr + token * k_stride + at + half, mask=inside, other=0.0).to(tl.float32)
    turned_low, turned_high = rotate(low, high, cos, sin)
    to, scale_to = slot * entry + at, slot * scale_entry
    _store_halves(
        turned_low,
        turned_high,
        k_cache_ptr + to,
        k_scale_ptr + scale_to,
        head,
        NUM_HEADS,
        half,
        SCALED,
        FP8_MAX,
    )
    low = tl.load(v_ptr + token * v_stride + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(v_ptr + token * v_stride + at + half, mask=inside, other=0.0).to(tl.float32)
    _store_halves(low, high, v_cache_ptr + to, v_scale_ptr + scale_to, head, NUM_HEADS, half, SCALED, FP8_MAX)


def write_kv(
    k_THD: Tensor,
    v_THD: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    k_cache_PSHD: Tensor,
    v_cache_PSHD: Tensor,
    kv_scale_PSH: Sequence[Tensor] | None = None,
) -> None:
    """Rotates keys [T, H, D] by halves and writes keys and values to their slots (page · page_size + offset).

    A slot of -1 writes nothing; tables are [positions, D/2]. Into FP8 caches every head's key and value is
    scaled by itself, by `kv_scale_PSH` as in `paged_attention`. See `reference.rope`.
    """
    num_tokens, num_heads, width = k_THD.shape
    assert v_THD.shape == k_THD.shape
    assert all(x.stride(2) == 1 and x.stride(1) == width for x in (k_THD, v_THD)), "a token's heads are dense"
    assert k_cache_PSHD.shape == v_cache_PSHD.shape
    assert k_cache_PSHD.shape[2:] == (num_heads, width)
    assert width & (width - 1) == 0, f"heads of {width}: not a power of two"
    assert cos_PR.shape == sin_PR.shape
    assert cos_PR.shape[1] == width // 2
    entry = _slot_stride(k_cache_PSHD, v_cache_PSHD)
    scales, scale_entry = _scales(kv_scale_PSH, k_cache_PSHD, v_cache_PSHD)
    scaled = kv_scale_PSH is not None
    dense = (cos_PR, sin_PR, positions_T, slots_T)
    assert all(x.is_contiguous() for x in dense)
    assert positions_T.shape == slots_T.shape == (num_tokens,)
    if num_tokens:
        write_kv_kernel[(num_tokens,)](
            k_THD,
            v_THD,
            cos_PR,
            sin_PR,
            positions_T,
            slots_T,
            k_cache_PSHD,
            v_cache_PSHD,
            *scales,
            k_THD.stride(0),
            v_THD.stride(0),
            entry,
            scale_entry,
            D=width,
            NUM_HEADS=num_heads,
            BLOCK_H=triton.next_power_of_2(num_heads),
            SCALED=scaled,
            FP8_MAX=torch.finfo(k_cache_PSHD.dtype).max if scaled else 1.0,
            num_warps=4,
        )
