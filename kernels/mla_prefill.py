"""Expanded multi-head latent attention for prefill: 192-wide keys, 128-wide values, sequences of any lengths.

A key is 128 dims of its own head and 64 rotated dims shared by all heads, taken apart so that nobody has to
copy them together. A sequence's queries are the last of its keys' positions: what comes before is its
cached prefix.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense
from kernels.tuned import autotune

CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in [
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 32, 4, 1),
    ]
]


@triton.jit
def _attend_block(
    total: tl.tensor,
    largest: tl.tensor,
    weights: tl.tensor,
    q_nope: tl.tensor,
    q_rope: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    num_keys: tl.tensor,
    k_nope_at: tl.tensor,
    k_rope_at: tl.tensor,
    v_at: tl.tensor,
    k_nope_stride: tl.tensor,
    k_rope_stride: tl.tensor,
    v_stride: tl.tensor,
    scale_log2: tl.tensor,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    key = first + tl.arange(0, BLOCK_N)
    row = key.to(tl.int64)
    k_nope_at = k_nope_at + row[None, :] * k_nope_stride + tl.arange(0, NOPE)[:, None]
    k_rope_at = k_rope_at + row[None, :] * k_rope_stride + tl.arange(0, ROPE)[:, None]
    v_at = v_at + row[:, None] * v_stride + tl.arange(0, VALUE)[None, :]
    if MASKED:
        inside = key < num_keys
        k_nope = tl.load(k_nope_at, mask=inside[None, :], other=0.0)
        k_rope = tl.load(k_rope_at, mask=inside[None, :], other=0.0)
        v = tl.load(v_at, mask=inside[:, None], other=0.0)
    else:
        k_nope, k_rope, v = tl.load(k_nope_at), tl.load(k_rope_at), tl.load(v_at)
    score = tl.dot(q_rope, k_rope)
    score = tl.dot(q_nope, k_nope, score) * scale_log2
    if MASKED:
        score = tl.where(key[None, :] <= position[:, None], score, float("-inf"))
    # Every row sees key 0, so the maximum is finite from the first block on.
    larger = tl.maximum(largest, tl.max(score, 1))
    probability = tl.exp2(score - larger[:, None])
    decay = tl.exp2(largest - larger)
    weights = weights * decay + tl.sum(probability, 1)
    total = tl.dot(probability.to(v.dtype), v, total * decay[:, None])
    return total, larger, weights


@autotune(CONFIGS, key=["num_heads", "length_bucket"], interpreted=-1)
@triton.jit
def mla_prefill_kernel(
    q_nope_ptr: tl.tensor,
    q_rope_ptr: tl.tensor,
    k_nope_ptr: tl.tensor,
    k_rope_ptr: tl.tensor,
    v_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    key_start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_log2: float,
    num_heads: int,
    length_bucket: int,
    q_nope_stride_t: int,
    q_nope_stride_h: int,
    q_rope_stride_t: int,
    q_rope_stride_h: int,
    k_nope_stride_l: int,
    k_nope_stride_h: int,
    k_rope_stride: int,
    v_stride_l: int,
    v_stride_h: int,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A block of queries of head `program_id(1)` of sequence `program_id(2)`, the longest first."""
    sequence, head = tl.program_id(2), tl.program_id(1)
    query_begin = tl.load(query_start_ptr + sequence)
    num_queries = tl.load(query_start_ptr + sequence + 1) - query_begin
    key_begin = tl.load(key_start_ptr + sequence).to(tl.int64)
    num_keys = (tl.load(key_start_ptr + sequence + 1) - key_begin).to(tl.int32)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if block * BLOCK_M >= num_queries:
        return
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    used = query < num_queries
    prefix = num_keys - num_queries
    position = prefix + query
    token = (query_begin + query).to(tl.int64)
    q_at = q_nope_ptr + token * q_nope_stride_t + head * q_nope_stride_h
    q_nope = tl.load(q_at[:, None] + tl.arange(0, NOPE)[None, :], mask=used[:, None], other=0.0)
    q_at = q_rope_ptr + token * q_rope_stride_t + head * q_rope_stride_h
    q_rope = tl.load(q_at[:, None] + tl.arange(0, ROPE)[None, :], mask=used[:, None], other=0.0)
    k_nope_at = k_nope_ptr + key_begin * k_nope_stride_l + head * k_nope_stride_h
    k_rope_at = k_rope_ptr + key_begin * k_rope_stride
    v_at = v_ptr + key_begin * v_stride_l + head * v_stride_h

    total = tl.zeros([BLOCK_M, VALUE], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    whole = (prefix + block * BLOCK_M + 1) // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        total, largest, weights = _attend_block(
            total, largest, weights, q_nope, q_rope, position, first, num_keys, k_nope_at, k_rope_at, v_at,
            k_nope_stride_l, k_rope_stride, v_stride_l, scale_log2, NOPE, ROPE, VALUE, False, BLOCK_N,
        )  # fmt: skip
    for first in range(whole, tl.minimum(prefix + (block + 1) * BLOCK_M, num_keys), BLOCK_N):
        total, largest, weights = _attend_block(
            total, largest, weights, q_nope, q_rope, position, first, num_keys, k_nope_at, k_rope_at, v_at,
            k_nope_stride_l, k_rope_stride, v_stride_l, scale_log2, NOPE, ROPE, VALUE, True, BLOCK_N,
        )  # fmt: skip
    out_at = out_ptr + (token * num_heads + head)[:, None] * VALUE + tl.arange(0, VALUE)[None, :]
    tl.store(out_at, (total / weights[:, None]).to(out_ptr.dtype.element_ty), mask=used[:, None])


def mla_prefill(
    q_nope_THD: Tensor,
    q_rope_THR: Tensor,
    k_nope_LHD: Tensor,
    k_rope_LR: Tensor,
    v_LHE: Tensor,
    query_start_S1: Tensor,
    key_start_S1: Tensor,
    scale: float,
    *,
    max_query_len: int,
    deterministic: bool = False,
) -> Tensor:
    """[T, H, value width] in the queries' dtype; see `reference.mla_prefill`, whose arguments these are.

    Operands may be views, such as the halves of one projection, with contiguous last dimensions. For
    `deterministic`, blocks have one shape, so that a query's output does not depend on the batch; that equals
    decode's bit by bit only in the absorbed form, `mla_decode`.
    """
    num_tokens, num_heads, nope = q_nope_THD.shape
    num_keys, rope, value = k_nope_LHD.shape[0], q_rope_THR.shape[2], v_LHE.shape[2]
    assert q_rope_THR.shape[:2] == (num_tokens, num_heads)
    assert k_nope_LHD.shape == (num_keys, num_heads, nope), f"keys are {tuple(k_nope_LHD.shape)}"
    assert k_rope_LR.shape == (num_keys, rope), f"rotated keys are {tuple(k_rope_LR.shape)}"
    assert v_LHE.shape[:2] == (num_keys, num_heads), f"values are {tuple(v_LHE.shape)}"
    assert all(rows_dense(x) for x in (q_nope_THD, q_rope_THR, k_nope_LHD, k_rope_LR, v_LHE))
    assert len({x.dtype for x in (q_nope_THD, q_rope_THR, k_nope_LHD, k_rope_LR, v_LHE)}) == 1
    assert all(n & (n - 1) == 0 and n >= 16 for n in (nope, rope, value)), f"widths {nope}, {rope}, {value}"
    assert query_start_S1.shape == key_start_S1.shape
    assert query_start_S1.dtype == key_start_S1.dtype == torch.int32
    out_THE = torch.empty(num_tokens, num_heads, value, dtype=q_nope_THD.dtype, device=q_nope_THD.device)
    if num_tokens == 0:
        return out_THE

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(max_query_len, meta["BLOCK_M"]), num_heads, query_start_S1.numel() - 1

    kernel, fixed = mla_prefill_kernel, {}
    if deterministic:
        kernel, fixed = mla_prefill_kernel.fn, CONFIGS[0].all_kwargs()
    kernel[grid](
        q_nope_THD,
        q_rope_THR,
        k_nope_LHD,
        k_rope_LR,
        v_LHE,
        query_start_S1,
        key_start_S1,
        out_THE,
        scale * math.log2(math.e),
        num_heads,
        triton.next_power_of_2(max_query_len),
        *q_nope_THD.stride()[:2],
        *q_rope_THR.stride()[:2],
        *k_nope_LHD.stride()[:2],
        k_rope_LR.stride(0),
        *v_LHE.stride()[:2],
        NOPE=nope,
        ROPE=rope,
        VALUE=value,
        **fixed,
    )
    return out_THE
