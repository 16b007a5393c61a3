"""Which engine process an ingress asks first."""

import asyncio
from types import SimpleNamespace

import pytest

from actors import routing
from actors.routing import OfficeRouter, avoid, trust


class Replica:
    def __init__(self, name):
        self.replica_id = SimpleNamespace(unique_id=name)


@pytest.fixture
def ranks(monkeypatch):
    """ranks(*names) → the ranks that the router gives to replicas so called."""
    monkeypatch.setattr(routing, "AVOIDED", {})

    def choose(*names):
        replicas = [Replica(name) for name in names]
        chosen = asyncio.run(OfficeRouter.choose_replicas(object.__new__(OfficeRouter), replicas))
        return [[replica.replica_id.unique_id for replica in rank] for rank in chosen]

    return choose


def test_all_are_asked_until_something_is_known(ranks):
    assert ranks("a", "b") == [["a", "b"]]


def test_a_standby_is_asked_only_where_there_is_nobody_else(ranks):
    avoid("a")
    assert ranks("a", "b") == [["b"]]
    assert ranks("a") == [["a"]]
    trust("a")
    assert ranks("a", "b") == [["a", "b"]]


def test_who_was_avoided_longest_ago_is_asked_first_and_who_hangs_last(ranks):
    avoid("hung", hangs=True)
    avoid("first")
    avoid("second")
    assert ranks("second", "hung", "first") == [["first"], ["second"], ["hung"]]


def test_a_grudge_is_not_borne_for_ever(ranks, monkeypatch):
    avoid("a")
    monkeypatch.setattr(routing, "AVOID_S", -1.0)
    assert ranks("a", "b") == [["a", "b"]]
