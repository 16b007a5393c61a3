"""Sampling without a sort, against a sort in float64."""

import torch
import triton
import triton.language as tl

from kernels import reference, sampler


def test_random_numbers(draw):
    """Bit for bit those of the reference, whose values for one seed are pinned."""
    seed = draw.integers(-(2**62), 2**62, 64, dtype=torch.int64)
    position = draw.integers(0, 2**40, 64, dtype=torch.int64)
    out = torch.empty(64, dtype=torch.float64, device=draw.device)

    @triton.jit
    def kernel(seed_ptr, position_ptr, out_ptr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(out_ptr + at, sampler.uniform(tl.load(seed_ptr + at), tl.load(position_ptr + at)))

    kernel[(1,)](seed, position, out, SIZE=64)
    assert torch.equal(out.cpu(), reference.counter_uniform(seed.cpu(), position.cpu()))
    assert ((out > 0) & (out < 1)).all()
    spread = reference.counter_uniform(torch.tensor(7), torch.arange(20_000))
    counts = torch.histc(spread, 10, 0, 1)
    assert ((counts - 2000).abs() < 250).all()  # five standard deviations and more


def settings(draw, count, **given):
    kind = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given
    dtypes = {"top_k": torch.int32}
    filled = [
        torch.full((count,), v, dtype=dtypes.get(k, torch.float32), device=draw.device)
        for k, v in kind.items()
    ]
    seeds = draw.integers(-(2**62), 2**62, count, dtype=torch.int64)
    return [*filled, seeds, draw.integers(0, 10_000, count, dtype=torch.int64)]


def assert_sampled(draw, logits, arguments):
    """The token agrees, or the draw lay within float32's rounding of a boundary that moved.

    A boundary is the edge of a token's interval, or of the kept set; both move with a relative 2^-20 of mass.
    """
    mine = sampler.sample(logits, *arguments)
    wide = logits.double()
    theirs = reference.sample(wide, *arguments)
    for s in (mine != theirs).nonzero().flatten().tolist():
        temperature, top_k, top_p, min_p, seed, position = (x[s : s + 1] for x in arguments)
        found = set()
        for nudge in (-1e-5, 1e-5):
            nudged_p = (top_p.double() * (1 + nudge)).clamp(max=1)
            row = wide[s : s + 1] / temperature.double()
            kept = reference.kept_tokens(row, top_k, nudged_p, min_p * (1 + nudge))
            mass = ((row - row.max()).exp() * kept).cumsum(-1)
            target = reference.counter_uniform(seed, position) * mass[:, -1]
            found |= {int((mass[0] > target * (1 + shift)).int().argmax()) for shift in (-1e-5, 0, 1e-5)}
        assert int(mine[s]) in found, (s, int(mine[s]), int(theirs[s]))
    return mine


def test_greedy_takes_the_lowest_of_equals(draw):
    logits = draw.integers(-3, 4, 5, 5000).float()
    out = sampler.sample(logits, *settings(draw, 5, temperature=0.0))
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(out, first)


def test_each_filter_and_all(draw):
    kinds = [
        {},
        {"temperature": 0.6, "top_p": 0.95},
        {"top_k": 5},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
        {"top_p": 1e-6},
        {"top_k": 1},
    ]
    num_tokens = 700
    rows = [settings(draw, 2, **kind) for kind in kinds]
    arguments = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    logits = draw.normal(2 * len(kinds), num_tokens) * 4
    logits[:, ::5] = logits[:, 1::5]  # ties, some of them at thresholds
    logits[:, 3] = float("-inf")  # a token that a grammar forbids
    mine = assert_sampled(draw, logits, arguments)
    kept = reference.kept_tokens(logits.double() / arguments[0].double()[:, None], *arguments[1:4])
    assert kept.gather(-1, mine[:, None]).all()
    assert not (mine == 3).any()


def test_several_blocks_and_batch_invariance(draw, monkeypatch):
    monkeypatch.setattr(sampler, "_BLOCK", 256)
    logits = draw.normal(3, 1001) * 3
    arguments = settings(draw, 3, temperature=0.8, top_p=0.9)
    mine = assert_sampled(draw, logits, arguments)
    alone = sampler.sample(logits[1:2].clone(), *(x[1:2].clone() for x in arguments))
    assert torch.equal(alone, mine[1:2])


def test_draws_follow_the_distribution(draw):
    """Chi-square over 400 draws of five tokens: 23.5 is the 0.01 % point with four degrees of freedom."""
    logits = draw.normal(1, 5)
    arguments = settings(draw, 400)
    arguments[4].fill_(int(arguments[4][0]))
    arguments[5] = torch.arange(400, device=draw.device)
    out = sampler.sample(logits.expand(400, -1).contiguous(), *arguments)
    expected = logits[0].double().softmax(-1) * 400
    observed = (out[:, None] == torch.arange(5, device=draw.device)).sum(0)
    assert int(observed.sum()) == 400
    assert float(((observed - expected).square() / expected).sum()) < 23.5


def test_penalties(draw):
    logits = draw.mixed(3, 500)
    ids = torch.full((3, 300), -1, dtype=torch.int32)
    for s, listed in enumerate((300, 0, 17)):
        ids[s, :listed] = torch.randperm(500, generator=draw.generator)[:listed].int()
    ids = ids.to(draw.device)
    count = draw.integers(0, 4, 3, 300)
    scalars = [torch.rand(3, generator=draw.generator).to(draw.device) + 0.5 for _ in range(3)]
    expected = reference.apply_penalties(logits.double(), ids, count, *(x.double() for x in scalars))
    sampler.apply_penalties(logits, ids, count, *scalars)
    # float32's rounding of three operations, on terms no larger than these
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
