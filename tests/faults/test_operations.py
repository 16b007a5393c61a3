"""What an operator does, or a request, or an engine that was given up: under load, and no stream suffers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.arena import ENGINE, LAYOUTS, Arena
from faults.load import streams
from running_service import alive

from r1_cluster.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
SKULLS = "☠☠☠☠☠☠"
both_layouts = pytest.mark.parametrize(
    "layout", ["colocated", pytest.param("disaggregated", marks=pytest.mark.matrix)]
)


@pytest.fixture
def arena(request, checkpoint, tmp_path_factory):
    """arena(layout, …) → a running service of its own; it is ended well, unless `broken` says so."""
    made = []

    def begin(layout, **options):
        made.append(Arena(tmp_path_factory.mktemp(layout), checkpoint, LAYOUTS[layout], **options))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def answers(arena):
    """What the arena's requests get while nothing is done to it."""
    ended = arena.load().join()
    assert [stream.error for stream in ended if stream.error is not None] == []
    return [stream.answer for stream in ended]


def decoding(load):
    """Waits until every stream has got some text; none has ended yet."""
    assert load.wait(lambda: all(len(stream.arrivals) >= 3 for stream in load.streams))
    assert load.num_ended == 0


def redeploy(arena):
    """Deploys the service file as it stands now; returns once the application runs."""
    script = Path(__file__).with_name("redeploy.py")
    done = subprocess.run(
        [sys.executable, script, arena.observer.address, arena.service.file],
        env=arena.service.environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr


@both_layouts
def test_a_poison_request_fails_alone(arena, checkpoint, layout):
    tokenizer = Tokenizer.from_folder(checkpoint)
    poison = tokenizer.encode(SKULLS)[4:12]
    service = arena(layout, poison=poison)
    before = service.observer.holdings()
    undisturbed = answers(service)
    load = service.load()
    decoding(load)
    (request,) = streams(1)
    poisonous = service.load([request | {"messages": [{"role": "user", "content": f"a {SKULLS} b"}]}])
    (victim,) = poisonous.join()
    assert victim.error is not None
    assert not victim.arrivals
    assert [stream.answer for stream in load.join()] == undisturbed
    service.observer.wait_equal(before)
    assert answers(service) == undisturbed


@both_layouts
def test_an_engine_that_wakes_up_deposed_changes_nothing(arena, layout):
    service = arena(layout)
    before = service.observer.holdings()
    undisturbed = answers(service)
    targets = service.targets()
    load = service.load()
    decoding(load)
    at = service.inflict(targets, "engine", "stop")
    assert load.wait(lambda: service.noticed(at, "engine") is not None, timeout_s=100)
    print(f"another engine began {service.noticed(at, 'engine')} s after the stop")
    if alive(targets.pids["engine"]):  # else it was not only deposed
        os.kill(targets.pids["engine"], signal.SIGCONT)
    assert [stream.answer for stream in load.join()] == undisturbed
    service.observer.wait_equal(before)
    assert not alive(targets.pids["engine"])


def test_a_redeploy_under_load(arena):
    service = arena("colocated", max_num_seqs=64)
    before = service.observer.holdings()
    undisturbed = answers(service)
    load = service.load()
    decoding(load)
    redeploy(service)
    late = answers(service)
    assert [stream.answer for stream in load.join()] == undisturbed
    assert late == undisturbed
    service.observer.wait_equal(before, timeout_s=90)


def test_a_scale_down_under_load(arena):
    service = arena("colocated", replicas=2)
    assert service.observer.holdings()["processes"] == {"Engine": 2, "Ingress": 1, "StageActor": 2}
    undisturbed = answers(service)
    load = service.load()
    decoding(load)
    service.service.write(engine={**ENGINE, "replicas": 1})
    redeploy(service)
    late = answers(service)
    assert [stream.answer for stream in load.join()] == undisturbed
    assert late == undisturbed
    service.observer.wait_for(
        lambda held: (
            held["processes"] == {"Engine": 1, "Ingress": 1, "StageActor": 1}
            and held["actors"] == len(held["groups"]) == 1
        ),
        timeout_s=90,
    )


@both_layouts
def test_ctrl_c_during_a_recovery(arena, layout):
    service = arena(layout)
    targets = service.targets()
    service.observer.close()  # takes longer than a recovery
    load = service.load()
    decoding(load)
    service.inflict(targets, "stage-0", "kill")
    assert load.wait(lambda: load.quiet_for(0.2))
    service.close()  # checks the exit code, and that nothing is left
    assert all(stream.error is not None for stream in load.join())
