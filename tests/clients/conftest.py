"""Clients meet the scripted server."""

import os

import pytest
from make_checkpoint import make_checkpoint
from scripted_server import ANSWER, ScriptedServer

from r1_cluster.text.template import ChatTemplate
from r1_cluster.text.tokenizer import Tokenizer

# Read when the clients are first imported: nothing of theirs may look beyond this machine.
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
}


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("scripted"), num_hidden_layers=1, n_routed_experts=8)
    tokenizer = Tokenizer.from_folder(folder)
    with ScriptedServer(tokenizer, ChatTemplate.from_folder(folder, tokenizer)) as server:
        yield server


@pytest.fixture
def server(scripted):
    """The scripted server, with nothing in its books."""
    scripted.bodies.clear()
    scripted.prompts.clear()
    scripted.answer = ANSWER
    return scripted
