import collections

import pytest
import torch

from kernels import cpu
from kernels.cpu_sampler import counter_uniform
from r1_cluster.engine import sampler
from r1_cluster.records import SampleSpec, SamplingParams


def sample(logits, specs):
    return sampler.sample(cpu, logits, specs)


def specs(count, position=0, **params):
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 7, **params}
    return [SampleSpec(i, position + i, SamplingParams(**values)) for i in range(count)]


def test_uniform_numbers_are_uniform_and_a_pure_function():
    numbers = [counter_uniform(seed, position) for seed in (-3, 0, 2**63 - 1) for position in range(4000)]
    assert all(0 < number < 1 for number in numbers)
    counts = collections.Counter(int(number * 10) for number in numbers)
    assert max(counts.values()) < 1.15 * min(counts.values())
    assert numbers[5] == counter_uniform(-3, 5)
    assert len(set(numbers)) > 0.99 * len(numbers)


def test_greedy_is_the_argmax():
    logits = torch.randn(5, 64)
    assert sample(logits, specs(5, temperature=0.0)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (5, 0.7), (1, 1.0), (0, 1e-9)])
def test_only_kept_tokens_are_drawn_in_proportion(top_k, top_p):
    torch.manual_seed(1)
    logits = torch.randn(1, 32) * 2
    probs = torch.softmax(logits[0].double(), -1)
    order = probs.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p or (top_k and len(kept) == top_k):
            break
        kept.append(token)
        mass += float(probs[token])
    draws = sample(logits.expand(4000, -1), specs(4000, top_k=top_k, top_p=top_p))
    counts = collections.Counter(draws)
    assert set(counts) <= set(kept)
    for token in kept:
        share = float(probs[token]) / mass
        assert abs(counts[token] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-3


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
