"""Absorbed multi-head latent attention over paged latents: decode, and batch-invariant prefill.

All heads of a sequence read one 576-wide latent a token (DeepSeek-V2 report, section 2.1.2), so a program
takes a block of (query, head) rows and walks one split of the context, page by page; a second kernel merges
the splits. The cache is BF16, or FP8 with two float32 scales a token beside it, one for the latent and one
for the rotated key: a scale then multiplies a column of scores, or of probabilities, and no element is
rescaled on its own.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_merge import check_paging, choose_split, merge_splits
from kernels.launch import num_processors, rows_dense
from kernels.tuned import autotune

DETERMINISTIC_SPLIT = 512
_LEAST_SPLIT = 256

CONFIGS = [
    triton.Config({"BLOCK_ROWS": rows, "BLOCK_N": tokens}, num_warps=warps, num_stages=stages)
    for rows, tokens, warps, stages in [
        (64, 32, 8, 2),
        (64, 64, 8, 2),
        (64, 32, 8, 3),
        (32, 64, 8, 2),
        (32, 32, 4, 2),
        (16, 64, 4, 2),
        (16, 32, 4, 2),
        (16, 32, 4, 3),
        (16, 16, 4, 1),
    ]
]


def fitting(
    configs: list[triton.Config], arguments: dict[str, object], **given: object
) -> list[triton.Config]:
    """Blocks of tokens that divide a page, and of rows that are not mostly empty."""
    page, rows = given["PAGE"], arguments["rows_bucket"]
    assert isinstance(page, int)
    assert isinstance(rows, int)
    most = max(rows, 16)
    kept = [c for c in configs if page % c.kwargs["BLOCK_N"] == 0 and c.kwargs["BLOCK_ROWS"] <= most]
    return kept or configs[-1:]


@triton.jit
def _attend_block(
    total: tl.tensor,
    largest: tl.tensor,
    weights: tl.tensor,
    q_latent: tl.tensor,
    q_rope: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    context_len: tl.tensor,
    cache_ptr: tl.tensor,
    cache_scale_ptr: tl.tensor,
    table_at: tl.tensor,
    scale_log2: tl.tensor,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One block of keys: the running sum of values, the running maximum and the running sum of weights."""
    # BLOCK_N divides a page and splits start on a block, so a block lies in one page.
    page = tl.load(table_at + first // PAGE)
    # A real cache exceeds 2^31 elements (3.7 million tokens of 576): the block's start is 64 bits wide.
    # What is within the block is not, which spares the registers of a wide pointer per element.
    slot = page.to(tl.int64) * PAGE + first % PAGE
    block_at = cache_ptr + slot * (C + R)
    within = tl.arange(0, BLOCK_N)
    key = first + within
    latent_at = within[:, None] * (C + R) + tl.arange(0, C)[None, :]
    rope_at = within[:, None] * (C + R) + C + tl.arange(0, R)[None, :]
    if MASKED:
        # Slots past the context hold anything, NaN included, and 0 · NaN would reach the sum.
        filled = (key < context_len)[:, None]
        k_latent = tl.load(block_at + latent_at, mask=filled, other=0.0).to(q_latent.dtype)
        k_rope = tl.load(block_at + rope_at, mask=filled, other=0.0).to(q_latent.dtype)
    else:
        k_latent = tl.load(block_at + latent_at).to(q_latent.dtype)
        k_rope = tl.load(block_at + rope_at).to(q_latent.dtype)
    if SCALED:
        scale_at = cache_scale_ptr + slot * 2
        latent_scale = tl.load(scale_at + within * 2, mask=key < context_len, other=0.0)
        rope_scale = tl.load(scale_at + (within * 2 + 1), mask=key < context_len, other=0.0)
        score = tl.dot(q_latent, tl.trans(k_latent)) * latent_scale[None, :]
        score += tl.dot(q_rope, tl.trans(k_rope)) * rope_scale[None, :]
    else:
        score = tl.dot(q_rope, tl.trans(k_rope))
        score = tl.dot(q_latent, tl.trans(k_latent), score)
    score *= scale_log2
    if MASKED:
        score = tl.where(key[None, :] <= position[:, None], score, float("-inf"))
    larger = tl.maximum(largest, tl.max(score, 1))
    # A row that has seen nothing yet has no finite maximum to subtract.
    base = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger
    probability = tl.exp2(score - base[:, None])
    decay = tl.exp2(largest - base)
    weights = weights * decay + tl.sum(probability, 1)
    if SCALED:
        probability *= latent_scale[None, :]
    total = tl.dot(probability.to(k_latent.dtype), k_latent, total * decay[:, None])
    return total, larger, weights


@autotune(CONFIGS, key=["rows_bucket", "num_heads", "split_tokens"], fitting=fitting, interpreted=-1)
@triton.jit
def mla_decode_kernel(
    q_latent_ptr: tl.tensor,
    q_rope_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    cache_scale_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    context_len_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale_log2: float,
    num_rows: int,
    rows_bucket: int,
    num_heads: int,
    split_tokens: int,
    table_stride: int,
    latent_stride_t: int,
    latent_stride_h: int,
    rope_stride_t: int,
    rope_stride_h: int,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Rows `program_id(0)` in split `program_id(1)` of sequence `program_id(2)`: output and log sum."""
    sequence = tl.program_id(2)
    context_len = tl.load(context_len_ptr + sequence)
    begin = tl.program_id(1) * split_tokens
    query_begin = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - query_begin
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if (begin >= context_len) | (tl.program_id(0) * BLOCK_ROWS >= query_len * num_heads):
        return
    used = row < query_len * num_heads
    query, head = row // num_heads, row % num_heads
    position = tl.where(used, context_len - query_len + query, -1)
    token = (query_begin + query).to(tl.int64)
    latent, rotated = tl.arange(0, C), tl.arange(0, R)
    q_at = q_latent_ptr + token * latent_stride_t + head * latent_stride_h
    q_latent = tl.load(q_at[:, None] + latent[None, :], mask=used[:, None], other=0.0)
    q_at = q_rope_ptr + token * rope_stride_t + head * rope_stride_h
    q_rope = tl.load(q_at[:, None] + rotated[None, :], mask=used[:, None], other=0.0)

    total = tl.zeros([BLOCK_ROWS, C], tl.float32)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK_ROWS], tl.float32)
    table_at = page_table_ptr + sequence * table_stride
    # What every row sees, in whole blocks, needs no masks; the rest, up to what the last row sees, does.
    visible = context_len - query_len + 1
    seen_by_all = visible + tl.program_id(0) * BLOCK_ROWS // num_heads
    seen_by_last = visible + (tl.program_id(0) * BLOCK_ROWS + BLOCK_ROWS - 1) // num_heads
    split_end = tl.minimum(begin + split_tokens, context_len)
    whole = tl.maximum(tl.minimum(split_end, seen_by_all) - begin, 0) // BLOCK_N * BLOCK_N
    for first in range(begin, begin + whole, BLOCK_N):
        total, largest, weights = _attend_block(
            total, largest, weights, q_latent, q_rope, position, first, context_len, cache_ptr,
            cache_scale_ptr, table_at, scale_log2, C, R, PAGE, SCALED, False, BLOCK_N,
        )  # fmt: skip
    for first in range(begin + whole, tl.minimum(split_end, seen_by_last), BLOCK_N):
        total, largest, weights = _attend_block(
            total, largest, weights, q_latent, q_rope, position, first, context_len, cache_ptr,
            cache_scale_ptr, table_at, scale_log2, C, R, PAGE, SCALED, True, BLOCK_N,
        )  # fmt: skip
    seen = weights > 0
    total = total / tl.where(seen, weights, 1.0)[:, None]
    lse = tl.where(seen, largest + tl.log2(tl.where(seen, weights, 1.0)), float("-inf"))
    out_row = tl.program_id(1).to(tl.int64) * num_rows + query_begin.to(tl.int64) * num_heads
    out_row += tl.program_id(0) * BLOCK_ROWS
    block_row = tl.arange(0, BLOCK_ROWS)
    out_at = out_ptr + out_row * C + (block_row[:, None] * C + latent[None, :])
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=used[:, None])
    tl.store(lse_ptr + out_row + block_row, lse, mask=used)


def mla_decode(
    q_latent_THC: Tensor,
    q_rope_THR: Tensor,
    latent_cache_PSC: Tensor,
    page_table_SP: Tensor,
    context_len_S: Tensor,
    query_start_S1: Tensor,
    scale: float,
    latent_scale_PS2: Tensor | None = None,
    *,
    max_query_len: int,
    max_context_len: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """[T, H, C] in the queries' dtype; see `reference.mla_decode`, whose arguments these are.

    `latent_cache_PSC` is [pages, page_size, C + R], of the queries' dtype, or FP8 with `latent_scale_PS2`
    [pages, page_size, 2]. Any number of heads, so any tensor-parallel share. `max_context_len` (the page
    table's reach if not given) sizes the splits; `deterministic` fixes them and the blocks, so that a
    query's output is the same in any batch, and the same whether it came alone or with the queries before
    it.
    """
    num_tokens, num_heads, num_latent = q_latent_THC.shape
    num_rotated = q_rope_THR.shape[2]
    page_size = latent_cache_PSC.shape[1]
    _check(q_latent_THC, q_rope_THR, latent_cache_PSC, latent_scale_PS2)
    check_paging(page_table_SP, context_len_S, query_start_S1, latent_cache_PSC)
    out_THC = torch.empty(q_latent_THC.shape, dtype=q_latent_THC.dtype, device=q_latent_THC.device)
    if num_tokens == 0:
        return out_THC
    num_sequences, max_rows = context_len_S.numel(), max_query_len * num_heads
    reach = page_table_SP.shape[1] * page_size
    longest = min(max_context_len or reach, reach)
    granule = math.lcm(64, page_size)
    programs = num_sequences * triton.cdiv(max_rows, 64)
    split = choose_split(longest, programs, num_processors(out_THC.device), granule, _LEAST_SPLIT)
    if deterministic:
        split = triton.cdiv(DETERMINISTIC_SPLIT, granule) * granule
    splits = triton.cdiv(longest, split)
    shape = (splits, num_tokens * num_heads)
    part = out_THC
    if splits > 1:
        part = torch.empty(*shape, num_latent, dtype=torch.float32, device=out_THC.device)
    lse = torch.empty(shape, dtype=torch.float32, device=out_THC.device)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(max_rows, meta["BLOCK_ROWS"]), splits, num_sequences

    kernel, fixed = mla_decode_kernel, {}
    if deterministic:
        chosen = next(c for c in CONFIGS if page_size % c.kwargs["BLOCK_N"] == 0)
        kernel, fixed = mla_decode_kernel.fn, chosen.all_kwargs()
    kernel[grid](
        q_latent_THC,
        q_rope_THR,
        latent_cache_PSC,
        latent_cache_PSC if latent_scale_PS2 is None else latent_scale_PS2,
        page_table_SP,
        context_len_S,
        query_start_S1,
        part,
        lse,
        scale * math.log2(math.e),
        shape[1],
        triton.next_power_of_2(max_rows),
        num_heads,
        split,
        page_table_SP.stride(0),
        *q_latent_THC.stride()[:2],
        *q_rope_THR.stride()[:2],
        C=num_latent,
        R=num_rotated,
        PAGE=page_size,
        SCALED=latent_scale_PS2 is not None,
        **fixed,
    )
    if splits > 1:
        merge_splits(part, lse, context_len_S, query_start_S1, out_THC, split, max_query_len)
    return out_THC


def _check(q_latent: Tensor, q_rope: Tensor, cache: Tensor, scale: Tensor | None) -> None:
    num_latent, num_rotated = q_latent.shape[2], q_rope.shape[2]
    assert q_rope.shape[:2] == q_latent.shape[:2], "queries differ in tokens or heads"
    assert q_rope.dtype == q_latent.dtype
    assert rows_dense(q_latent)
    assert rows_dense(q_rope)
    assert num_latent & (num_latent - 1) == 0, f"a latent of {num_latent}: not a power of two"
    assert num_rotated & (num_rotated - 1) == 0, f"{num_rotated} rotated dims: not a power of two"
    assert num_rotated >= 16, f"{num_rotated} rotated dims: matrix units take 16 or more"
    assert cache.shape[2] == num_latent + num_rotated, f"cache of {cache.shape[2]} wide entries"
    assert cache.shape[1] % 16 == 0, f"pages of {cache.shape[1]} tokens: not a multiple of 16"
    if scale is None:
        assert cache.dtype == q_latent.dtype, f"{cache.dtype} cache without scales"
    else:
        assert cache.element_size() == 1
        assert scale.dtype == torch.float32
        assert scale.shape == (*cache.shape[:2], 2), f"scales are {tuple(scale.shape)}"
        assert scale.is_contiguous()
