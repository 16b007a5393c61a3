"""Every kind of part × every kind of death × every time for it, under 16 streams, in both layouts: every
answer is as if nobody had died, and what the service holds afterwards is what it held before.

A few of them run always; `make test-faults` runs all.
"""

import itertools
import json

import pytest
from faults.arena import LAYOUTS, Arena, Kill, Ring, summary, undergo

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PARTS = {
    "disaggregated": ["experts-1", "router-0", "stage-0", "stage-1", "engine"],
    "colocated": ["stage-0", "engine"],
}
FAST = {
    "disaggregated": {
        ("experts-1", "kill", "decode"),
        ("experts-1", "stop", "decode"),
        ("router-0", "kill", "prefill"),
        ("router-0", "cut", "decode"),
        ("stage-0", "kill", "decode"),
        ("stage-0", "exception", "prefill"),
        ("stage-1", "stop", "decode"),
        ("engine", "kill", "decode"),
        ("router-0", "kill", "recovery"),
    },
    "colocated": {("stage-0", "kill", "decode"), ("engine", "kill", "prefill")},
}
# What the product cannot do yet: (layout, part, how, when), None for any → why.
NOT_YET = {
    (None, "engine", "stop", None): "an engine that hangs is found by Serve's health check alone, after 30 s",
    (
        None,
        "engine",
        "cut",
        None,
    ): "an engine that loses its link to an ingress gives up that ingress's requests",
    (
        None,
        "engine",
        "exception",
        None,
    ): "an engine that fails ends its requests with an error, not with a retry",
    (
        "colocated",
        None,
        "kill",
        "recovery",
    ): "with engine and worker dead the epoch begins at 1 again: tokens are dropped",
    (None, "stage-0", "stop", "recovery"): "an engine that takes over waits for ever for a worker that hangs",
}


def cases():
    for layout, parts in PARTS.items():
        for case in itertools.product(
            parts, ("kill", "stop", "cut", "exception"), ("prefill", "decode", "recovery")
        ):
            if layout == "colocated" and case == ("stage-0", "cut", "recovery"):
                continue  # its one link is the engine's, which is dead then
            marks = [] if case in FAST[layout] else [pytest.mark.matrix]
            for pattern, reason in NOT_YET.items():
                if all(wanted in (None, given) for wanted, given in zip(pattern, (layout, *case))):
                    marks.append(pytest.mark.xfail(strict=False, reason=reason))
            yield pytest.param(layout, Kill(*case), marks=marks, id="-".join((layout, *case)))


@pytest.fixture(scope="module")
def ring(checkpoint, tmp_path_factory):
    ring = Ring(lambda layout: Arena(tmp_path_factory.mktemp(layout), checkpoint, LAYOUTS[layout]))
    yield ring
    ring.close()


@pytest.mark.parametrize(("layout", "kill"), cases())
def test_no_death_ends_or_changes_a_stream(ring, layout, kill, request):
    arena, undisturbed, before = ring.enter(layout)
    results, record = undergo(arena, kill)
    changed = [i for i, stream in enumerate(results) if stream.answer != undisturbed[i]]
    record["lost"] = len(changed)
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
