import collections
import math

import hostile_rows
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu, cpu_sampler, reference
from kernels.ops import FAILED, Draws
from r1_cluster.engine import sampler
from r1_cluster.records import SampleSpec, SamplingParams


def twin(logits, draws):
    return reference.sample(
        logits,
        torch.tensor(draws.temperatures),
        torch.tensor(draws.top_ks),
        torch.tensor(draws.top_ps),
        torch.zeros(len(logits)),
        torch.tensor(draws.seeds),
        torch.tensor(draws.positions),
    ).tolist()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**63 - 1), width=st.sampled_from([1, 2, 3, 7, 12, 33]))
def test_every_float_gives_a_token_or_a_failed_row(seed, width):
    generator = torch.Generator().manual_seed(seed)
    logits = hostile_rows.logits(generator, 24, width)
    draws = hostile_rows.draws(generator, 24, width)
    tokens = cpu.sample(logits, draws)
    assert tokens == twin(logits, draws)
    for i, (token, row) in enumerate(zip(tokens, logits.tolist(), strict=True)):
        if hostile_rows.fails(row, draws.temperatures[i], draws.top_ps[i]):
            assert token == FAILED
        else:
            assert row[token] > -math.inf
        # Nothing of a row depends on its neighbours, failed or not.
        alone = Draws(*([column[i]] for column in vars(draws).values()))
        assert cpu.sample(logits[i : i + 1], alone) == [token]


def sample(logits, specs):
    return sampler.sample(cpu, logits, specs)


def specs(count, position=0, **params):
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 7, **params}
    return [SampleSpec(i, position + i, SamplingParams(**values)) for i in range(count)]


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-300, -1.0, -math.inf, 2.0**-18])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(3, 64)
    assert sample(logits, specs(3, temperature=temperature)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e30, 1e300, math.inf])
def test_a_huge_temperature_draws_evenly_from_what_is_finite(temperature):
    logits = torch.tensor([[-50.0, 3.0, -math.inf, 50.0, 0.0]]).expand(4000, -1)
    counts = collections.Counter(sample(logits, specs(4000, temperature=temperature)))
    assert counts.keys() == {0, 1, 3, 4}
    assert all(abs(count - 1000) < 137 for count in counts.values())  # five standard deviations


def test_the_least_temperature_that_draws():
    """At 2^-17 logits that differ by their last bits are still told apart."""
    logits = torch.tensor([[1.0, 1.0 + 2**-17, 0.0, 1.0 + 2**-17]]).expand(2000, -1)
    counts = collections.Counter(sample(logits, specs(2000, temperature=2.0**-17)))
    assert counts.keys() == {0, 1, 3}
    share = 1 / (1 + 2 * math.e)
    assert abs(counts[0] / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5


def test_zeros_of_either_sign_are_one_value():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [-1.0, 0.0, -0.0, -0.0]])
    assert sample(logits, specs(2, temperature=0.0)) == [1, 1]


def test_seeds_and_positions_of_any_size():
    logits = torch.randn(1, 50).expand(3, -1)
    draws = Draws([1.0] * 3, [0] * 3, [1.0] * 3, [5, 5 + 2**64, 5 - 2**64], [9, 9 - 2**64, 9 + 2**65])
    assert len(set(cpu.sample(logits, draws))) == 1


def test_uniform_numbers_are_uniform_and_a_pure_function():
    uniform = cpu_sampler.counter_uniform
    numbers = [uniform(seed, position) for seed in (-3, 0, 2**63 - 1) for position in range(4000)]
    assert all(0 < number < 1 for number in numbers)
    counts = collections.Counter(int(number * 10) for number in numbers)
    assert max(counts.values()) < 1.15 * min(counts.values())
    assert numbers[5] == uniform(-3, 5)
    assert len(set(numbers)) > 0.99 * len(numbers)
    assert uniform(7, 0) == 0.7215081751346588


def test_masses_are_powers_of_two_to_six_digits_and_fall_with_the_key():
    table = cpu_sampler.mass_table()
    exact = torch.exp2(40 - torch.arange(cpu_sampler.FRACTIONS, dtype=torch.float64) / cpu_sampler.FRACTIONS)
    assert ((table - exact).abs() / exact).max() < 3.5e-7
    assert (table[1:] < table[:-1]).all()
    assert table[0] == 2**40
    assert table[-1] > 2**39
    keys = torch.arange(0, 48 << 17, 977, dtype=torch.int32)
    masses = cpu_sampler.masses_of(keys)
    exact = torch.exp2(40 - keys.double() / cpu_sampler.FRACTIONS)
    assert ((masses - exact).abs() <= exact * 3.5e-7 + 1).all()
    assert (masses[1:] <= masses[:-1]).all()
    assert int(masses[-1]) == 0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_whole_distribution_is_softmax(temperature):
    """The bound that the module states, on every token of a wide row; no draw is needed to see it."""
    torch.manual_seed(5)
    logits = torch.randn(1, 5000) * 6
    largest = logits.max(-1, keepdim=True).values
    keys = cpu_sampler.keys_of(logits, largest, cpu_sampler.inverse_of(torch.tensor([[temperature]])))
    mass = cpu_sampler.masses_of(keys).double() * 2.0**-40
    z = (largest.double() - logits.double()) / temperature / math.log(2)
    exact = torch.exp2(-z)
    assert ((mass - exact).abs() <= exact * (4e-6 + 1.3e-7 * z) + 2.0**-40).all()


def test_greedy_is_the_argmax():
    logits = torch.randn(5, 64)
    assert sample(logits, specs(5, temperature=0.0)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (5, 0.7), (1, 1.0), (0, 1e-9), (-1, 0.0)])
def test_only_kept_tokens_are_drawn_in_proportion(top_k, top_p):
    torch.manual_seed(1)
    logits = torch.randn(1, 32) * 2
    probs = torch.softmax(logits[0].double(), -1)
    order = probs.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    for token in order:
        if kept and (mass >= top_p or len(kept) == top_k):
            break
        kept.append(token)
        mass += float(probs[token])
    draws = sample(logits.expand(4000, -1), specs(4000, top_k=top_k, top_p=top_p))
    counts = collections.Counter(draws)
    assert set(counts) <= set(kept)
    for token in kept:
        share = float(probs[token]) / mass
        assert abs(counts[token] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-3


def test_the_kept_tokens_are_those_of_a_sort_in_float64():
    """The integers' filters against the reference's, whose cumulated masses are float64: with ties and
    -inf, and down to 2^-40 of the best, below which there is no mass."""
    torch.manual_seed(4)
    for case in range(120):
        logits = torch.randn(50) * 3
        logits[::5] = logits[1::5]
        logits[3] = -math.inf
        temperature = (0.5, 1.0, 1.7)[case % 3]
        top_k, top_p, min_p = ((0, 5, 21)[case % 3], (1.0, 0.9, 0.35, 0.999)[case % 4], (0.0, 0.03)[case % 2])
        mine = reference.kept_masses(logits, temperature, top_k, top_p, min_p)
        scaled = logits[None].double() / temperature
        filters = torch.tensor([top_k]), torch.tensor([top_p]).double(), torch.tensor([min_p]).double()
        theirs = reference.kept_tokens(scaled, *filters)[0] & (scaled[0] > scaled.max() - 40 * math.log(2))
        assert torch.equal(mine > 0, theirs)


def test_a_row_does_not_depend_on_the_batch():
    torch.manual_seed(2)
    logits = torch.randn(9, 512)
    mixed = [
        SampleSpec(i, 40 + i, SamplingParams(0.0 if i % 3 == 0 else 0.6, 0.95, 20 * (i % 2), i))
        for i in range(9)
    ]
    together = sample(logits, mixed)
    assert together == [sample(logits[i : i + 1], [mixed[i]])[0] for i in range(9)]


def test_ties_stay_in():
    logits = torch.zeros(1, 8)
    assert len(set(sample(logits.expand(200, -1), specs(200, top_k=2)))) == 8
    assert len(set(sample(logits.expand(200, -1), specs(200, top_p=0.1)))) == 8


def test_a_vocabulary_as_large_as_r1s():
    torch.manual_seed(3)
    logits = torch.randn(4, 129_280) * 4
    draws = Draws([0.6, 1.0, 50.0, 0.0], [0, 40, 0, 0], [0.95, 1.0, 0.95, 1.0], [1, 2, 3, 4], [5, 6, 7, 8])
    assert cpu.sample(logits, draws) == twin(logits, draws)
