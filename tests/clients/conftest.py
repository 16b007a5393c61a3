"""Clients meet the scripted server."""

import pytest
from scripted_server import ScriptedServer


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    with ScriptedServer(tmp_path_factory.mktemp("scripted")) as server:
        yield server


@pytest.fixture
def server(scripted):
    """The scripted server, with nothing in its books."""
    scripted.forget()
    return scripted


@pytest.fixture
def slow_server(server, monkeypatch):
    """One that gives signs of life before its first token."""
    monkeypatch.setattr("r1_cluster.edge.sse.KEEP_ALIVE_S", 0.02)
    server.silence_s = 0.2
    return server
