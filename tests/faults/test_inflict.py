"""The harness itself: a link is cut under the hands of its owners, and no other."""

import os
import socket
import subprocess
import sys

import pytest
from faults.inflict import LINK_PORTS, cut_link, links_between, title
from faults.load import Stream, quantile

CHILD = """
import socket, sys
family, address = int(sys.argv[1]), eval(sys.argv[2])
links = [socket.socket(family, socket.SOCK_STREAM) for _ in range(2)]
for link in links:
    link.connect(address)
print("there", flush=True)
print([link.recv(1) for link in links], flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["unix", "tcp"])
def listener(request, tmp_path):
    if request.param == "unix":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(str(tmp_path / "socket"))
            server.listen()
            yield server
        return
    for port in LINK_PORTS:
        try:
            server = socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
        with server:
            yield server
        return


def test_every_link_between_two_processes_is_cut(listener):
    arguments = [sys.executable, "-c", CHILD, str(int(listener.family)), repr(listener.getsockname())]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        ends = [listener.accept()[0] for _ in range(2)]
        assert child.stdout.readline() == "there\n"
        here, there = socket.socketpair()
        assert cut_link(os.getpid(), os.getppid()) == 0
        assert len(list(links_between(child.pid, os.getpid()))) == 2
        assert cut_link(child.pid, os.getpid()) == 2
        assert child.stdout.readline() == "[b'', b'']\n"
        assert [end.recv(1) for end in ends] == [b"", b""]
        here.sendall(b"x")
        assert there.recv(1) == b"x"
        child.stdin.close()
        for sock in (*ends, here, there):
            sock.close()
    assert list(links_between(os.getpid(), child.pid)) == []


def test_only_processes_of_ray_have_a_title():
    assert title(os.getpid()) is None
    assert title(2**22 + 1) is None


def test_pauses_count_from_the_death():
    stream = Stream(began=0.0, arrivals=[1.0, 1.1, 4.0, 4.5])
    assert stream.pauses(since=2.0) == [2.0, 0.5]
    assert stream.stalls(since=4.4) == [0.1]
    assert stream.stalls(since=5.0) == []
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([], 0.5) is None
