"""From logits to tokens in plain torch.

Random numbers are counter-based: a function of (seed, position) alone, so that a sequence's text does
not depend on what shares its batch, on how often a step was done again, or on who does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import Draws

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014: "Fast splittable pseudorandom number
    generators")."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def counter_uniform(seed: int, position: int) -> float:
    """A uniform number in (0, 1) with 24 random bits, a pure function of its int64 arguments."""
    z = _mix((_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK)
    return ((z >> 40) + 0.5) * 2.0**-24


def sample(logits_SV: Tensor, draws: Draws) -> list[int]:
    """See `Ops.sample`.

    Top-k and top-p keep all tokens at least as probable as the least probable kept one: ties stay in.
    """
    greedy = torch.argmax(logits_SV, dim=-1)
    rows = [row for row, temperature in enumerate(draws.temperatures) if temperature > 0]
    if rows:
        greedy[rows] = _draw(logits_SV[rows], draws, rows)
    tokens: list[int] = greedy.tolist()
    return tokens


def _draw(logits_SV: Tensor, draws: Draws, rows: Sequence[int]) -> Tensor:
    device = logits_SV.device
    vocab = logits_SV.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

    temperature = column([draws.temperatures[row] for row in rows])
    top_p = column([draws.top_ps[row] for row in rows])
    uniform = column([counter_uniform(draws.seeds[row], draws.positions[row]) for row in rows])
    top_k = torch.tensor([draws.top_ks[row] or vocab for row in rows], device=device).unsqueeze(1)

    probs = torch.softmax(logits_SV / temperature, dim=-1)
    ordered = torch.sort(probs, dim=-1, descending=True).values
    before = torch.cumsum(ordered, dim=-1) - ordered
    num_kept = torch.minimum((before < top_p).sum(dim=-1, keepdim=True), top_k.clamp(1, vocab))
    threshold = ordered.gather(-1, num_kept - 1)
    kept = torch.where(probs >= threshold, probs, 0.0)
    cdf = torch.cumsum(kept, dim=-1)
    # The first id whose cumulated probability exceeds u·total; rounding may push u·total to the total itself.
    drawn = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).squeeze(1)
    last_kept = vocab - 1 - torch.argmax((kept > 0).flip(-1).to(torch.uint8), dim=-1)
    return torch.minimum(drawn, last_kept)
