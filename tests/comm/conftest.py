"""Two ends of a link, in one process or in two."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import msgspec
import pytest
from expert_shards import Shard

from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.listener import Listener

SECRET = bytes(range(32))

# What a peer process starts with: `link`, connected to the endpoint in argv.
PEER_PREAMBLE = """
import os, signal, sys, threading, time
import msgspec, torch
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import wait_any
from r1_cluster.comm.listener import Endpoint, connect
from r1_cluster.comm.wire import *
torch.set_num_threads(1)
endpoint = msgspec.json.decode(sys.argv[1], type=Endpoint)
link = connect(endpoint, Hello(sys.argv[2], "1", 0, "tensor"), bytes(range(32)), 20)
"""


@pytest.fixture
def secret() -> bytes:
    return SECRET


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener("server", SECRET, "127.0.0.1", (0, 0))
    yield listener
    listener.close()


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[TcpLink, TcpLink]]:
    """Two connected links, without a handshake."""
    if request.param == "unix":
        left, right = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            left = socket.create_connection(server.getsockname())
            right, _ = server.accept()
    links = TcpLink(left, "right"), TcpLink(right, "left")
    yield links
    for link in links:
        link.close()


@pytest.fixture
def start_peer(listener: Listener) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], TcpLink]]]:
    """start(script, *args) → a process that runs `script` with `link` connected to us, and our end of it."""
    started = []

    def start(script: str, *args: str) -> tuple[subprocess.Popen[bytes], TcpLink]:
        name = f"peer{len(started)}"
        address = msgspec.json.encode(listener.address).decode()
        process = subprocess.Popen([sys.executable, "-c", PEER_PREAMBLE + script, address, name, *args])
        started.append(process)
        hello, link = listener.accept(60)
        assert hello.peer == link.peer == name
        return process, link

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def shards():
    """make(ranges) → shards behind sockets."""
    made = []

    def make(ranges):
        made.extend(Shard(f"expert{i}", experts) for i, experts in enumerate(ranges))
        return made[-len(ranges) :]

    yield make
    for shard in made:
        shard.stop()
