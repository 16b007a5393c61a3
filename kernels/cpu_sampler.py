"""From logits to tokens in plain torch, and the definition of the draw for every device.

A draw is defined in integers, so that any device that follows it draws the same token from the same logits,
however it splits a row and in whatever order it adds. For a row of float32 logits x (BF16 is widened) with
the largest m and a temperature T:

- inverse = log2(e) / T, T held within [COLDEST, HOTTEST]; z = (m - x) · inverse, each operation rounded to
  float32 on its own, nothing fused. z is the distance to the best token in powers of two of probability.
- key = the bits of min(z, 48) + 64 less the bits of 64, which is z in steps of 2^-17, rounded to even: 0 for
  the best token. Tokens of equal key are equally probable: they are ties.
- mass = 2^(40 - key / 2^17) as an integer: `mass_table` holds 2^40 · 2^-f for the 2^17 fractions f, and what
  the whole part shifts out is cut off. Mass falls with the key and is 0 below 2^-40 of the best token's.
- Filters keep the keys up to a limit: top-k the least key that k tokens reach, top-p the least key that
  tokens of ⌊total · top_p⌋ reach (top_p in steps of 2^-31, at least the best token). Each looks at the whole
  row; ties with the last one kept stay in. min-p, on the GPU alone so far, keeps masses from ⌊2^40 · min_p⌋.
- The draw: `odd_draw` / 2^25 is uniform in (0, 1); the token is the first, in the order of ids, at which the
  cumulated kept mass exceeds ⌊total kept · odd_draw / 2^25⌋, in integers without rounding.

A mass is within a factor of 1 ± (4·10⁻⁶ + 1.3·10⁻⁷ z) of exp((x - m) / T), and then within 2^-40 of the best
token's: as near as float32's rounding of logits of that size. Every float is a usable parameter but NaN:

| parameter | below | above |
| --- | --- | --- |
| temperature | less than COLDEST (0, negative, denormal): greedy, the lowest of the best ids | HOTTEST |
| top_k | 0 or less keeps all | V or more keeps all |
| top_p | 0 or less keeps the best token and its ties | 1 or more keeps all |
| min_p | 0 or less keeps all | 1 or more keeps the best token and its ties |

A row fails, and its token is FAILED, if it holds NaN, if its largest logit is infinite (all are -inf, or one
is +inf), or if one of its parameters is NaN. A logit of -inf otherwise is a token that cannot be drawn. No
result depends on whether a device's arithmetic flushes denormals.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import FAILED, Draws

COLDEST = 2.0**-17
HOTTEST = 2.0**100
LOG2_E = 1.44269502162933349609375  # float32
FURTHEST = 48.0
BITS_OF_64, BITS_OF_1 = 0x42800000, 0x3F800000  # as float32

FRACTION_BITS = 17
FRACTIONS = 1 << FRACTION_BITS
MASS_SHIFT = 17
"""From the 23 bits that the polynomial gives to the 40 of a mass."""

SERIES = (
    -0.000944903469644486904144287109375,
    0.009205797687172889709472656250000,
    -0.055297356098890304565429687500000,
    0.240180149674415588378906250000000,
    -0.693143725395202636718750000000000,
)
"""(2^-f - 1) / f on [0, 1], the highest power first, float32: within 8.4·10⁻⁸ (reweighted least squares)."""

SHARE_BITS = 31
MAX_TOKENS = 1 << 22
"""Up to which the integers hold: a total is less than 2^62."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_WHOLE = 1 << SHARE_BITS


def _mix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014: "Fast splittable pseudorandom number
    generators")."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def odd_draw(seed: int, position: int) -> int:
    """An odd number below 2^25 with 24 random bits, a pure function of its arguments modulo 2^64."""
    z = _mix((_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK)
    return 2 * (z >> 40) + 1


def counter_uniform(seed: int, position: int) -> float:
    """`odd_draw` as a uniform number in (0, 1)."""
    return odd_draw(seed, position) * 2.0**-25


@functools.cache
def mass_table() -> Tensor:
    """int64 [2^17]: 2^(40 - i / 2^17), in steps of 2^17."""
    fraction = torch.arange(FRACTIONS, dtype=torch.float32) * 2.0**-FRACTION_BITS
    value = torch.full_like(fraction, SERIES[0])
    for coefficient in SERIES[1:]:
        value = value * fraction
        value = value + coefficient
    value = value * fraction
    value = value + 2.0  # 1 + 2^-f, whose bits are 2^-f in steps of 2^-23
    return (value.view(torch.int32) - BITS_OF_1).long() << MASS_SHIFT


def keys_of(logits_SV: Tensor, largest_S1: Tensor, inverse_S1: Tensor) -> Tensor:
    """int32 [S, V]; no NaN, and the largest are finite."""
    distance = torch.sub(largest_S1, logits_SV.float()).mul_(inverse_S1)
    return distance.clamp_(max=FURTHEST).add_(64.0).view(torch.int32).sub_(BITS_OF_64)


def masses_of(keys: Tensor) -> Tensor:
    """int64, of the same shape."""
    fractions = keys.bitwise_and(FRACTIONS - 1).flatten()
    return mass_table().index_select(0, fractions).view_as(keys).bitwise_right_shift_(keys >> FRACTION_BITS)


def inverse_of(temperatures: Tensor) -> Tensor:
    """float32: powers of two of probability per unit of logits."""
    held = temperatures.clamp(COLDEST, HOTTEST)
    return torch.full_like(held, LOG2_E) / held


def share_of(top_p: float) -> int:
    """top_p, a float32, in steps of 2^-31, rounded down."""
    return int(min(max(top_p, 0.0), 1.0) * _WHOLE)


def least_mass(share: int, num_tokens: int) -> int:
    """Tokens of so little mass lie outside a top-p below 1: all together they are less than what it leaves
    out, since the total is 2^40 or more."""
    return ((_WHOLE - share) << (40 - SHARE_BITS)) // num_tokens


def sample(logits_SV: Tensor, draws: Draws) -> list[int]:
    """See `Ops.sample`. On the host, whatever device the logits come from."""
    logits_SV = logits_SV.cpu()
    largest_S, best_S = logits_SV.max(dim=-1)  # NaN is the largest there is, and of equals the first is best
    temperatures, top_ps = array("f", draws.temperatures), array("f", draws.top_ps)  # rounded to float32
    tokens: list[int] = best_S.tolist()
    rows = []
    for row, largest in enumerate(largest_S.tolist()):
        if not math.isfinite(largest) or math.isnan(temperatures[row]) or math.isnan(top_ps[row]):
            tokens[row] = FAILED
        elif temperatures[row] >= COLDEST:
            rows.append(row)
    if rows:
        if len(rows) < len(tokens):
            logits_SV, largest_S = logits_SV[rows], largest_S[rows]
        inverse = inverse_of(torch.tensor([temperatures[row] for row in rows], dtype=torch.float32))
        keys = keys_of(logits_SV, largest_S.float().unsqueeze(1), inverse.unsqueeze(1))
        mass = _kept_mass(keys, [draws.top_ks[row] for row in rows], [share_of(top_ps[row]) for row in rows])
        odds = [odd_draw(draws.seeds[row], draws.positions[row]) for row in rows]
        for row, token in zip(rows, _drawn(mass, odds)):
            tokens[row] = token
    return tokens


def _kept_mass(keys_RV: Tensor, top_ks: Sequence[int], shares: Sequence[int]) -> Tensor:
    """Every token's mass, 0 for those that top-k or top-p leave out."""
    num_rows, num_tokens = keys_RV.shape
    mass_RV = masses_of(keys_RV)
    rows = [row for row in range(num_rows) if 0 < top_ks[row] < num_tokens or shares[row] < _WHOLE]
    if len(rows) == num_rows:
        return mass_RV.masked_fill_(keys_RV > _limits(keys_RV, mass_RV, top_ks, shares), 0)
    if rows:
        keys, mass = keys_RV[rows], mass_RV[rows]
        limits = _limits(keys, mass, [top_ks[row] for row in rows], [shares[row] for row in rows])
        mass_RV[rows] = mass.masked_fill_(keys > limits, 0)
    return mass_RV


def _limits(keys_RV: Tensor, mass_RV: Tensor, top_ks: Sequence[int], shares: Sequence[int]) -> Tensor:
    """int32 [R, 1]: the furthest key that each row's filters keep; each row has one filter or both."""
    num_tokens = keys_RV.shape[-1]
    places = [k - 1 if 0 < k < num_tokens else num_tokens for k in top_ks]
    num_ranked = max([1] + [place + 1 for place in places if place < num_tokens])
    by_mass = any(share < _WHOLE for share in shares)
    if by_mass:
        totals = mass_RV.sum(-1).tolist()
        floors = [least_mass(s, num_tokens) if s < _WHOLE else t for s, t in zip(shares, totals)]
        num_near = (mass_RV > torch.tensor(floors).unsqueeze(1)).sum(-1).max()
        num_ranked = max(num_ranked, int(num_near))
    ranked_RN = keys_RV.topk(num_ranked, largest=False, sorted=True).values
    if by_mass:
        wanted = [max(total * share >> SHARE_BITS, 1) for total, share in zip(totals, shares)]
        cumulated_RN = masses_of(ranked_RN).cumsum(-1)
        reached = torch.searchsorted(cumulated_RN, torch.tensor(wanted).unsqueeze(1)).squeeze(1).tolist()
        reached = [place if share < _WHOLE else num_tokens for place, share in zip(reached, shares)]
        places = [min(pair) for pair in zip(places, reached)]
    # A single token is near to nothing, not even to itself.
    last = torch.tensor(places).clamp_(max=num_ranked - 1).unsqueeze(1)
    return ranked_RN.gather(-1, last)


def _drawn(mass_RV: Tensor, odds: Sequence[int]) -> list[int]:
    """The tokens at which each row's cumulated mass exceeds its odd number's share of the total."""
    cumulated_RV = mass_RV.cumsum(-1)
    targets = [total * odd >> 25 for total, odd in zip(cumulated_RV[:, -1].tolist(), odds)]
    found = torch.searchsorted(cumulated_RV, torch.tensor(targets).unsqueeze(1), right=True)
    tokens: list[int] = found.squeeze(1).tolist()
    return tokens
