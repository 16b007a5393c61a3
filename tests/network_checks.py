"""A small network's bits against its own, in other company and other divisions: what every family must hold."""

import contextlib
import tempfile
from itertools import pairwise

import numpy as np
import torch
from hypothesis import HealthCheck, note
from hypothesis import strategies as st
from small_model import SmallModel, write_checkpoint

RELAXED = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    "print_blob": True,
}


def chunks_of(tokens, cuts):
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    return [tokens[a:b] for a, b in pairwise(edges)]


@contextlib.contextmanager
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decoded(model, prompts, answers, cuts):
    """Logits [chunks, V] of each prompt, all computed together in chunks, then decoded along its answer."""
    queues = [chunks_of(p, cuts) + [[token] for token in a] for p, a in zip(prompts, answers)]
    got = [[] for _ in prompts]
    while any(queues):
        chunks = [(i, queue.pop(0)) for i, queue in enumerate(queues) if queue]
        for (i, _), logits in zip(chunks, model.step(chunks)):
            got[i].append(logits)
    return [torch.stack(rows) for rows in got]


def check_bits(values, seed, cuts, bounds, num_shards, page_size, fp8_cache=False):
    """One sequence alone, against the same among others, in other chunks, stages, shards and pages."""
    note(f"seed {seed}")
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = write_checkpoint(folder, values, seed)
        tokens = rng.integers(0, config.vocab_size, 150)
        alone = SmallModel(folder, deterministic=True, fp8_cache=fp8_cache)
        prefix, suffix = tokens[:140], tokens[140:]
        expected = [alone.step([(0, prefix)]), *(alone.step([(0, [token])]) for token in suffix)]

        other = SmallModel(
            folder,
            deterministic=True,
            fp8_cache=fp8_cache,
            bounds=sorted(bounds),
            num_shards=num_shards,
            page_size=page_size,
            pages_each=-(-256 // page_size),
        )
        neighbours = rng.permutation(7)[: rng.integers(1, 6)] + 1
        queue = chunks_of(prefix, cuts) + [[token] for token in suffix]
        got = []
        for chunk in queue:
            chunks = [(0, chunk)]
            for neighbour in neighbours:
                room = 240 - other.cached[neighbour]
                size = min(room, rng.integers(1, 7) if rng.random() < 0.7 else rng.integers(7, 90))
                if size > 0:
                    chunks.append((neighbour, rng.integers(0, config.vocab_size, size)))
            chunks = [chunks[i] for i in rng.permutation(len(chunks))]
            logits = other.step(chunks)
            got.append(logits[[s for s, _ in chunks].index(0)])
        for a, b in zip(expected, got[-len(expected) :], strict=True):
            assert torch.equal(a[0], b)

        recomputed = SmallModel(folder, deterministic=True, fp8_cache=fp8_cache, num_shards=2)
        assert torch.equal(recomputed.step([(3, tokens)])[0], expected[-1][0])


DIVISIONS = {
    "seed": st.integers(0, 2**31 - 1),
    "cuts": st.lists(st.integers(1, 150), max_size=3),
    "bounds": st.sets(st.integers(1, 2), max_size=2),
    "num_shards": st.integers(1, 4),
    "page_size": st.sampled_from([5, 16, 64]),
}
