"""From logits to a token on the device: penalties, temperature, top-k, top-p, min-p, counter-based draw.

No sort. Each filter keeps the tokens whose scaled logit reaches a threshold, and a threshold is found by
bisection on the float's bits in their order: exact after at most 32 passes over a row that stays in L2.
Then one pass adds up the mass of what is kept and another finds where the draw falls, in the order of ids.
One program a row, so a row's token does not depend on its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense

_BLOCK = 4096
_PENALTY_BLOCK = 256


@triton.jit
def mix64(z: tl.tensor) -> tl.tensor:
    """Finaliser of splitmix64 (Steele, Lea and Flood, 2014) on uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """float64 strictly inside (0, 1): `reference.counter_uniform`."""
    golden: tl.constexpr = 0x9E3779B97F4A7C15
    start = mix64(seed.to(tl.uint64, bitcast=True) + golden)
    z = mix64(start + (position.to(tl.uint64, bitcast=True) + 1) * golden)
    return ((z >> 40).to(tl.float64) + 0.5) * 5.9604644775390625e-08


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """int32 keys in the order of float32 values."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scaled_block(
    row_at: tl.tensor, first: tl.tensor, V: tl.tensor, inverse: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    token = first + tl.arange(0, BLOCK)
    logits = tl.load(row_at + token, mask=token < V, other=float("-inf"))
    return token, logits.to(tl.float32) * inverse


@triton.jit
def _reaching(
    row_at: tl.tensor,
    V: tl.tensor,
    inverse: tl.tensor,
    largest: tl.tensor,
    key: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """`(count, mass)` of tokens whose key is at least `key`."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        token, x = _scaled_block(row_at, first, V, inverse, BLOCK)
        reaches = (ordered(x) >= key) & (token < V)
        count += reaches.to(tl.int32)
        mass += tl.where(reaches, tl.exp(x - largest), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _threshold(
    row_at: tl.tensor,
    V: tl.tensor,
    inverse: tl.tensor,
    largest: tl.tensor,
    wanted_count: tl.tensor,
    wanted_mass: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest key that at least so many tokens, or so much mass, reach; a want of 0 is always met."""
    low = ordered(largest * 0.0 + float("-inf")).to(tl.int64)
    high = ordered(largest).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        count, mass = _reaching(row_at, V, inverse, largest, middle.to(tl.int32), BLOCK)
        met = (count >= wanted_count) & (mass >= wanted_mass)
        low = tl.where(met, middle, low)
        high = tl.where(met, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def sample_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    out_ptr: tl.tensor,
    logits_stride: int,
    V: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    row_at = logits_ptr + row.to(tl.int64) * logits_stride
    temperature = tl.load(temperature_ptr + row)
    inverse = 1.0 / tl.where(temperature > 0, temperature, 1.0)

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    for first in range(0, V, BLOCK):
        token, x = _scaled_block(row_at, first, V, inverse, BLOCK)
        best_id = tl.where(x > best, token, best_id)
        best = tl.maximum(best, x)
    largest = tl.max(best, 0)
    greedy = tl.min(tl.where(best == largest, best_id, V), 0)
    if temperature <= 0:
        tl.store(out_ptr + row, greedy.to(tl.int64))
        return

    key = ordered(largest + tl.log(tl.load(min_p_ptr + row)))
    top_k = tl.load(top_k_ptr + row)
    if (top_k > 0) & (top_k < V):
        key = tl.maximum(key, _threshold(row_at, V, inverse, largest, top_k, 0.0, BLOCK))
    top_p = tl.load(top_p_ptr + row)
    if top_p < 1:
        _, everything = _reaching(row_at, V, inverse, largest, ordered(best * 0.0 + float("-inf")), BLOCK)
        key = tl.maximum(key, _threshold(row_at, V, inverse, largest, 0, top_p * everything, BLOCK))

    # Both passes add up each block in one and the same way, so that the draw cannot fall past the total.
    total = largest * 0.0
    last = greedy
    for first in range(0, V, BLOCK):
        token, x = _scaled_block(row_at, first, V, inverse, BLOCK)
        kept = (ordered(x) >= key) & (token < V)
        total += tl.sum(tl.where(kept, tl.exp(x - largest), 0.0), 0)
        last = tl.maximum(last, tl.max(tl.where(kept, token, 0), 0))
    target = uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row)) * total.to(tl.float64)
    before = largest * 0.0
    # Rounding within a block may leave its running sum short of its total: then its last kept token is drawn.
    drawn = last
    found = drawn < 0
    for first in range(0, V, BLOCK):
        token, x = _scaled_block(row_at, first, V, inverse, BLOCK)
        kept = (ordered(x) >= key) & (token < V)
        mass = tl.where(kept, tl.exp(x - largest), 0.0)
        after = before + tl.sum(mass, 0)
        passed = (before + tl.cumsum(mass, 0)).to(tl.float64) > target
        nearest = tl.min(tl.where(kept & passed, token, V), 0)
        block_last = tl.max(tl.where(kept, token, 0), 0)
        here = (after.to(tl.float64) > target) & (found == 0)
        drawn = tl.where(here, tl.minimum(nearest, block_last), drawn)
        found = found | here
        before = after
    tl.store(out_ptr + row, drawn.to(tl.int64))


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    seed_S: Tensor,
    position_S: Tensor,
) -> Tensor:
    """int64 [S] token ids from float32 or BF16 logits; see `reference.sample` for the arguments."""
    num_sequences, num_tokens = logits_SV.shape
    floats, integers = (temperature_S, top_p_S, min_p_S), (seed_S, position_S)
    assert rows_dense(logits_SV)
    assert all(x.dtype == torch.float32 for x in floats), "temperature, top-p and min-p are float32"
    assert all(x.dtype == torch.int64 for x in integers), "seed and position are int64"
    assert top_k_S.dtype == torch.int32, "top-k is int32"
    assert all(x.shape == (num_sequences,) for x in (*floats, *integers, top_k_S))
    assert all(x.is_contiguous() for x in (*floats, *integers, top_k_S))
    out_S = torch.empty(num_sequences, dtype=torch.int64, device=logits_SV.device)
    if num_sequences:
        sample_kernel[(num_sequences,)](
            logits_SV,
            temperature_S,
            top_k_S,
            top_p_S,
            min_p_S,
            seed_S,
            position_S,
            out_S,
            logits_SV.stride(0),
            num_tokens,
            BLOCK=min(_BLOCK, triton.next_power_of_2(num_tokens)),
            num_warps=16,
        )
    return out_S


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
        penalties_kernel[(num_sequences, triton.cdiv(num_listed, _PENALTY_BLOCK))](
            logits_SV,
            token_ids_SL,
            output_count_SL,
            *scalars,
            logits_SV.stride(0),
            num_listed,
            BLOCK=_PENALTY_BLOCK,
            num_warps=2,
        )
