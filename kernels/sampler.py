"""From logits to a token on the device: temperature, top-k, top-p, min-p, counter-based draw.

The draw is that of `kernels.cpu_sampler`, integer for integer, so a row's token depends neither on how the
row is split nor on the order in which atomics arrive, and is the one that the CPU draws. No sort and no wait
for the host: four kernels read the logits, one block of one row a program, and three look at what they left.

- `largest`: each block's best token; histograms are cleared.
- `weigh`: each block's mass; where a filter wants it, a histogram over the upper 12 bits of the 23-bit keys,
  of masses for top-p and of counts for top-k. Tokens that top-p cannot reach (`cpu_sampler.least_mass`) stay
  out: at 0.95 and R1's vocabulary those 2^-21 of the best and less, so that a usual row takes few atomics.
- `coarse`: the bin at which a filter is full. `refine`: a histogram of that bin over the lower 11 bits.
- `fine`: the furthest key that all filters keep. `keep`: each block's kept mass.
- `locate`: the block in which the draw falls, and the token in it.

Multiplications and additions must not be fused, or keys and masses differ from the CPU's: hence
`enable_fp_fusion=False`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpu_sampler
from kernels.launch import rows_dense
from kernels.ops import FAILED

_BLOCK = 2048

_FAILED = tl.constexpr(FAILED)
_COLDEST, _HOTTEST = tl.constexpr(cpu_sampler.COLDEST), tl.constexpr(cpu_sampler.HOTTEST)
_LOG2_E, _FURTHEST = tl.constexpr(cpu_sampler.LOG2_E), tl.constexpr(cpu_sampler.FURTHEST)
_BITS_OF_64, _BITS_OF_1 = tl.constexpr(cpu_sampler.BITS_OF_64), tl.constexpr(cpu_sampler.BITS_OF_1)
_FRACTION_BITS, _FRACTION_MASK = (
    tl.constexpr(cpu_sampler.FRACTION_BITS),
    tl.constexpr(cpu_sampler.FRACTIONS - 1),
)
_TO_MANTISSA = tl.constexpr(23 - cpu_sampler.FRACTION_BITS)
_MASS_SHIFT = tl.constexpr(cpu_sampler.MASS_SHIFT)
_S4, _S3, _S2, _S1, _S0 = (tl.constexpr(c) for c in cpu_sampler.SERIES)
_SHARE_BITS = tl.constexpr(cpu_sampler.SHARE_BITS)
_LEFT_OUT_SHIFT = tl.constexpr(40 - cpu_sampler.SHARE_BITS)
_WHOLE = tl.constexpr(1 << cpu_sampler.SHARE_BITS)

_PLUS_INFINITY, _MINUS_INFINITY = tl.constexpr(0x7F800000), tl.constexpr(-0x7F800001)  # as `ordered`
_FINE_BITS, _FINE, _FINE_MASK = tl.constexpr(11), tl.constexpr(1 << 11), tl.constexpr((1 << 11) - 1)
_COARSE = tl.constexpr(1 << 12)
_BINS = tl.constexpr((1 << 12) + (1 << 11))
_BEYOND = tl.constexpr(1 << 23)  # every key


@triton.jit
def mix64(z: tl.tensor) -> tl.tensor:
    """Finaliser of splitmix64 (Steele, Lea and Flood, 2014) on uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def odd_draw(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """int64: `cpu_sampler.odd_draw`."""
    golden: tl.constexpr = 0x9E3779B97F4A7C15
    start = mix64(seed.to(tl.uint64, bitcast=True) + golden)
    z = mix64(start + (position.to(tl.uint64, bitcast=True) + 1) * golden)
    return (z >> 40).to(tl.int64) * 2 + 1


@triton.jit
def _is_nan(x: tl.tensor) -> tl.tensor:
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """int32 in the order of float32 values, zeros of both signs equal, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return tl.where(_is_nan(x), 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def keys_of(x: tl.tensor, largest: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """int32: `cpu_sampler.keys_of`."""
    z = tl.minimum((largest - x) * inverse, _FURTHEST)
    return (z + 64.0).to(tl.int32, bitcast=True) - _BITS_OF_64


@triton.jit
def masses_of(key: tl.tensor) -> tl.tensor:
    """int64: `cpu_sampler.masses_of`."""
    mantissa = (key & _FRACTION_MASK) << _TO_MANTISSA
    fraction = (mantissa | _BITS_OF_1).to(tl.float32, bitcast=True) - 1.0
    value = fraction * _S4 + _S3
    value = value * fraction + _S2
    value = value * fraction + _S1
    value = value * fraction + _S0
    value = value * fraction + 2.0
    bits = value.to(tl.int32, bitcast=True) - _BITS_OF_1
    return (bits.to(tl.int64) << _MASS_SHIFT) >> (key >> _FRACTION_BITS).to(tl.int64)


@triton.jit
def _share_of(top_p: tl.tensor) -> tl.tensor:
    return (tl.minimum(tl.maximum(top_p, 0.0), 1.0) * 2147483648.0).to(tl.int64)


@triton.jit
def _part(total: tl.tensor, share: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """total · share >> BITS, although the product may need more than 64 bits; share is at most 2^BITS."""
    high = total >> BITS
    low = total - (high << BITS)
    return high * share + ((low * share) >> BITS)


@triton.jit
def _row(
    best_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    row: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """`(ordered largest logit, whether the row fails, whether it is drawn)`; if neither, it is greedy."""
    split = tl.arange(0, SPLITS)
    best = tl.load(best_ptr + row * 2 * splits + split, mask=split < splits, other=_MINUS_INFINITY)
    largest = tl.max(best, 0)
    temperature, top_p = tl.load(temperature_ptr + row), tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    usable = (_is_nan(temperature) | _is_nan(top_p) | _is_nan(min_p)) == 0
    finite = (largest > _MINUS_INFINITY) & (largest < _PLUS_INFINITY)
    drawn = usable & finite & (temperature >= _COLDEST)
    return largest, (usable & finite) == 0, drawn


@triton.jit
def _block_keys(
    logits_ptr: tl.tensor,
    logits_stride: tl.tensor,
    row: tl.tensor,
    split: tl.tensor,
    V: tl.tensor,
    largest: tl.tensor,
    inverse_ptr: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Keys of one block; past the row's end they are those of -inf."""
    token = split * BLOCK + tl.arange(0, BLOCK)
    row_at = logits_ptr + row.to(tl.int64) * logits_stride
    x = tl.load(row_at + token, mask=token < V, other=float("-inf")).to(tl.float32)
    value = (largest ^ ((largest >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return keys_of(x, value, tl.load(inverse_ptr + row))


@triton.jit
def largest_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    mass_bins_ptr: tl.tensor,
    count_bins_ptr: tl.tensor,
    logits_stride: int,
    V: int,
    splits: int,
    BLOCK: tl.constexpr,
    CLEAR: tl.constexpr,
) -> None:
    row, split = tl.program_id(0), tl.program_id(1)
    token = split * BLOCK + tl.arange(0, BLOCK)
    row_at = logits_ptr + row.to(tl.int64) * logits_stride
    key = ordered(tl.load(row_at + token, mask=token < V, other=float("-inf")).to(tl.float32))
    largest = tl.max(key, 0)
    tl.store(best_ptr + row * 2 * splits + split, largest)
    tl.store(best_ptr + (row * 2 + 1) * splits + split, tl.min(tl.where(key == largest, token, V), 0))
    temperature = tl.load(temperature_ptr + row)
    held = tl.minimum(tl.maximum(temperature, _COLDEST), _HOTTEST)
    tl.store(inverse_ptr + row, tl.div_rn(tl.full([], _LOG2_E, tl.float32), held), mask=split == 0)

    bin = split * CLEAR + tl.arange(0, CLEAR)
    at = row.to(tl.int64) * _BINS + bin
    zeros = tl.zeros([CLEAR], tl.int64)
    mass_end = tl.where(tl.load(top_p_ptr + row) < 1, _BINS, 0)
    tl.store(mass_bins_ptr + at, zeros, mask=bin < mass_end)
    count_end = tl.where(tl.load(top_k_ptr + row) > 0, _BINS, 0)
    tl.store(count_bins_ptr + at, zeros.to(tl.int32), mask=bin < count_end)


@triton.jit
def weigh_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    split_mass_ptr: tl.tensor,
    mass_bins_ptr: tl.tensor,
    count_bins_ptr: tl.tensor,
    logits_stride: int,
    V: int,
    splits: int,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row, split = tl.program_id(0), tl.program_id(1)
    largest, _, drawn = _row(best_ptr, temperature_ptr, top_p_ptr, min_p_ptr, row, splits, SPLITS)
    if drawn == 0:
        return
    key = _block_keys(logits_ptr, logits_stride, row, split, V, largest, inverse_ptr, BLOCK)
    mass = masses_of(key)
    tl.store(split_mass_ptr + row * splits + split, tl.sum(mass, 0))
    at = row.to(tl.int64) * _BINS + (key >> _FINE_BITS)
    top_p = tl.load(top_p_ptr + row)
    if top_p < 1:
        # Tokens of so little mass are, all together, less than what top-p leaves out.
        least = ((_WHOLE - _share_of(top_p)) << _LEFT_OUT_SHIFT) // V
        if tl.max(mass, 0) > least:
            tl.atomic_add(mass_bins_ptr + at, mass, mask=mass > least, sem="relaxed")
    top_k = tl.load(top_k_ptr + row)
    if (top_k > 0) & (top_k < V):
        one = tl.full([BLOCK], 1, tl.int32)
        tl.atomic_add(count_bins_ptr + at, one, mask=mass > 0, sem="relaxed")


@triton.jit
def _full_bin(bins_at: tl.tensor, wanted: tl.tensor, SIZE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """`(bin, missing)`: the first at which the histogram, summed up, holds what is wanted (SIZE if none), and
    how much of it was missing before that bin."""
    summed = tl.cumsum(tl.load(bins_at + tl.arange(0, SIZE)).to(tl.int64), 0)
    short = summed < wanted
    before = tl.max(tl.where(short, summed, 0), 0)
    return tl.sum(short.to(tl.int32), 0), wanted - before


@triton.jit
def coarse_kernel(
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    best_ptr: tl.tensor,
    split_mass_ptr: tl.tensor,
    mass_bins_ptr: tl.tensor,
    count_bins_ptr: tl.tensor,
    bin_ptr: tl.tensor,
    missing_ptr: tl.tensor,
    V: int,
    splits: int,
    SPLITS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    _, _, drawn = _row(best_ptr, temperature_ptr, top_p_ptr, min_p_ptr, row, splits, SPLITS)
    if drawn == 0:
        return
    bins_from = row.to(tl.int64) * _BINS
    bin = tl.full([], _COARSE, tl.int32)  # where there is no filter, no key lies in the bin
    missing = tl.full([], 0, tl.int64)
    top_p = tl.load(top_p_ptr + row)
    if top_p < 1:
        split = tl.arange(0, SPLITS)
        total = tl.sum(tl.load(split_mass_ptr + row * splits + split, mask=split < splits, other=0), 0)
        wanted = tl.maximum(_part(total, _share_of(top_p), _SHARE_BITS), 1)
        bin, missing = _full_bin(mass_bins_ptr + bins_from, wanted, _COARSE)
    tl.store(bin_ptr + row * 2, bin)
    tl.store(missing_ptr + row * 2, missing)
    bin = tl.full([], _COARSE, tl.int32)
    missing = tl.full([], 0, tl.int64)
    top_k = tl.load(top_k_ptr + row)
    if (top_k > 0) & (top_k < V):
        bin, missing = _full_bin(count_bins_ptr + bins_from, top_k.to(tl.int64), _COARSE)
    tl.store(bin_ptr + row * 2 + 1, bin)
    tl.store(missing_ptr + row * 2 + 1, missing)


@triton.jit
def refine_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    mass_bins_ptr: tl.tensor,
    count_bins_ptr: tl.tensor,
    bin_ptr: tl.tensor,
    logits_stride: int,
    V: int,
    splits: int,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row, split = tl.program_id(0), tl.program_id(1)
    largest, _, drawn = _row(best_ptr, temperature_ptr, top_p_ptr, min_p_ptr, row, splits, SPLITS)
    if drawn == 0:
        return
    mass_bin, count_bin = tl.load(bin_ptr + row * 2), tl.load(bin_ptr + row * 2 + 1)
    if (mass_bin >= _COARSE) & (count_bin >= _COARSE):
        return
    key = _block_keys(logits_ptr, logits_stride, row, split, V, largest, inverse_ptr, BLOCK)
    at = row.to(tl.int64) * _BINS + _COARSE + (key & _FINE_MASK)
    inside = (key >> _FINE_BITS) == mass_bin
    if tl.max(inside.to(tl.int32), 0) > 0:
        tl.atomic_add(mass_bins_ptr + at, masses_of(key), mask=inside, sem="relaxed")
    inside = (key >> _FINE_BITS) == count_bin
    tl.atomic_add(count_bins_ptr + at, tl.full([BLOCK], 1, tl.int32), mask=inside, sem="relaxed")


@triton.jit
def fine_kernel(
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    best_ptr: tl.tensor,
    mass_bins_ptr: tl.tensor,
    count_bins_ptr: tl.tensor,
    bin_ptr: tl.tensor,
    missing_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    splits: int,
    SPLITS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    _, _, drawn = _row(best_ptr, temperature_ptr, top_p_ptr, min_p_ptr, row, splits, SPLITS)
    if drawn == 0:
        return
    bins_from = row.to(tl.int64) * _BINS + _COARSE
    limit = tl.full([], _BEYOND, tl.int32)
    bin = tl.load(bin_ptr + row * 2)
    if bin < _COARSE:
        missing = tl.load(missing_ptr + row * 2)
        offset = _full_bin(mass_bins_ptr + bins_from, missing, _FINE)[0]
        limit = (bin << _FINE_BITS) + offset
    bin = tl.load(bin_ptr + row * 2 + 1)
    if bin < _COARSE:
        missing = tl.load(missing_ptr + row * 2 + 1)
        offset = _full_bin(count_bins_ptr + bins_from, missing, _FINE)[0]
        limit = tl.minimum(limit, (bin << _FINE_BITS) + offset)
    tl.store(limit_ptr + row, limit)


@triton.jit
def _kept(key: tl.tensor, limit: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """int64 masses, 0 where a filter leaves the token out."""
    mass = masses_of(key)
    least = (tl.minimum(tl.maximum(min_p, 0.0), 1.0) * 1099511627776.0).to(tl.int64)
    return tl.where((key <= limit) & (mass >= least), mass, 0)


@triton.jit
def keep_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    split_mass_ptr: tl.tensor,
    logits_stride: int,
    V: int,
    splits: int,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row, split = tl.program_id(0), tl.program_id(1)
    largest, _, drawn = _row(best_ptr, temperature_ptr, top_p_ptr, min_p_ptr, row, splits, SPLITS)
    limit, min_p = tl.load(limit_ptr + row), tl.load(min_p_ptr + row)
    everything = (limit >= _BEYOND) & (min_p <= 0)
    if (drawn == 0) | everything:
        return
    key = _block_keys(logits_ptr, logits_stride, row, split, V, largest, inverse_ptr, BLOCK)
    mass = tl.full([], 0, tl.int64)
    if tl.min(key, 0) <= limit:
        mass = tl.sum(_kept(key, limit, min_p), 0)
    tl.store(split_mass_ptr + row * splits + split, mass)


@triton.jit
def locate_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    split_mass_ptr: tl.tensor,
    out_ptr: tl.tensor,
    logits_stride: int,
    V: int,
    splits: int,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    largest, failed, drawn = _row(best_ptr, temperature_ptr, top_p_ptr, min_p_ptr, row, splits, SPLITS)
    at = tl.arange(0, SPLITS)
    if drawn == 0:
        key = tl.load(best_ptr + row * 2 * splits + at, mask=at < splits, other=_MINUS_INFINITY)
        token = tl.load(best_ptr + (row * 2 + 1) * splits + at, mask=at < splits, other=V)
        best = tl.min(tl.where(key == largest, token, V), 0)
        tl.store(out_ptr + row, tl.where(failed, _FAILED, best).to(tl.int64))
        return
    masses = tl.load(split_mass_ptr + row * splits + at, mask=at < splits, other=0)
    summed = tl.cumsum(masses, 0)
    odd = odd_draw(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    target = _part(tl.sum(masses, 0), odd, 25)
    passed = summed <= target
    split = tl.sum(passed.to(tl.int32), 0)
    before = tl.max(tl.where(passed, summed, 0), 0)
    key = _block_keys(logits_ptr, logits_stride, row, split, V, largest, inverse_ptr, BLOCK)
    mass = _kept(key, tl.load(limit_ptr + row), tl.load(min_p_ptr + row))
    offset = tl.sum((before + tl.cumsum(mass, 0) <= target).to(tl.int32), 0)
    tl.store(out_ptr + row, (split * BLOCK + offset).to(tl.int64))


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    seed_S: Tensor,
    position_S: Tensor,
) -> Tensor:
    """int64 [S] token ids, or FAILED, from float32 or BF16 logits; see `reference.sample`.

    Scratch memory is 74 KB a row, and what a row needs of it is cleared by the first kernel.
    """
    S, V = logits_SV.shape
    floats, integers = (temperature_S, top_p_S, min_p_S), (seed_S, position_S)
    assert rows_dense(logits_SV)
    assert 0 < V <= cpu_sampler.MAX_TOKENS, "a row's masses add up to less than 2^62"
    assert all(x.dtype == torch.float32 for x in floats), "temperature, top-p and min-p are float32"
    assert all(x.dtype == torch.int64 for x in integers), "seed and position are int64"
    assert top_k_S.dtype == torch.int32, "top-k is int32"
    assert all(x.shape == (S,) and x.is_contiguous() for x in (*floats, *integers, top_k_S))
    device = logits_SV.device
    out = torch.empty(S, dtype=torch.int64, device=device)
    if not S:
        return out
    block = min(_BLOCK, triton.next_power_of_2(V))
    splits = triton.cdiv(V, block)
    best = torch.empty(S, 2, splits, dtype=torch.int32, device=device)
    inverse = torch.empty(S, dtype=torch.float32, device=device)
    split_mass = torch.empty(S, splits, dtype=torch.int64, device=device)
    mass_bins = torch.empty(S, _BINS.value, dtype=torch.int64, device=device)
    count_bins = torch.empty(S, _BINS.value, dtype=torch.int32, device=device)
    bins, limit = (torch.empty(S, n, dtype=torch.int32, device=device) for n in (2, 1))
    missing = torch.empty(S, 2, dtype=torch.int64, device=device)

    row = (temperature_S, top_p_S, min_p_S)
    row_k = (temperature_S, top_k_S, top_p_S, min_p_S)
    width = (logits_SV.stride(0), V, splits)
    options = {"num_warps": max(1, min(8, block // 512)), "enable_fp_fusion": False}
    blocks = {"BLOCK": block, "SPLITS": triton.next_power_of_2(splits)} | options
    scan = {"SPLITS": triton.next_power_of_2(splits), "num_warps": 8, "enable_fp_fusion": False}
    clear = triton.next_power_of_2(triton.cdiv(_BINS.value, splits))
    largest_kernel[(S, splits)](
        logits_SV,
        *row_k[:3],
        best,
        inverse,
        mass_bins,
        count_bins,
        *width,
        BLOCK=block,
        CLEAR=clear,
        **options,
    )
    weigh_kernel[(S, splits)](
        logits_SV, *row_k, best, inverse, split_mass, mass_bins, count_bins, *width, **blocks
    )
    coarse_kernel[(S,)](*row_k, best, split_mass, mass_bins, count_bins, bins, missing, V, splits, **scan)
    refine_kernel[(S, splits)](logits_SV, *row, best, inverse, mass_bins, count_bins, bins, *width, **blocks)
    fine_kernel[(S,)](*row, best, mass_bins, count_bins, bins, missing, limit, splits, **scan)
    keep_kernel[(S, splits)](logits_SV, *row, best, inverse, limit, split_mass, *width, **blocks)
    locate_kernel[(S,)](
        logits_SV, *row, seed_S, position_S, best, inverse, limit, split_mass, out, *width, **blocks
    )
    return out
