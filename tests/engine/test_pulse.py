"""A watcher notices at once when an engine is gone, and soon when it hangs."""

import os
import threading
import time

import pytest

from r1_cluster.comm.listener import Listener
from r1_cluster.engine.pulse import SILENCE_S, Pulse, lives, watch

SECRET = b"a secret for tests only"


def pulse(well=lambda: True, beat=lambda: None):
    return Pulse(Listener("engine", SECRET, "127.0.0.1", (21000, 23999)), well, beat)


def watched(endpoint, stopped=lambda: False):
    thread = threading.Thread(target=watch, args=([endpoint], "standby", SECRET, stopped))
    thread.start()
    return thread


@pytest.mark.slow
def test_a_beating_engine_is_watched_until_it_ends():
    beats = []
    engine = pulse(beat=lambda: beats.append(1))
    assert lives(engine.endpoint, "standby", SECRET)
    watcher = watched(engine.endpoint)
    watcher.join(2 * SILENCE_S)
    assert watcher.is_alive()
    began = time.monotonic()
    engine.close()
    watcher.join(10)
    assert not watcher.is_alive()
    assert time.monotonic() - began < SILENCE_S
    assert len(beats) > 3
    assert not lives(engine.endpoint, "standby", SECRET)


@pytest.mark.slow
def test_an_engine_that_hangs_is_a_vacancy():
    well = [True]
    engine = pulse(well=lambda: well[0])
    watcher = watched(engine.endpoint)
    watcher.join(0.5)
    assert watcher.is_alive()
    well[0] = False
    watcher.join(SILENCE_S + 5)
    assert not watcher.is_alive()
    assert not lives(engine.endpoint, "standby", SECRET)
    engine.close()


@pytest.mark.slow
def test_who_has_left_is_let_go_by_an_engine_that_does_not_beat():
    """It may stand by for days, and be watched again and again."""
    engine = pulse(well=lambda: False)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert not lives(engine.endpoint, "standby", SECRET)
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before:
        assert time.monotonic() < deadline
    engine.close()


def test_a_watcher_can_be_stopped():
    engine = pulse()
    stop = threading.Event()
    watcher = watched(engine.endpoint, stop.is_set)
    stop.set()
    watcher.join(5)
    assert not watcher.is_alive()
    engine.close()
