"""What one client sends costs other clients' streams no pause, and the ingress no memory."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from running_service import descendants

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

LAYOUT = {"kind": "colocated", "cpus_per_worker": 0.5}
MIB = 2**20
MAX_ADDED_S = 0.05
MAX_ADDED_BYTES = 64 * MIB
REPEATS = 3
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def edge(start):
    return start("test-pauses", LAYOUT).wait_ready()


def answer(connection):
    """Status and body of an answer."""
    received = b""
    while more := connection.recv(65536):
        received += more
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def post(port, body):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return answer(connection)


def post_chunks(port, chunks):
    """Sends the whole body, whatever the service has answered meanwhile."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        got = []
        reader = threading.Thread(target=lambda: got.append(answer(connection)))
        reader.start()
        try:
            for chunk in chunks:
                connection.sendall(b"%x\r\n" % len(chunk) + chunk + b"\r\n")
        except OSError:
            pass  # the service has closed: it may, once it has refused
        reader.join()
        return got[0]


def chat(content="Hi", count=1):
    messages = [{"role": "user", "content": content}] * count
    return json.dumps({"model": "tiny", "messages": messages, "max_tokens": 1}).encode()


KEYS = b"{" + b",".join(b'"k%d":1' % i for i in range(150_000)) + b',"k149999":1}'
ATTACKS = {
    "4 MB of text": (lambda port: post(port, chat("word " * 800_000)), 400, b"context_length_exceeded"),
    "150,000 keys": (lambda port: post(port, KEYS), 400, b"stands there twice"),
    "16,384 messages": (lambda port: post(port, chat("", 16_384)), 400, b"context_length_exceeded"),
    "256 MiB in chunks": (lambda port: post_chunks(port, [b" " * MIB] * 256), 413, b"longer than"),
}


class Process:
    """A process's memory: all that it holds, of its own or shared."""

    def __init__(self, root, title):
        (self.folder,) = (
            Path(f"/proc/{pid}")
            for pid in descendants(root)
            if re.search(title, Path(f"/proc/{pid}/cmdline").read_text())
        )

    def _kilobytes(self, name):
        return int(re.search(rf"{name}:\s+(\d+) kB", (self.folder / "status").read_text())[1])

    def begin(self):
        (self.folder / "clear_refs").write_text("5")  # the peak is from now on
        self._before = self._kilobytes("VmRSS")

    def grown(self):
        """Bytes by which its peak since `begin` exceeds what it held then."""
        return 1024 * (self._kilobytes("VmHWM") - self._before)


def test_nothing_that_a_client_sends_pauses_streams(edge):
    """For each body, its longest pause in the best of three goes (what the edge itself costs is in each of them,
    what else the machine does is not) exceeds the longest pause of as much undisturbed time by less than 50 ms,
    and the ingress's memory, in the worst of them, never grows by more than 64 MiB."""
    ingress = Process(edge.process.pid, "ServeReplica.*Ingress")
    proxy = Process(edge.process.pid, "ProxyActor")
    script = Path(__file__).with_name("stream_gaps.py")
    client = subprocess.Popen(
        [sys.executable, script, str(edge.port), "8"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    time.sleep(3)
    for attack, status, words in ATTACKS.values():  # once to warm up: the first starts a process
        got, body = attack(edge.port)
        assert (got, words in body) == (status, True), body
    windows, quiet = {name: [] for name in ATTACKS}, []
    grown, proxy_grown = dict.fromkeys(ATTACKS, 0), dict.fromkeys(ATTACKS, 0)
    for _ in range(REPEATS):
        for name, (attack, status, _) in ATTACKS.items():
            ingress.begin()
            proxy.begin()
            began = time.monotonic()
            assert attack(edge.port)[0] == status
            ended = time.monotonic()
            windows[name].append((began, ended + 0.2))
            grown[name] = max(grown[name], ingress.grown())
            proxy_grown[name] = max(proxy_grown[name], proxy.grown())
            time.sleep(0.5)
            quiet.append((time.monotonic(), time.monotonic() + ended - began + 0.2))
            time.sleep(ended - began + 0.7)
    gaps = json.loads(client.communicate(timeout=30)[0])

    def longest(began, ended):
        within = [gap for at, gap in gaps if began <= at <= ended]
        assert within, "no stream was running"
        return max(within)

    undisturbed = max(longest(*window) for window in quiet)
    added = {name: min(longest(*w) for w in windows[name]) - undisturbed for name in ATTACKS}
    print(f"undisturbed: {1000 * undisturbed:.0f} ms at most")
    for name in ATTACKS:
        print(
            f"{name}: {1000 * added[name]:+.0f} ms, all of {[f'{longest(*w):.3f}' for w in windows[name]]}; memory of"
            f" the ingress {grown[name] / MIB:+.0f} MiB, of the proxy {proxy_grown[name] / MIB:+.0f} MiB"
        )
    assert max(added.values()) < MAX_ADDED_S
    assert max(grown.values()) < MAX_ADDED_BYTES
    assert httpx.get(f"{edge.url}/health").status_code == 200
