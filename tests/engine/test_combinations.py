"""Every architecture in every dtype and every layout that there is, over the engine's loop, workers and links: the
logits and the greedy tokens of transformers."""

import itertools
import random

import pytest
import torch
from combinations import ALL, ARCHITECTURES, DTYPES, LAYOUTS, Oracle, computed_in, write_checkpoint
from thread_cluster import Cluster

from r1_cluster.engine import roles
from r1_cluster.records import Request, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.apart]


@pytest.fixture
def seen(monkeypatch):
    """{(seed, position): the float32 logits [V] that a token was chosen from}."""
    found = {}
    sample = roles.sample

    def noted(ops, logits_SV, specs):
        for spec, logits_V in zip(specs, logits_SV, strict=True):
            found[spec.sampling.seed, spec.position] = logits_V.clone()
        return sample(ops, logits_SV, specs)

    monkeypatch.setattr(roles, "sample", noted)
    return found


def prompts(length):
    """As many as anybody asks for, of random tokens."""
    rng = random.Random(length)
    while True:
        yield [rng.randrange(5, 480) for _ in range(length)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, seen, architecture, dtype):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", architecture, dtype)
    oracle = Oracle(checkpoint, tmp_path / "oracle")
    # The first is longer than a step.
    answers = [oracle.answer(prompts(length), computed_in(dtype)) for length in (75, 9)]
    asked = [
        Request(
            f"r{i}",
            answer.prompt,
            SamplingParams(0.0, 1.0, 0, i),
            len(answer.tokens),
            [],
            "sink",
            ignore_eos=True,
        )
        for i, answer in enumerate(answers, 1000)
    ]
    for layout in [layout for *both, layout in ALL if both == [architecture, dtype]]:
        cluster = Cluster(checkpoint, LAYOUTS[layout], dtype=computed_in(dtype))
        try:
            texts = cluster.run(asked)
        finally:
            cluster.close()
        for request, answer in zip(asked, answers):
            assert texts[request.request_id] == answer.tokens, layout
            positions = itertools.count(len(answer.prompt))
            got = torch.stack([seen.pop((request.sampling.seed, next(positions))) for _ in answer.tokens])
            answer.check(got)
