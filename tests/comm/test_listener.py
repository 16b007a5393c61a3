from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1_cluster.comm import handshake, wire
from r1_cluster.comm import listener as listener_module
from r1_cluster.comm.handshake import Hello, admit, greet
from r1_cluster.comm.links import wait_any
from r1_cluster.comm.listener import Listener, connect
from r1_cluster.comm.wire import AuthenticationError, Header, LinkClosed, LinkError, LinkTimeout, WireError

ME = Hello("router0", "a1", 7, "tensor")


def wait_until(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def recording(sock: socket.socket, sent: bytearray) -> socket.socket:
    """The socket, keeping what is sent through it."""

    class Recording(socket.socket):
        def sendall(self, data, *args):
            sent.extend(data)
            return super().sendall(data, *args)

    return Recording(fileno=sock.detach())


@pytest.mark.parametrize("force_tcp", [False, True])
def test_both_sides_know_each_other(listener, secret, force_tcp):
    link = connect(listener.address, ME, secret, force_tcp=force_tcp)
    family = socket.AF_INET if force_tcp else socket.AF_UNIX
    assert link._sock.family == family
    assert wait_any([listener], 5) == [listener]
    hello, other = listener.accept(0)
    assert hello == ME
    assert (link.peer, other.peer) == ("server", "router0")
    link.send(Header(1, step=1), (), b"x")
    other.send(Header(1, step=2))
    assert other.recv(1).body == b"x"
    assert link.recv(1).header.step == 2
    assert wait_any([listener], 0.02) == []
    assert listener.rejected == 0
    link.close()
    other.close()


def test_another_host_is_reached_by_tcp(listener, secret):
    elsewhere = msgspec.structs.replace(listener.address, host_id="another boot/1", unix_name="nobody")
    link = connect(elsewhere, ME, secret)
    assert link._sock.family == socket.AF_INET
    link.close()


@pytest.mark.parametrize("force_tcp", [False, True])
def test_a_wrong_secret_is_refused_by_either_side(listener, secret, force_tcp):
    with pytest.raises(AuthenticationError, match="same secret"):
        connect(listener.address, ME, b"w" * 32, force_tcp=force_tcp)
    wait_until(lambda: listener.rejected == 1)
    with pytest.raises(LinkTimeout):
        listener.accept(0.05)


def test_the_listener_does_not_take_the_diallers_word(secret):
    """A dialler that skips checking the listener's MAC still needs the secret for its own."""
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as pool:
        admitted = pool.submit(admit, far, "server", secret, 5)
        deadline = time.monotonic() + 5
        handshake._send_frame(near, handshake._Opening(wire.VERSION, ME, b"n" * 32), deadline)
        challenge = handshake._recv_frame(near, handshake._Challenge, deadline)
        # The best it can do without the secret: hand the listener its own MAC back.
        handshake._send_frame(near, handshake._Proof(challenge.mac), deadline)
        with pytest.raises(AuthenticationError, match="same secret"):
            admitted.result(5)


def test_a_replayed_transcript_is_refused(secret):
    sent = bytearray()
    near, far = socket.socketpair()
    near = recording(near, sent)
    with near, far, ThreadPoolExecutor(1) as pool:
        admitted = pool.submit(admit, far, "server", secret, 5)
        greet(near, "server", ME, secret, 5)
        assert admitted.result(5) == ME
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as pool:
        admitted = pool.submit(admit, far, "server", secret, 5)
        near.sendall(sent)
        with pytest.raises(AuthenticationError):
            admitted.result(5)


def test_each_field_of_the_hello_is_bound_into_the_proof(secret):
    """Someone in the middle who changes what the dialler said breaks the MAC."""
    for forged in (
        msgspec.structs.replace(ME, peer="router1"),
        msgspec.structs.replace(ME, incarnation="a2"),
        msgspec.structs.replace(ME, epoch=8),
        msgspec.structs.replace(ME, purpose="control"),
    ):
        opening = handshake._Opening(wire.VERSION, ME, b"n" * 32)
        challenge = handshake._Challenge("server", b"m" * 32, b"")
        assert handshake._mac(secret, b"dialler", opening, challenge) != handshake._mac(
            secret, b"dialler", msgspec.structs.replace(opening, hello=forged), challenge
        )
        other = msgspec.structs.replace(challenge, listener="server2")
        assert handshake._mac(secret, b"dialler", opening, challenge) != handshake._mac(
            secret, b"dialler", opening, other
        )


def test_somebody_else_at_the_address_is_noticed(listener, secret):
    stale = msgspec.structs.replace(listener.address, name="expert3")
    with pytest.raises(AuthenticationError, match="expected expert3, found server"):
        connect(stale, ME, secret)
    wait_until(lambda: listener.rejected == 1)


@pytest.mark.slow
def test_slow_peers_keep_nobody_waiting_and_are_dropped(secret):
    listener = Listener("server", secret, "127.0.0.1", (0, 0), handshake_timeout_s=2.0)
    address = (listener.address.host, listener.address.port)
    silent = [socket.create_connection(address) for _ in range(5)]
    dribbling = socket.create_connection(address)
    stop = threading.Event()

    def dribble():
        while not stop.wait(0.1):
            try:
                dribbling.sendall(b"\x00\x01"[:1])
            except OSError:
                return

    with ThreadPoolExecutor(1) as pool:
        pool.submit(dribble)
        link = connect(listener.address, ME, secret)
        hello, other = listener.accept(5)
        assert hello == ME
        assert listener.rejected == 0, "it was let in while the others were still at it"
        wait_until(lambda: listener.rejected == 6, 20)
        stop.set()
    for end in (*silent, dribbling, link, other, listener):
        end.close()


def test_a_flood_of_silent_peers_gives_way_to_new_ones(secret):
    listener = Listener("server", secret, "127.0.0.1", (0, 0), handshake_timeout_s=60)
    address = (listener.address.host, listener.address.port)
    silent = [socket.create_connection(address) for _ in range(listener_module.MAX_PENDING + 20)]
    link = connect(listener.address, ME, secret, 20, force_tcp=True)
    hello, other = listener.accept(20)
    assert hello == ME
    wait_until(lambda: listener.rejected == 21, 20)  # as many as were too many with the new one
    for end in (*silent, link, other, listener):
        end.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.booleans())
def test_rubbish_in_a_handshake_is_an_error_and_never_hangs(secret, data, framed):
    near, far = socket.socketpair()
    with near, far:
        near.sendall(handshake._LENGTH.pack(len(data)) + data if framed else data)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises((WireError, LinkClosed, AuthenticationError)):
            admit(far, "server", secret, 2)


def test_nobody_there(secret):
    listener = Listener("server", secret, "127.0.0.1", (0, 0))
    address = listener.address
    listener.close()
    assert listener.fileno() == -1
    with pytest.raises(LinkClosed):
        listener.accept(1)
    for force_tcp in (False, True):
        with pytest.raises(LinkClosed, match=f"server at 127.0.0.1:{address.port}"):
            connect(address, ME, secret, force_tcp=force_tcp)


def test_ports_come_from_the_range(secret):
    first = Listener("first", secret, "127.0.0.1", (0, 0))
    port = first.address.port
    with pytest.raises(LinkError, match=f"no port from {port} to {port} is free"):
        Listener("second", secret, "127.0.0.1", (port, port))
    second = Listener("second", secret, "127.0.0.1", (port, port + 50))
    assert port < second.address.port <= port + 50
    first.close()
    second.close()
    with pytest.raises(LinkError, match=r"can't listen at 192\.0\.2\.1"):
        Listener("third", secret, "192.0.2.1", (port, port))


def test_a_short_secret_is_refused(listener):
    with pytest.raises(ValueError, match="at least 16"):
        connect(listener.address, ME, b"short")
    with pytest.raises(ValueError, match="at least 16"):
        Listener("server", b"short", "127.0.0.1", (0, 0))


def test_close_drops_what_nobody_took(secret):
    listener = Listener("server", secret, "127.0.0.1", (0, 0))
    link = connect(listener.address, ME, secret)
    assert wait_any([listener], 5)
    threads = {thread.name for thread in threading.enumerate()}
    assert "listener-server" in threads
    listener.close()
    listener.close()
    with pytest.raises(LinkClosed):
        link.recv(2)
    assert "listener-server" not in {thread.name for thread in threading.enumerate()}
