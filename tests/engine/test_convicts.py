"""Who is remembered as a request that kills, and for how long."""

import msgspec
import pytest

from r1_cluster.engine import convicts as module
from r1_cluster.engine.convicts import Convicts
from r1_cluster.records import Request, SamplingParams

POISON = Request("a", [1, 2, 3], SamplingParams(0.6, 0.95, 0, 17), 100, [], "sink")


def like(**changes):
    return msgspec.structs.replace(POISON, request_id="b", **changes)


def test_the_same_request_is_known_whoever_sends_it():
    convicts = Convicts()
    assert POISON not in convicts
    convicts.convict(POISON)
    assert like(sink="another", attempt=3, max_tokens=7, generated=[9]) in convicts
    assert like(sampling=SamplingParams(0.6, 0.95, 0, 18)) in convicts  # the ingress draws a seed each time


@pytest.mark.parametrize(
    "change", [{"prompt": [1, 2]}, {"prompt": [1, 2, 4]}, {"sampling": SamplingParams(0.7, 0.95, 0, 17)}]
)
def test_another_request_is_not(change):
    convicts = Convicts()
    convicts.convict(POISON)
    assert like(**change) not in convicts


def test_it_is_forgotten_after_a_while(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    convicts = Convicts()
    convicts.convict(POISON)
    now[0] = module.REMEMBERED_S - 1
    assert POISON in convicts
    now[0] = module.REMEMBERED_S + 1
    assert POISON not in convicts


def test_the_oldest_are_forgotten_where_there_are_many():
    convicts = Convicts()
    for i in range(module.MAX_REMEMBERED + 1):
        convicts.convict(like(prompt=[i]))
    assert like(prompt=[0]) not in convicts
    assert like(prompt=[1]) in convicts
