"""Where links come from: one `Listener` per process, and `connect`.

A listener has a TCP port from a configured range and, for peers on the same host, an abstract Unix socket.
Each connection shakes hands on a thread of its own with a deadline, so that a slow or hostile peer keeps
nobody else waiting.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import select
import socket
import threading
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec

from r1_cluster.comm.handshake import HANDSHAKE_TIMEOUT_S, Hello, admit, check_secret, greet
from r1_cluster.comm.links import SEND_TIMEOUT_S, TcpLink
from r1_cluster.comm.wire import LinkClosed, LinkError, LinkTimeout

logger = logging.getLogger(__name__)

# Above this many handshakes at a time the oldest, which is the slowest, is given up for the newest.
MAX_PENDING = 64
_BACKLOG = 1024


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """Where and as whom a listener can be reached. Travels in control messages."""

    name: str
    host: str
    port: int
    host_id: str
    unix_name: str


@cache
def host_id() -> str:
    """Equal for two processes exactly when an abstract Unix socket can join them: same boot of the same
    kernel, same network namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/net').st_ino}"


def connect(
    endpoint: Endpoint,
    me: Hello,
    secret: bytes,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
    *,
    send_timeout_s: float = SEND_TIMEOUT_S,
    force_tcp: bool = False,
) -> TcpLink:
    """A link to the listener at `endpoint`, over its Unix socket where it is on our host.

    `timeout_s` bounds the connection and the handshake, each; `send_timeout_s` is the link's (see `TcpLink`).
    `force_tcp` is for measuring.
    Raises LinkClosed (nobody listens), LinkTimeout, AuthenticationError.
    """
    check_secret(secret)
    sock = None
    try:
        if endpoint.host_id == host_id() and not force_tcp:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s)
            sock.connect(b"\0" + endpoint.unix_name.encode())
        else:
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
        greet(sock, endpoint.name, me, secret, timeout_s)
        return TcpLink(sock, endpoint.name, send_timeout_s)
    except BaseException as error:
        if sock is not None:
            sock.close()
        where = f"{endpoint.name} at {endpoint.host}:{endpoint.port}"
        if isinstance(error, TimeoutError):
            raise LinkTimeout(f"{where} did not answer in {timeout_s} s") from None
        if isinstance(error, OSError):
            raise LinkClosed(f"can't reach {where}: {error}") from None
        raise


class Listener:
    """Accepts authenticated links. `fileno` is readable while one waits to be taken by `accept`, so that
    a listener can stand among links in `links.wait_any`.

    `host` is the address to bind and to tell others; `ports` the inclusive range to take a port from,
    (0, 0) for any. `rejected` counts connections that failed their handshake.
    Raises LinkError if no port of the range is free, ValueError for a short secret.
    """

    def __init__(
        self,
        name: str,
        secret: bytes,
        host: str,
        ports: tuple[int, int],
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        check_secret(secret)
        self.name = name
        self.rejected = 0
        self._secret = secret
        self._handshake_timeout_s = handshake_timeout_s
        self._tcp = bind_port(host, ports)
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix_name = f"r1-cluster/{secrets.token_hex(16)}"
        self._unix.bind(b"\0" + unix_name.encode())
        self._unix.listen(_BACKLOG)
        self.address = Endpoint(name, host, self._tcp.getsockname()[1], host_id(), unix_name)
        self._lock = threading.Lock()
        self._pending: dict[socket.socket, None] = {}
        self._accepted: deque[tuple[Hello, TcpLink]] = deque()
        self._num_accepted = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed = False
        self._thread = threading.Thread(target=self._accept_loop, name=f"listener-{name}", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return -1 if self._closed else self._num_accepted

    def accept(self, timeout_s: float | None) -> tuple[Hello, TcpLink]:
        """The next authenticated link and who is at its other end. Raises LinkTimeout, LinkClosed.

        For one thread, which is also the one that closes the listener.
        """
        if self._closed:
            raise LinkClosed(f"the listener of {self.name} is closed")
        poll = select.poll()
        poll.register(self._num_accepted, select.POLLIN)
        if not poll.poll(None if timeout_s is None else timeout_s * 1000):
            raise LinkTimeout(f"nobody connected to {self.name} for {timeout_s} s")
        os.eventfd_read(self._num_accepted)
        return self._accepted.popleft()

    def close(self) -> None:
        """Closes the listening sockets, handshakes under way and links that nobody took."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._tcp.close()
        self._unix.close()
        with self._lock:
            for sock in self._pending:
                _shut(sock)
            for _, link in self._accepted:
                link.close()
            os.close(self._num_accepted)
        os.close(self._stop)

    def _accept_loop(self) -> None:
        poll = select.poll()
        for fd in (self._tcp.fileno(), self._unix.fileno(), self._stop):
            poll.register(fd, select.POLLIN)
        servers = {self._tcp.fileno(): self._tcp, self._unix.fileno(): self._unix}
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop:
                    return
                try:
                    sock, _ = servers[fd].accept()
                except OSError as error:
                    # The peer left at once, or this process is out of descriptors for now; without the
                    # pause the latter would spin, because the connection stays in the queue.
                    logger.warning("listener of %s: %s", self.name, error)
                    poll_stop = select.poll()
                    poll_stop.register(self._stop, select.POLLIN)
                    poll_stop.poll(10)
                    continue
                self._start_handshake(sock)

    def _start_handshake(self, sock: socket.socket) -> None:
        with self._lock:
            if len(self._pending) >= MAX_PENDING:
                oldest = next(iter(self._pending))
                del self._pending[oldest]
                _shut(oldest)
            self._pending[sock] = None
        threading.Thread(target=self._handshake, args=(sock,), name="handshake", daemon=True).start()

    def _handshake(self, sock: socket.socket) -> None:
        try:
            hello = admit(sock, self.name, self._secret, self._handshake_timeout_s)
            link = TcpLink(sock, hello.peer)
        except (LinkError, OSError) as error:
            with self._lock:
                self._pending.pop(sock, None)
                self.rejected += 1
            sock.close()
            logger.warning("listener of %s dropped a connection: %s", self.name, error)
            return
        with self._lock:
            given_up = sock not in self._pending
            self._pending.pop(sock, None)
            if self._closed or given_up:
                self.rejected += 1
                link.close()
                return
            self._accepted.append((hello, link))
            os.eventfd_write(self._num_accepted, 1)


def bind_port(host: str, ports: tuple[int, int]) -> socket.socket:
    """A socket that listens at the first free port of the inclusive range. Raises LinkError."""
    low, high = ports
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(low, high + 1):
        try:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise LinkError(f"can't listen at {host}:{port}: {error.strerror}") from None
    raise LinkError(f"no port from {low} to {high} is free at {host}; widen the range")


def _shut(sock: socket.socket) -> None:
    """Wakes whoever works with the socket; that thread closes it."""
    with suppress(OSError):  # it may not be connected any more
        sock.shutdown(socket.SHUT_RDWR)
