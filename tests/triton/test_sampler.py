"""The device's sampler draws what the CPU's does, token for token, whatever the logits and the parameters."""

import hostile_rows
import pytest
import torch
import triton
import triton.language as tl

from kernels import cpu_sampler, penalties, reference, sampler, triton_ops
from kernels.ops import FAILED, Draws


def test_random_numbers(draw):
    """Bit for bit those of the CPU, whose value for one seed is pinned."""
    seed = hostile_rows.integers(draw.generator, 64).to(draw.device)
    position = hostile_rows.integers(draw.generator, 64).to(draw.device)
    out = torch.empty(64, dtype=torch.int64, device=draw.device)

    @triton.jit
    def kernel(seed_ptr, position_ptr, out_ptr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(out_ptr + at, sampler.odd_draw(tl.load(seed_ptr + at), tl.load(position_ptr + at)))

    kernel[(1,)](seed, position, out, SIZE=64)
    expected = [cpu_sampler.odd_draw(*pair) for pair in zip(seed.tolist(), position.tolist(), strict=True)]
    assert out.tolist() == expected


def test_every_key_has_the_mass_that_the_cpu_gives_it(draw):
    """All fractions, at whole parts up to where nothing is left."""
    size = cpu_sampler.FRACTIONS
    wholes = torch.tensor([0, 22, 39, 40]).repeat_interleave(size)
    key = (torch.arange(size).repeat(4) + wholes * size).int().to(draw.device)
    out = torch.empty(key.shape, dtype=torch.int64, device=draw.device)

    @triton.jit
    def kernel(key_ptr, out_ptr, SIZE: tl.constexpr):
        at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        tl.store(out_ptr + at, sampler.masses_of(tl.load(key_ptr + at)))

    kernel[(4 * size // 65_536,)](key, out, SIZE=65_536, enable_fp_fusion=False)
    assert torch.equal(out.cpu(), cpu_sampler.masses_of(key.cpu()))


def columns(draws, device, min_p=None):
    """A record of draws as the wrapper's tensors."""
    floats = [draws.temperatures, draws.top_ps, min_p or [0.0] * len(draws.seeds)]
    temperature, top_p, least = (torch.tensor(x, dtype=torch.float32, device=device) for x in floats)
    top_k = torch.tensor(draws.top_ks, dtype=torch.int32, device=device)
    seeds, positions = (torch.tensor(x, device=device) for x in (draws.seeds, draws.positions))
    return [temperature, top_k, top_p, least, seeds, positions]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 13, 300])
def test_every_float_gives_the_cpus_token_or_a_failed_row(draw, width, monkeypatch):
    monkeypatch.setattr(sampler, "_BLOCK", 128)  # 300 are three blocks, the last one of 44
    logits = hostile_rows.logits(draw.generator, 16, width)
    draws = hostile_rows.draws(draw.generator, 16, width)
    tokens = triton_ops.sample(logits.to(draw.device), draws)
    assert tokens == cpu_sampler.sample(logits, draws)
    for i, (token, row) in enumerate(zip(tokens, logits.tolist(), strict=True)):
        assert (token == FAILED) == hostile_rows.fails(row, draws.temperatures[i], draws.top_ps[i])
        assert token == FAILED or row[token] > float("-inf")


@pytest.mark.slow
def test_min_p_and_any_float_of_it(draw):
    logits = hostile_rows.logits(draw.generator, 16, 20)
    draws = hostile_rows.draws(draw.generator, 16, 20)
    min_p = hostile_rows.parameters(draw.generator, 16).tolist()
    arguments = columns(draws, draw.device, min_p)
    tokens = sampler.sample(logits.to(draw.device), *arguments)
    assert torch.equal(tokens.cpu(), reference.sample(logits, *arguments))


KINDS = [(0.0, 1.0, 0), (0.6, 0.95, 0), (1.0, 1.0, 20), (1.3, 0.8, 5), (1.0, 1.0, 0), (40.0, 0.99, 0)]


def kinds(count):
    rows = [KINDS[i % len(KINDS)] for i in range(count)]
    temperatures, top_ps, top_ks = zip(*rows, strict=True)
    return Draws(temperatures, top_ks, top_ps, list(range(count)), list(range(7, 7 + count)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_rows_draw_as_the_cpu_does(draw, dtype):
    """BF16 logits have many ties. The interpreter takes a hundredth of a second for a program."""
    count = 12 if draw.device == "cpu" else 3000
    logits = (draw.normal(count, 2000) * 5).to(dtype)
    draws = kinds(count)
    assert triton_ops.sample(logits, draws) == cpu_sampler.sample(logits.cpu(), draws)


def test_a_vocabulary_as_large_as_r1s(draw, monkeypatch):
    if draw.device == "cpu":
        monkeypatch.setattr(sampler, "_BLOCK", 65_536)
    logits = draw.normal(4, 129_280) * 4
    logits[1] = 1.5  # all equal: one bin gets every token
    draws = kinds(4)
    assert triton_ops.sample(logits, draws) == cpu_sampler.sample(logits.cpu(), draws)


@pytest.mark.slow
def test_splits_batches_and_strides_change_nothing(draw, monkeypatch):
    wide = draw.normal(5, 1301) * 4
    draws = kinds(5)
    tokens = triton_ops.sample(wide[:, :1001], draws)  # rows further apart than they are long
    for block in (512, 1024):
        monkeypatch.setattr(sampler, "_BLOCK", block)
        assert triton_ops.sample(wide[:, :1001].contiguous(), draws) == tokens
    alone = [Draws(*([column[i]] for column in vars(draws).values())) for i in range(1, 4)]
    assert [triton_ops.sample(wide[i : i + 1, :1001], one)[0] for i, one in enumerate(alone, 1)] == tokens[
        1:4
    ]


@pytest.mark.slow
def test_a_failed_row_leaves_its_neighbours_alone(draw):
    logits = draw.normal(9, 500) * 4
    draws = kinds(9)
    expected = triton_ops.sample(logits, draws)
    logits[1, 77], logits[4, 0], logits[5] = float("nan"), float("inf"), float("-inf")
    tokens = triton_ops.sample(logits, draws)
    assert [i for i, token in enumerate(tokens) if token == FAILED] == [1, 4, 5]
    assert all(token == before for token, before in zip(tokens, expected, strict=True) if token != FAILED)


def test_penalties(draw):
    logits = draw.mixed(3, 500)
    ids = torch.full((3, 300), -1, dtype=torch.int32)
    for s, listed in enumerate((300, 0, 17)):
        ids[s, :listed] = torch.randperm(500, generator=draw.generator)[:listed].int()
    ids = ids.to(draw.device)
    count = draw.integers(0, 4, 3, 300)
    scalars = [torch.rand(3, generator=draw.generator).to(draw.device) + 0.5 for _ in range(3)]
    expected = reference.apply_penalties(logits.double(), ids, count, *(x.double() for x in scalars))
    penalties.apply_penalties(logits, ids, count, *scalars)
    # float32's rounding of three operations, on terms no larger than these
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
