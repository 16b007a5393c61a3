"""What workers give to Ray's exporter."""

from collections import Counter

import pytest

from actors import metrics
from r1_cluster.comm.links import Traffic


@pytest.fixture
def exported(monkeypatch):
    """What was counted, by metric and the values of its tags."""
    seen = Counter()

    class Scripted:
        def __init__(self, name, description, tag_keys):
            self.name, self.keys = name, tag_keys

        def inc(self, value, tags):
            assert value > 0  # Ray takes nothing else
            assert tuple(tags) == self.keys
            seen[self.name, *tags.values()] += value

    monkeypatch.setattr(metrics, "Counter", Scripted)
    return seen


def test_totals_become_what_they_have_grown_by(exported):
    exporter = metrics.LinkTraffic()
    exporter.note("router-0", {"experts-0": Traffic(1, 10, 2, 20), "experts-1": Traffic(1, 100)}, 0.5)
    exporter.note("router-0", {"experts-0": Traffic(3, 30, 2, 20), "experts-1": Traffic(1, 100)}, 2.0)
    assert exported == {
        ("r1_link_messages_total", "router-0", "experts", "sent"): 4,
        ("r1_link_bytes_total", "router-0", "experts", "sent"): 130,
        ("r1_link_messages_total", "router-0", "experts", "received"): 2,
        ("r1_link_bytes_total", "router-0", "experts", "received"): 20,
        ("r1_waited_seconds_total", "router-0"): 2.0,
    }


def test_a_spare_that_takes_a_place_begins_to_wait_anew(exported):
    exporter = metrics.LinkTraffic()
    exporter.note("router-0", {}, 5.0)
    exporter.note("router-1", {}, 0.0)
    exporter.note("router-1", {}, 1.0)
    assert exported == {
        ("r1_waited_seconds_total", "router-0"): 5,
        ("r1_waited_seconds_total", "router-1"): 1,
    }
