"""From logits to tokens, on the last stage.

Random numbers are counter-based: a function of (seed, position) alone, so that a sequence's text does
not depend on what shares its batch, on how often a step was done again, or on who does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r1_cluster.records import SampleSpec

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


def sample(logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """One token per row of float32 logits [S, V], row j by `specs[j].sampling`.

    Top-k and top-p keep all tokens at least as probable as the least probable kept one (ties stay in);
    the token is drawn by inverse CDF over the kept tokens in the order of their ids.
    """
    greedy = torch.argmax(logits_SV, dim=-1)
    rows = [j for j, spec in enumerate(specs) if spec.sampling.temperature > 0]
    if rows:
        greedy[rows] = _draw(logits_SV[rows], [specs[j] for j in rows])
    tokens: list[int] = greedy.tolist()
    return tokens


def _draw(logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    device = logits_SV.device
    vocab = logits_SV.shape[-1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

    temperature = column([spec.sampling.temperature for spec in specs])
    top_p = column([spec.sampling.top_p for spec in specs])
    uniform = column([counter_uniform(spec.sampling.seed, spec.position) for spec in specs])
    top_k = torch.tensor([spec.sampling.top_k or vocab for spec in specs], device=device).unsqueeze(1)

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
