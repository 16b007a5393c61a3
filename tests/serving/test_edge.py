"""The edge as Serve runs it: what the ways through its proxies make of requests; and that what one client sends
costs other clients' streams no pause, and the ingress no memory."""

import json
import re
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from faults.arena import ENGINE, SERVE
from running_service import descendants

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

RUNNING, QUEUED = ENGINE["max_num_seqs"], ENGINE["max_queued"]
BODY_TIMEOUT_S = SERVE["body_timeout_s"]
MIB = 2**20
MAX_ADDED_S = 0.05
MAX_ADDED_BYTES = 64 * MIB
REPEATS = 3
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\n"


@pytest.fixture
def edge(ring):
    return ring.running("colocated").service


def answer(connection):
    """Status and body of an answer, as soon as it is whole."""
    received = b""
    while more := connection.recv(65536):
        received += more
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length and len(body) == int(length[1]):
            break
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


def chat(content="Hi", count=1, **fields):
    messages = [{"role": "user", "content": content}] * count
    return json.dumps({"model": "tiny", "messages": messages, "max_tokens": 1, **fields}).encode()


LONG = {"max_tokens": 1900, "ignore_eos": True}


def request(body, *lines, version="1.1"):
    head = HEAD.replace("HTTP/1.1", f"HTTP/{version}") + "".join(f"{line}\r\n" for line in lines)
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connect(edge, data):
    connection = socket.create_connection(("127.0.0.1", edge.port), timeout=60)
    connection.sendall(data)
    return connection


def wait_idle(edge, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        (engine,) = edge.status()["engines"]
        if engine["running"] == engine["waiting"] == engine["pages_used"] == 0:
            return
    raise AssertionError(f"still held: {engine}")


def test_every_answer_has_a_request_id(edge):
    url = f"{edge.url}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    with httpx.Client() as http:
        for ask in (
            lambda **h: http.post(url, content=chat(), headers={**json_type, **h}),
            lambda **h: http.post(url, content=chat(stream=True), headers={**json_type, **h}),
            lambda **h: http.post(url, content=b"{", headers={**json_type, **h}),
            lambda **h: http.post(url, content=b"{}", headers={"content-type": "text/plain", **h}),
            lambda **h: http.get(url, headers=h),
            lambda **h: http.get(f"{edge.url}/nothing", headers=h),
            lambda **h: http.head(f"{edge.url}/health", headers=h),
            lambda **h: http.post(url, content=b" " * 2**25, headers={**json_type, **h}),
        ):
            for sent in ("mine", "x" * 200, None):
                answer = ask(**({} if sent is None else {"x-request-id": sent}))
                (given,) = answer.headers.get_list("x-request-id")
                assert (given == sent) == (sent == "mine")
                assert len(given) <= 128
                assert "x-r1-places" not in answer.headers


def test_the_same_request_id_twice_at_once_is_two_answers(edge):
    data = request(chat(max_tokens=24, seed=1), "x-request-id: same")
    connections = [connect(edge, data) for _ in range(4)]
    answers = [json.loads(answer(connection)[1]) for connection in connections]
    assert len({whole["id"] for whole in answers}) == 4
    assert len({whole["choices"][0]["message"]["reasoning_content"] for whole in answers}) == 1
    assert not any("same" in whole["id"] for whole in answers)
    for connection in connections:
        connection.close()


def test_http_1_0_gets_whole_answers_and_whole_streams(edge):
    for stream in (False, True):
        with connect(edge, request(chat(stream=stream, max_tokens=8), version="1.0")) as connection:
            status, body = answer(connection)
        assert status == 200
        if stream:
            assert body.startswith(b"data: {")
            assert body.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(body)["object"] == "chat.completion"


@pytest.mark.parametrize("length", [2**24 + 1, 10_000_000_000])
def test_a_long_body_is_refused_before_it_comes(edge, length):
    began = time.monotonic()
    with connect(edge, f"{HEAD}Content-Length: {length}\r\n\r\n".encode()) as connection:
        assert answer(connection)[0] == 413
    assert time.monotonic() - began < 2


def test_a_body_that_does_not_end_is_given_up(edge):
    began = time.monotonic()
    with connect(edge, f"{HEAD}Content-Length: 100\r\n\r\n{{".encode()) as connection:
        status, body = answer(connection)  # until the service closes
    assert (status, json.loads(body)["error"]["type"]) == (408, "invalid_request_error")
    assert BODY_TIMEOUT_S <= time.monotonic() - began < BODY_TIMEOUT_S + 5


def test_who_is_queued_has_its_headers_and_leaves_no_trace(edge):
    streams = [connect(edge, request(chat(stream=True, **LONG))) for _ in range(RUNNING + 4)]
    for connection in streams:
        assert b" 200 " in connection.recv(65536)
    # Without a stream nothing comes back until the end, and the client may tell Serve not to look for it.
    whole = [connect(edge, request(chat(**LONG), "x-request-disconnect-disabled: ?1")) for _ in range(2)]
    deadline = time.monotonic() + 10
    while edge.status()["engines"][0]["waiting"] < 6:
        assert time.monotonic() < deadline
    for connection in streams + whole:
        connection.close()
    wait_idle(edge)


def test_what_finds_no_place_is_told_so_at_once(edge):
    """Of many requests that come together, before those that found a place have had their turn."""
    count = 420
    data = request(chat(stream=True, **LONG))
    connections = [socket.create_connection(("127.0.0.1", edge.port), timeout=60) for _ in range(count)]
    began, refused = time.monotonic(), []
    for connection in connections:
        connection.sendall(data)
    waiting = dict.fromkeys(connections, b"")
    while len(refused) < count - RUNNING - QUEUED:
        assert time.monotonic() - began < 30, len(refused)
        for connection in select.select(list(waiting), [], [], 1.0)[0]:
            waiting[connection] += connection.recv(65536)
            if b"\r\n\r\n" in waiting[connection]:
                head = waiting.pop(connection).split(b"\r\n\r\n")[0].lower()
                if b" 429 " in head:
                    assert b"retry-after: 1" in head
                    refused.append(time.monotonic() - began)
    for connection in connections:
        connection.close()
    print(f"429: first after {refused[0]:.3f} s, last after {refused[-1]:.3f} s")
    assert refused[-1] < 1.0
    wait_idle(edge)


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


@pytest.mark.system
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
