"""One service for the tests of a layout, whichever file they are in."""

import pytest
from faults.arena import ENGINES, LAYOUTS, Arena, Ring
from faults.load import SKULLS

from r1_cluster.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def ring(checkpoint, tmp_path_factory):
    """Tokens that only a text with SKULLS has kill whoever computes them."""
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


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After the last of its tests the service ends, and does not run beside other files' tests."""
    if "ring" in item.fixturenames and "ring" not in getattr(nextitem, "fixturenames", ()):
        item.funcargs["ring"].close()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Layout after layout: a service is started once."""
    places = [i for i, item in enumerate(items) if "ring" in getattr(item, "fixturenames", ())]
    order = list(LAYOUTS)
    tests = sorted((items[i] for i in places), key=lambda item: order.index(item.callspec.params["layout"]))
    for i, item in zip(places, tests, strict=True):
        items[i] = item
