"""Clients meet the scripted server."""

import os

import pytest
from scripted_server import ANSWER, ScriptedServer

# Read when the clients are first imported: nothing of theirs may look beyond this machine.
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
}


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
