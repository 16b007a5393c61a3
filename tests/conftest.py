"""Services and the checkpoint that they serve; how the tests share the cores; the options of these tests."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has one core, and so have its children; read when torch is imported, which is below.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import running_service
from make_checkpoint import make_checkpoint


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
    by one to whoever is free, and first, so that none is left to run alone at the end. Those of a running service
    come layout after layout, so that each is started once."""
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker("slow")
    places = [i for i, item in enumerate(items) if "ring" in getattr(item, "fixturenames", ())]
    for i, item in zip(places, sorted((items[i] for i in places), key=_layout), strict=True):
        items[i] = item
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("apart") is None)
        for item in items:
            if item.get_closest_marker("apart") is None:
                item.add_marker(pytest.mark.xdist_group(item.location[0]))


def _layout(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("layout") or params.get("service", "colocated")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After the last of its tests the service ends, and does not run beside other tests."""
    if "ring" in item.fixturenames and "ring" not in getattr(nextitem, "fixturenames", ()):
        item.funcargs["ring"].close()


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
def ring(checkpoint, tmp_path_factory):
    """The services under test, one layout's after the other's, whichever file the tests are in. Tokens that only
    a text with SKULLS has kill whoever computes them."""
    from faults.arena import ENGINES, LAYOUTS, Arena, Ring
    from faults.load import SKULLS

    from r1_cluster.text.tokenizer import Tokenizer

    poison = Tokenizer.from_folder(checkpoint).encode(SKULLS)[4:12]
    ring = Ring(
        lambda layout: Arena(
            tmp_path_factory.mktemp(layout),
            checkpoint,
            LAYOUTS[layout],
            poison=poison,
            **ENGINES.get(layout, {}),
        )
    )
    yield ring
    ring.close()


@pytest.fixture(params=["colocated", "disaggregated"])
def service(ring, request):
    """The same model in each layout."""
    return ring.running(request.param).service
