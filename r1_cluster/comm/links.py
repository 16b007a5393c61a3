"""Links: ordered, reliable pipes of messages between two roles.

`TcpLink` carries them over a TCP or Unix stream socket, `LocalLink` over a function call,
`process_group.ProcessGroupLink` over a socket (headers) and NCCL or gloo (payload).
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from r1_cluster.comm import wire
from r1_cluster.comm.wire import (
    Header,
    LinkClosed,
    LinkTimeout,
    Message,
    StaleEpoch,
    Unsendable,
    WireError,
    WireSpec,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Device = str | torch.device

# A message that has begun gets at least this long to end, however short the caller's own timeout was.
STALL_S = 1.0
# A peer may leave its buffers full for so long, unless the link says otherwise.
SEND_TIMEOUT_S = 10.0
# A host that vanished shows after so long, also on a link with data under way, which keepalive leaves alone.
# A peer that reads nothing for so long while its buffers are full counts as gone, too.
PEER_TIMEOUT_S = 4
# Processes that wait for each other within a layer mostly do so for less than this. Whoever sleeps is woken
# late: by 0.1 ms, and by several where a machine is virtual or has other work.
AWAKE_S = 1e-3
# The kernel takes at most this for a Unix socket; TCP tunes its own buffers to more than this.
UNIX_BUFFER_BYTES = 4 << 20
_TIMEVAL = struct.Struct("@ll")


@dataclass(slots=True)
class Traffic:
    """What one end of a link has sent and received: whole messages; bytes of headers, bodies and tensors,
    whichever way those go. Who sends counts what is sent, who receives what is received, so that nothing is
    locked; another thread that reads them may find a message less."""

    sent_messages: int = 0
    sent_bytes: int = 0
    received_messages: int = 0
    received_bytes: int = 0

    def add(self, other: Traffic) -> None:
        """Counts what `other` has counted, too."""
        self.sent_messages += other.sent_messages
        self.sent_bytes += other.sent_bytes
        self.received_messages += other.received_messages
        self.received_bytes += other.received_bytes


class Link(Protocol):
    """One end of a link. `peer` is the other end's name, `device` where the tensors are that it carries.
    `stale_dropped` counts messages of former epochs that `recv_epoch` dropped, `traffic` all messages.
    One thread may send while another receives; `close` may come from any thread and wakes both with
    LinkClosed."""

    peer: str
    device: Device
    stale_dropped: int
    traffic: Traffic

    @property
    def closed(self) -> bool: ...

    def fileno(self) -> int:
        """For `wait_any`; -1 once closed, and where nothing is ever waited for."""

    def send(self, header: Header, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        """Raises LinkClosed, LinkTimeout (the peer does not read), Unsendable (does not fit the format)."""

    def recv(self, timeout_s: float | None) -> Message:
        """The next message; None waits for ever, 0 takes what is there. Raises LinkClosed, LinkTimeout,
        WireError. After a LinkTimeout the link can still be used unless `closed` says otherwise: a message
        that broke off leaves the stream at an unknown place, so the link closes itself."""

    def close(self) -> None: ...


class Pollable(Protocol):
    """What `wait_any` can wait for: links and listeners. -1 once closed."""

    def fileno(self) -> int: ...


P = TypeVar("P", bound=Pollable)


class TcpLink:
    """A link over a connected TCP or Unix stream socket. Carries CPU tensors only: whoever has them on a
    device copies them first, because only the caller knows when that copy may wait.

    `send_timeout_s` bounds how long a peer may leave its receive buffer full. The socket is authenticated
    once, by the handshake; messages are neither signed nor encrypted after it.
    """

    def __init__(self, sock: socket.socket, peer: str, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        self.peer = peer
        self.device: Device = "cpu"
        self.stale_dropped = 0
        self.traffic = Traffic()
        self._send_timeout_s = send_timeout_s
        self._sock = sock
        self._closed = False
        self._recv_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._head = memoryview(bytearray(wire.HEADER_SIZE))
        self._armed_s: float | None = None
        _tune(sock)
        # Timeouts live in the kernel: Python's own would put a poll() before every call.
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(send_timeout_s))

    def __repr__(self) -> str:
        return f"TcpLink({self.peer!r}{', closed' if self._closed else ''})"

    @property
    def closed(self) -> bool:
        return self._closed

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, header: Header, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        buffers = []
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise Unsendable(f"a TcpLink carries CPU tensors, not {tensor.device}")
            buffers.append(wire.tensor_bytes(tensor.contiguous()))
        self._send([wire.encode_prefix(header, tensors, len(body)), body, *buffers])

    def recv(self, timeout_s: float | None) -> Message:
        try:
            with self._recv_lock:
                header, specs, body, deadline = self._recv_prefix(timeout_s)
                if header.flags & wire.Flags.EXTERNAL:
                    raise WireError("payload announced outside of a plain link")
                message = Message(header, [self._recv_tensor(spec, deadline) for spec in specs], body)
                self.traffic.received_messages += 1
                return message
        except (LinkClosed, WireError):
            self.close()
            raise
        except LinkTimeout:
            if self._closed:
                self.close()
            raise

    def send_announcement(self, header: Header, tensors: Sequence[Tensor], body: bytes) -> None:
        """Sends a message whose payload goes another way (EXTERNAL is set)."""
        external = header._replace(flags=header.flags | wire.Flags.EXTERNAL)
        self._send([wire.encode_prefix(external, tensors, len(body)), body])

    def recv_announcement(self, timeout_s: float | None) -> tuple[Header, list[WireSpec], bytes]:
        """Receives what `send_announcement` sent. Raises as `recv`."""
        try:
            with self._recv_lock:
                header, specs, body, _ = self._recv_prefix(timeout_s)
                self.traffic.received_messages += 1
        except (LinkClosed, WireError):
            self.close()
            raise
        except LinkTimeout:
            if self._closed:
                self.close()
            raise
        if not header.flags & wire.Flags.EXTERNAL:
            self.close()
            raise WireError("a process group's announcement was expected")
        return header._replace(flags=header.flags & ~wire.Flags.EXTERNAL), specs, body

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):  # the peer may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)
        # The descriptor's number may go to someone else once it is closed, so nobody may still be using it.
        with self._recv_lock, self._send_lock:
            self._sock.close()

    def _send(self, buffers: list[bytes | memoryview]) -> None:
        try:
            with self._send_lock:
                self._send_all(buffers)
                self.traffic.sent_messages += 1
        except (LinkClosed, LinkTimeout):
            self.close()
            raise

    def _send_all(self, buffers: list[bytes | memoryview]) -> None:
        remaining = sum(len(buffer) for buffer in buffers)
        while True:
            try:
                sent = self._sock.sendmsg(buffers, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                raise LinkTimeout(f"{self.peer} took nothing for {self._send_timeout_s} s") from None
            except OSError as error:
                raise self._gone(error) from None
            self.traffic.sent_bytes += sent
            remaining -= sent
            if not remaining:
                return
            buffers = _without_first(buffers, sent)

    def _recv_prefix(self, timeout_s: float | None) -> tuple[Header, list[WireSpec], bytes, float | None]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        received = self._recv_into(self._head, timeout_s)
        if deadline is not None:
            deadline = max(deadline, time.monotonic() + STALL_S)
        if received < wire.HEADER_SIZE:
            self._fill(self._head[received:], deadline)
        header, num_tensors, body_bytes = wire.decode_header(self._head)
        specs_bytes = num_tensors * wire.SPEC_SIZE
        if not specs_bytes + body_bytes:
            return header, [], b"", deadline
        rest = bytearray(specs_bytes + body_bytes)
        self._fill(memoryview(rest), deadline)
        return header, wire.decode_specs(rest, num_tensors), bytes(memoryview(rest)[specs_bytes:]), deadline

    def _recv_tensor(self, spec: WireSpec, deadline: float | None) -> Tensor:
        """One allocation each: the allocator's alignment keeps results bit-identical to those of tensors
        that never travelled."""
        import torch

        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self._fill(wire.tensor_bytes(tensor), deadline)
        return tensor

    def _fill(self, view: memoryview, deadline: float | None) -> None:
        """Reads `view` full, in the midst of a message: running out of time ends the link."""
        try:
            while len(view):
                timeout_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                view = view[self._recv_into(view, timeout_s) :]
        except LinkTimeout:
            self._closed = True
            raise LinkTimeout(f"{self.peer} broke off in the midst of a message") from None

    def _recv_into(self, view: memoryview, timeout_s: float | None) -> int:
        """At least one byte; all of `view` unless a timeout or a signal came in between."""
        flags = socket.MSG_WAITALL
        if timeout_s is not None and timeout_s <= 0:
            flags |= socket.MSG_DONTWAIT
        else:
            self._arm(timeout_s)
        try:
            received = self._sock.recv_into(view, 0, flags)
        except BlockingIOError:
            raise LinkTimeout(f"nothing from {self.peer} for {timeout_s} s") from None
        except OSError as error:
            raise self._gone(error) from None
        if not received:
            raise self._gone(None)
        self.traffic.received_bytes += received
        return received

    def _arm(self, timeout_s: float | None) -> None:
        """Sets the kernel's receive timeout, unless it stands at most 5 % later than asked for."""
        armed_s = self._armed_s
        if timeout_s == armed_s:
            return
        if timeout_s is not None and armed_s is not None and timeout_s <= armed_s <= timeout_s * 1.05:
            return
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_s))
        except OSError as error:
            raise self._gone(error) from None
        self._armed_s = timeout_s

    def _gone(self, error: OSError | None) -> LinkClosed:
        if self._closed:
            return LinkClosed(f"the link to {self.peer} was closed on this side")
        return LinkClosed(f"{self.peer} is gone{f': {error}' if error else ''}")


class LocalLink:
    """A link to a role in this process: `send` calls its handler, `recv` returns what it answered.

    What the handler raises reaches the sender. Tensors are handed over, not copied, and counted as if they
    had travelled.
    """

    def __init__(self, peer: str, handler: Callable[[Message], Message], device: Device = "cpu") -> None:
        self.peer = peer
        self.device = device
        self.stale_dropped = 0
        self.traffic = Traffic()
        self._handler = handler
        self._replies: deque[Message] = deque()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def fileno(self) -> int:
        return -1  # what was asked is answered already

    def send(self, header: Header, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        if self._closed:
            raise LinkClosed(f"the link to {self.peer} was closed on this side")
        message = Message(header, tensors, body)
        self._replies.append(self._handler(message))
        self.traffic.sent_messages += 1
        self.traffic.sent_bytes += wire.message_bytes(message)

    def recv(self, timeout_s: float | None) -> Message:
        if self._closed:
            raise LinkClosed(f"the link to {self.peer} was closed on this side")
        if not self._replies:
            raise LinkTimeout(f"{self.peer} was asked nothing that is not answered yet")
        reply = self._replies.popleft()
        self.traffic.received_messages += 1
        self.traffic.received_bytes += wire.message_bytes(reply)
        return reply

    def close(self) -> None:
        self._closed = True
        self._replies.clear()


def recv_epoch(link: Link, epoch: int, timeout_s: float | None) -> Message:
    """The next message of `epoch`; those of former epochs are dropped and counted in `link.stale_dropped`.

    Raises StaleEpoch where the peer is ahead of us, else as `Link.recv`.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        message = link.recv(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        if message.header.epoch == epoch:
            return message
        if message.header.epoch > epoch:
            raise StaleEpoch(f"{link.peer} is at epoch {message.header.epoch}, we are at {epoch}")
        link.stale_dropped += 1


def wait_any(links: Sequence[P], timeout_s: float | None) -> list[P]:
    """Those of `links` that have something to receive or are gone, in the order given; empty after
    `timeout_s`. A closed one counts as gone: its recv says so at once."""
    numbers = [link.fileno() for link in links]
    if -1 in numbers:
        return [link for link, number in zip(links, numbers, strict=True) if number < 0]
    poll = select.poll()
    for number in numbers:
        poll.register(number, select.POLLIN)
    ready = {number for number, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
    return [link for link, number in zip(links, numbers, strict=True) if number in ready]


def stay_awake(link: Pollable) -> None:
    """Returns when there is something to receive or the peer is gone, at the latest after AWAKE_S. Meanwhile
    whoever else needs this core has it first."""
    until = time.perf_counter() + AWAKE_S
    while not wait_any([link], 0.0) and time.perf_counter() < until:
        os.sched_yield()


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNIX_BUFFER_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Probes begin in silence; how many go unanswered is decided by the user timeout, not by their count.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_TIMEOUT_S * 1000)


def _timeval(timeout_s: float | None) -> bytes:
    """struct timeval; all zeros means no timeout, so a real one is at least a microsecond."""
    if timeout_s is None:
        return _TIMEVAL.pack(0, 0)
    microseconds = max(int(timeout_s * 1e6), 1)
    return _TIMEVAL.pack(*divmod(microseconds, 1_000_000))


def _without_first(buffers: list[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What is left of `buffers` after their first `sent` bytes."""
    rest: list[bytes | memoryview] = []
    for buffer in buffers:
        if sent >= len(buffer):
            sent -= len(buffer)
        else:
            rest.append(memoryview(buffer)[sent:])
            sent = 0
    return rest
