"""Services and the checkpoint that they serve; how the tests share the cores; the options of these tests."""

import os
import re

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has one core, and so have its children; read when torch is imported, which is below.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import running_service
from make_checkpoint import make_checkpoint
from running_service import Service, alive

LAYOUTS = {
    "colocated": {"kind": "colocated", "cpus_per_worker": 0.5},
    "disaggregated": {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "cpus_per_worker": 0.2},
}


def pytest_addoption(parser):
    parser.addoption("--stalls", metavar="FILE", help="append every fault's stalls to this file (JSON lines)")


def pytest_configure(config):
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        # How long an example takes says nothing where others use the cores, too.
        settings.register_profile("tests", settings(), deadline=None)
        settings.load_profile("tests")


def pytest_collection_modifyitems(config, items):
    """Among parallel workers a file's tests stay together, for they share fixtures. Those marked `apart` go one
    by one to whoever is free, and first, so that none is left to run alone at the end."""
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker("slow")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("apart") is None)
        for item in items:
            if item.get_closest_marker("apart") is None:
                item.add_marker(pytest.mark.xdist_group(item.location[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    running_service.allowed = item.get_closest_marker("cluster") is not None
    return (yield)


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
