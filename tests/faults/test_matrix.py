"""Every kind of part × every kind of death × every time for it, under 16 streams, in each layout:
every answer is as if nobody had died, and what the service holds afterwards is what it held before.

`make test` runs a few of them, `make test-system` some more, `make test-faults` all.
"""

import itertools
import json

import pytest
from faults.arena import Kill, summary, undergo

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PARTS = {
    "disaggregated": ["experts-1", "router-0", "stage-0", "stage-1", "engine"],
    "colocated": ["stage-0", "engine"],
    "ranks": ["stage-0-rank-0", "stage-0-rank-1", "engine"],
    "expert-parallel": ["dp-0", "dp-1", "engine"],
}
TIMES = ("prefill", "decode", "recovery")
HOWS = ("kill", "stop", "cut", "exception")
# What `make test` runs.
FAST = {
    "disaggregated": {
        ("experts-1", "kill", "decode"),
        ("router-0", "cut", "decode"),
        ("stage-0", "exception", "prefill"),
        ("engine", "kill", "prefill"),
    },
    "guarded": set(),
    "copies": set(),
    "colocated": {("stage-0", "kill", "decode")},
    "ranks": {("stage-0-rank-1", "kill", "decode")},
    "expert-parallel": {("dp-1", "kill", "decode")},
    "parallel-copies": set(),
}
# What `make test-system` runs; no more is run of the layouts with spares, a standby and copies.
SLOWER = {
    "guarded": {
        ("experts-1", "stop", "decode"),
        ("router-0", "kill", "recovery"),
        ("stage-0", "kill", "decode"),
        ("stage-1", "stop", "decode"),
        ("engine", "kill", "decode"),
        ("engine", "stop", "decode"),
    },
    "copies": {("experts-1", "kill", "decode"), ("experts-1", "stop", "decode")},
    "ranks": {("stage-0-rank-0", "stop", "decode"), ("stage-0-rank-1", "cut", "prefill")},
    "expert-parallel": {
        ("dp-0", "stop", "decode"),
        ("dp-0", "exception", "prefill"),
        ("dp-1", "cut", "decode"),
        ("engine", "kill", "decode"),
    },
    "parallel-copies": {("dp-0", "kill", "decode"), ("dp-1", "stop", "decode")},
}


def cases():
    for layout, fast in FAST.items():
        slower = SLOWER.get(layout, set())
        some = sorted(fast | slower)
        every = itertools.product(PARTS[layout], HOWS, TIMES) if layout in PARTS else some
        for case in every:
            if layout == "colocated" and case == ("stage-0", "cut", "recovery"):
                continue  # its one link is the engine's, which is dead then
            marks = [] if case in fast else [pytest.mark.system if case in slower else pytest.mark.matrix]
            yield pytest.param(layout, Kill(*case), marks=marks, id="-".join((layout, *case)))


@pytest.mark.parametrize(("layout", "kill"), list(cases()))
def test_no_death_ends_or_changes_a_stream(ring, layout, kill, request):
    arena, undisturbed, before = ring.enter(layout)
    results, record = undergo(arena, kill)
    changed = [i for i, stream in enumerate(results) if stream.answer != undisturbed[i]]
    record |= {"layout": layout, "lost": len(changed)}
    print(summary(record))
    if file := request.config.getoption("--stalls"):
        with open(file, "a") as lines:
            lines.write(json.dumps(record) + "\n")
    assert not changed, {
        i: results[i].error or _difference(results[i].answer, undisturbed[i]) for i in changed
    }
    arena.observer.wait_equal(before)
    assert record["in_time"], "the streams were too fast for this death"
    ring.leave()


def _difference(answer, wanted):
    """How an answer that came to an end differs."""
    (tokens, *_, reason, _), (expected, *_, wanted_reason, _) = answer, wanted
    common = next((i for i, pair in enumerate(zip(tokens or [], expected)) if pair[0] != pair[1]), None)
    return f"{reason} after {len(tokens or [])} tokens, not {wanted_reason} after {len(expected)}; first other: {common}"
