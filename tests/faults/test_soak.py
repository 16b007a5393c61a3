"""The soak, for some seconds; in full it is a command: `python tests/faults/soak.py`."""

import pytest
from faults.arena import LAYOUTS, Arena
from faults.load import streams
from faults.soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.system]


def test_twenty_seconds_of_deaths(checkpoint, tmp_path):
    arena = Arena(tmp_path, checkpoint, LAYOUTS["disaggregated"], requests=streams(8, max_tokens=60))
    try:
        report = soak(arena, seconds=20, every=6, clients=8, seed=11)
    finally:
        arena.close()
    print(report)
    assert report["wrong"] == []
    assert report["num_deaths"] >= 2
    assert report["streams"] >= 8
    assert report["leaked"] is None
