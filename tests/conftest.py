"""Services and the checkpoint that they serve; the options of these tests."""

import re

import pytest
from make_checkpoint import make_checkpoint
from running_service import Service, alive

LAYOUTS = {
    "colocated": {"kind": "colocated", "cpus_per_worker": 0.5},
    "disaggregated": {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "cpus_per_worker": 0.2},
}


def pytest_addoption(parser):
    parser.addoption("--stalls", metavar="FILE", help="append every fault's stalls to this file (JSON lines)")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random checkpoint; its texts are gibberish, but every token depends on all tokens before it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, size="nano", seed=3, max_position_embeddings=2048)
    return folder


@pytest.fixture(scope="session")
def start(checkpoint, tmp_path_factory):
    """start(name, layout, environment, **sections) → Service; whatever still runs at the end is interrupted."""
    running = []

    def begin(name, layout, environment=None, **sections):
        folder = tmp_path_factory.mktemp(name)
        running.append(Service(folder, name, checkpoint, layout, environment, **sections))
        return running[-1]

    yield begin
    for service in running:
        service.interrupt()


@pytest.fixture(scope="session", params=LAYOUTS)
def service(request, start):
    """The same model in each layout, one after the other."""
    running = start(f"test-{request.param}", LAYOUTS[request.param]).wait_ready()
    yield running
    code, pids = running.interrupt()
    assert code == 0, running.log.read_text()
    left = [pid for pid in pids if alive(pid)]
    assert not left, f"processes left behind: {left}\n{running.log.read_text()}"
    assert re.search(r"stopped\s*$", running.log.read_text())
