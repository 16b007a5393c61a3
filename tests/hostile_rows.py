"""Logits and sampling parameters of every float32 there is, for the samplers of all devices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.ops import Draws

SPECIAL = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000]
SPECIAL += [0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF]
BOUNDARIES = [2.0**-17, 2.0**-17 - 2.0**-41, 1e-5, 1.0, 1 - 2.0**-24, 2.0**-31, 2.0**-40, 2.0**100, 2.0**101]


def from_bits(bits: Tensor) -> Tensor:
    """float32 of int64 bit patterns."""
    return bits.to(torch.int32).view(torch.float32)


def floats(generator: torch.Generator, *shape: int) -> Tensor:
    """A third of any bits, a third special ones, a third ordinary numbers."""
    kind = torch.randint(0, 3, shape, generator=generator)
    any_bits = from_bits(torch.randint(0, 2**32, shape, generator=generator))
    special = from_bits(torch.tensor(SPECIAL))[torch.randint(0, len(SPECIAL), shape, generator=generator)]
    ordinary = torch.randn(shape, generator=generator) * 8
    return torch.where(kind == 0, any_bits, torch.where(kind == 1, special, ordinary))


def parameters(generator: torch.Generator, count: int) -> Tensor:
    """Half of them usable numbers, a quarter boundaries of the definition, a quarter anything."""
    kind = torch.randint(0, 4, (count,), generator=generator)
    usable = torch.rand(count, generator=generator) * 1.2
    boundary = torch.tensor(BOUNDARIES)[torch.randint(0, len(BOUNDARIES), (count,), generator=generator)]
    anything = floats(generator, count)
    return torch.where(kind < 2, usable, torch.where(kind == 2, boundary, anything))


def logits(generator: torch.Generator, count: int, width: int) -> Tensor:
    """float32 [count, width]: row by row anything, anything that a row may hold, all equal, one apart from
    the rest, few values many times, whole numbers, ordinary, or denormals."""
    rows = []
    for row in range(count):
        wild, apart = floats(generator, width), int(torch.randint(0, width, (), generator=generator))
        legal = torch.where(wild.isnan() | (wild == math.inf), -math.inf, wild)
        equal = floats(generator, 1).expand(width).clone()
        one = equal.clone()
        one[apart] = floats(generator, 1)[0]
        few = legal[torch.randint(0, min(4, width), (width,), generator=generator)]
        whole = torch.randint(-4, 5, (width,), generator=generator).float()
        denormal = from_bits(torch.randint(0, 2**23, (width,), generator=generator))
        ordinary = torch.randn(width, generator=generator) * 8
        rows.append((wild, legal, equal, one, few, whole, ordinary, denormal)[row % 8])
    return torch.stack(rows)


def integers(generator: torch.Generator, count: int) -> Tensor:
    """int64 of any bits."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def draws(generator: torch.Generator, count: int, width: int) -> Draws:
    """Parameters for as many rows of such a width."""
    top_ks = torch.randint(-2, width + 3, (count,), generator=generator)
    huge = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    rare = torch.rand(count, generator=generator) < 0.1
    return Draws(
        temperatures=parameters(generator, count).tolist(),
        top_ks=torch.where(rare, huge, top_ks).tolist(),
        top_ps=parameters(generator, count).tolist(),
        seeds=integers(generator, count).tolist(),
        positions=integers(generator, count).tolist(),
    )


def fails(row: list[float], temperature: float, top_p: float) -> bool:
    """Whether the row has no token to give, in the definition's words."""
    if any(math.isnan(x) for x in (*row, temperature, top_p)):
        return True
    return not math.isfinite(max(row))
