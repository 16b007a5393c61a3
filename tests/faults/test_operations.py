"""What an operator does, or a request, or an engine that was given up: under load, and no stream suffers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from faults.arena import ENGINE
from faults.load import SKULLS, streams
from running_service import alive

from r1_cluster.engine.recovery import MAX_RESTARTS

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
both_layouts = pytest.mark.parametrize(
    "layout", ["colocated", pytest.param("disaggregated", marks=pytest.mark.matrix)]
)


def decoding(load):
    """Waits until the streams are in the midst of their answers."""
    assert load.wait(lambda: load.decoding)
    assert load.mostly_open


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


class PoisonClient(threading.Thread):
    """Sends a request that kills workers, over and over, while streams run: the same one each time, or, with
    `variants`, so many different ones."""

    def __init__(self, service, load, variants=0):
        super().__init__(daemon=True)
        self.answers = []
        self._url, self._load = service.service.url, load
        self._variants = variants
        self.start()

    def run(self):
        (request,) = streams(1)
        with httpx.Client(base_url=self._url, timeout=150, trust_env=False) as http:
            while len(self.answers) < (self._variants or 500) and self._load.num_ended < len(
                self._load.streams
            ):
                words = f"variant {len(self.answers)}" if self._variants else "the same"
                message = {"role": "user", "content": f"{words}: a {SKULLS} b"}
                answer = http.post("/v1/chat/completions", json=request | {"messages": [message]})
                self.answers.append(answer)
                time.sleep(0.05)  # a client's own pace


@pytest.mark.parametrize(
    ("layout", "variants"),
    [
        pytest.param("colocated", 1, marks=pytest.mark.system),
        pytest.param("disaggregated", 5, marks=pytest.mark.matrix),
    ],
)
def test_clients_that_send_poison_again_and_again_disturb_nobody(ring, layout, variants):
    service, undisturbed, before = ring.enter(layout)
    engine = service.observer.ask()["engines"][0]
    load = service.load()
    decoding(load)
    clients = [PoisonClient(service, load, count) for count in (0, 0, variants)]
    assert [stream.answer for stream in load.join()] == undisturbed
    for client in clients:
        client.join()
    for answer in [answer for client in clients for answer in client.answers]:
        if answer.status_code == 200:  # an engine had taken it before its first death
            assert answer.text.endswith("data: [DONE]\n\n")
            error = json.loads(answer.text.split("data: ")[-2])["error"]
        else:
            assert answer.status_code == 400, answer.text
            assert answer.headers["x-should-retry"] == "false"
            error = answer.json()["error"]
        assert error["code"] == "request_convicted", error
    # Once it is convicted it is refused at once, and costs nothing.
    assert len(clients[0].answers) > 3
    assert {answer.status_code for answer in clients[0].answers[1:]} == {400}
    service.observer.wait_equal(before)
    after = service.observer.ask()["engines"][0]
    assert (after["replica"], after["pid"], after["health"]["status"]) == (
        engine["replica"],
        engine["pid"],
        "ready",
    )
    if variants > 1:  # more deaths of one worker than would end the engine, were they its own fault
        assert after["recoveries"] - engine["recoveries"] > MAX_RESTARTS
    ring.leave()


@pytest.mark.system
@both_layouts
def test_an_engine_that_wakes_up_deposed_changes_nothing(ring, layout):
    service, undisturbed, before = ring.enter(layout)
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
    ring.leave()


@pytest.mark.system
@pytest.mark.parametrize("layout", ["watched", pytest.param("guarded", marks=pytest.mark.matrix)])
def test_a_deposed_engine_that_wakes_up_ends_no_worker_of_its_successor(ring, layout):
    """A standby has taken over; what the former engine finds in its sockets then is not its workers' death."""
    service, undisturbed, before = ring.enter(layout)
    for _ in range(3):
        targets = service.targets()
        workers = {name: pid for name, pid in targets.pids.items() if name not in ("engine", "ingress")}
        load = service.load()
        decoding(load)
        at = service.inflict(targets, "engine", "stop")
        assert load.wait(lambda at=at: service.noticed(at, "engine") is not None, timeout_s=30)
        service.resume(targets.pids["engine"])
        assert [stream.answer for stream in load.join()] == undisturbed
        assert alive(targets.pids["engine"])
        assert [name for name, pid in workers.items() if not alive(pid)] == []
        service.observer.wait_equal(before)
    ring.leave()


@pytest.mark.system
@pytest.mark.parametrize("layout", ["colocated"])
def test_a_redeploy_under_load(ring, layout):
    service, undisturbed, before = ring.enter(layout)
    load = service.load()
    decoding(load)
    redeploy(service)
    late = service.load()
    assert [stream.answer for stream in load.join()] == undisturbed
    assert [stream.answer for stream in late.join()] == undisturbed
    service.observer.wait_equal(before, timeout_s=90)
    ring.leave()


@pytest.mark.system
@pytest.mark.parametrize("layout", ["colocated"])
def test_a_scale_down_under_load(ring, layout):
    service, undisturbed, before = ring.enter(layout)
    service.service.write(engine={**ENGINE, "replicas": 2})
    redeploy(service)
    service.observer.wait_for(
        lambda held: held["processes"] == {"Engine": 2, "Ingress": 1, "Worker": 2}, timeout_s=90
    )
    load = service.load()
    decoding(load)
    service.service.write(engine=ENGINE)
    redeploy(service)
    late = service.load()
    assert [stream.answer for stream in load.join()] == undisturbed
    assert [stream.answer for stream in late.join()] == undisturbed
    service.observer.wait_for(lambda held: held["processes"] == before["processes"], timeout_s=90)
    held = service.observer.holdings()
    assert (held["actors"], len(held["groups"]), held["links"]) == (1, 1, before["links"])
    ring.leave()


@pytest.mark.system
@both_layouts
def test_ctrl_c_during_a_recovery(ring, layout):
    service, _, _ = ring.enter(layout)
    targets = service.targets()
    service.observer.close()  # takes longer than a recovery
    load = service.load()
    decoding(load)
    service.inflict(targets, "stage-0", "kill")
    assert load.wait(lambda: load.quiet_for(0.2))
    service.close()  # checks the exit code, and that nothing is left
    # None ends without a word.
    assert all(stream.error is not None or stream.tokens is not None for stream in load.join())
