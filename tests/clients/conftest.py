"""Clients meet the scripted server."""

import pytest
from scripted_server import ANSWER, ScriptedServer


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    with ScriptedServer(tmp_path_factory.mktemp("scripted")) as server:
        yield server


@pytest.fixture
def server(scripted):
    """The scripted server, with nothing in its books."""
    scripted.bodies.clear()
    scripted.prompts.clear()
    scripted.answer = ANSWER
    return scripted
