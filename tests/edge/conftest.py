"""An edge as Serve runs it, by the server that Serve uses, over a backend that does what a test tells it to."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest
import uvicorn
from make_checkpoint import make_checkpoint

from r1_cluster.config import Sampling
from r1_cluster.edge.app import build_edge
from r1_cluster.edge.body import BodyReader
from r1_cluster.edge.prepare import PrepareOptions


class Backend:
    """Answers with the body that it was given; `script` takes its place where one is set."""

    places = 320

    def __init__(self):
        self.script = None
        self.closed = None
        self.status = "ready"
        self.bodies = []

    async def health(self):
        return {"status": self.status}

    def model_card(self):
        return {"id": "org/tiny", "max_model_len": 128}

    def enter(self):
        if self.closed is not None:
            raise self.closed

    async def chat(self, body):
        self.bodies.append(body)
        if self.script is not None:
            return await self.script(body)
        return {"bytes": len(body)}


@contextlib.contextmanager
def serving(app):
    """The port of a uvicorn that serves `app`, set up as Serve's proxies set theirs up."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="off", access_log=False, log_config=None, timeout_keep_alive=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="session")
def backend():
    return Backend()


@pytest.fixture(autouse=True)
def fresh(request):
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend").__init__()


@pytest.fixture(scope="session")
def reader():
    return BodyReader(100_000, 1.0, max_held_bytes=300_000)


@pytest.fixture(scope="session")
def port(backend, reader):
    with serving(build_edge(backend, reader, cors_origins=["https://chat.example"])) as number:
        yield number


class Reply:
    """An answer as it came over the socket: status, headers by lower-case name, body; `data` is all of it."""

    def __init__(self, data):
        self.data = data
        head, _, self.body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.version, status = first.split()[:2]
        self.status = int(status)
        self.headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.headers.setdefault(name.lower(), []).append(value.strip())


@pytest.fixture
def raw(port):
    """raw(bytes) → Reply: sends them as they are, and reads until the server closes or the answer is whole."""

    def send(data, timeout_s=10.0):
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
            connection.sendall(data)
            received = b""
            while more := connection.recv(65536):
                received += more
                head, end, body = received.partition(b"\r\n\r\n")
                reply = Reply(received)
                length = reply.headers.get("content-length")
                if end and length and len(body) >= int(length[0]) and b" 100 " not in head:
                    break
        return Reply(received)

    return send


@pytest.fixture
def post(raw):
    """post(body, *header lines, version) → Reply of the chat route."""

    def send(body, *headers, version="1.1", content_type="application/json"):
        lines = [
            f"POST /v1/chat/completions HTTP/{version}",
            "Host: test",
            f"Content-Length: {len(body)}",
            *headers,
        ]
        lines += [f"Content-Type: {content_type}"] if content_type is not None else []
        return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    return send


@pytest.fixture(scope="session")
def options(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("nano"), num_hidden_layers=1, n_routed_experts=8)
    return PrepareOptions(str(folder), "tiny", Sampling(), 128, 512)
