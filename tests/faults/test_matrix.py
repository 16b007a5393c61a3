"""Every kind of part × every kind of death × every time for it, under 16 streams, in both layouts: every
answer is as if nobody had died, and what the service holds afterwards is what it held before.

A few of them run always; `make test-faults` runs all.
"""

import itertools
import json

import pytest
from faults.arena import LAYOUTS, Arena, Kill, summary, undergo

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
NOT_YET = {}


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


class Ring:
    """The arena of a layout, made anew after a test that failed."""

    def __init__(self, folder, checkpoint, layout):
        self._begin = lambda: Arena(folder(), checkpoint, LAYOUTS[layout])
        self.arena = self._begin()
        self.undisturbed = [stream.answer for stream in self.arena.load().join()]
        self.spoiled = False

    def ready(self):
        if self.spoiled:
            self.spoiled = False
            self.close(well=False)
            self.arena = self._begin()
        return self.arena

    def close(self, well=True):
        try:
            self.arena.close()
        except AssertionError:
            if well:
                raise


@pytest.fixture(scope="module")
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def ring(layout, checkpoint, tmp_path_factory):
    ring = Ring(lambda: tmp_path_factory.mktemp(layout), checkpoint, layout)
    yield ring
    ring.close(well=not ring.spoiled)


@pytest.mark.parametrize(("layout", "kill"), cases(), indirect=["layout"])
def test_no_death_ends_or_changes_a_stream(ring, kill, request):
    arena = ring.ready()
    ring.spoiled = True
    before = arena.observer.holdings()
    results, record = undergo(arena, kill)
    changed = [i for i, stream in enumerate(results) if stream.answer != ring.undisturbed[i]]
    record["lost"] = len(changed)
    print(summary(record))
    if file := request.config.getoption("--stalls"):
        with open(file, "a") as lines:
            lines.write(json.dumps(record) + "\n")
    assert not changed, {i: results[i].error or "its tokens differ" for i in changed}
    assert all(tokens for tokens, *_ in ring.undisturbed)
    arena.observer.wait_equal(before)
    assert record["in_time"], "the streams were too fast for this death"
    ring.spoiled = False
