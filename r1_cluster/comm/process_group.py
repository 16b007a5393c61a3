"""Links whose payload travels beside their socket: by NCCL, CUDA IPC, or the twins that tests run anywhere.

A `ProcessGroupLink` sends each message's header and descriptors over an authenticated socket and its
tensors by send/recv of a group of exactly two ranks. The class, the rendezvous and the watch over dead peers
are the same for all; a backend (`transports.py`) says how one tensor is sent and received.

Groups are built pairwise, so that losing one leaves the others, and directly: what the two ends must tell
each other to begin goes over their own socket (`LinkStore`), so there is no store to start, to reach, to
authenticate or to lose.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.rendezvous import LinkStore
from r1_cluster.comm.transports import Backend, Pair
from r1_cluster.comm.wire import (
    Header,
    LinkClosed,
    LinkError,
    LinkTimeout,
    Message,
    Unsendable,
    WireSpec,
)

if TYPE_CHECKING:
    from r1_cluster.comm.links import Device

logger = logging.getLogger(__name__)


class ProcessGroups:
    """All that a process needs for its process-group links, made once: the backend and a thread that notices
    dead peers. `timeout_s` bounds a rendezvous, and every transfer where the backend can."""

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self.backend = backend
        self._timeout_s = timeout_s
        self._watch = _PeerWatch()

    def join(self, header_link: TcpLink, rank: int) -> ProcessGroupLink:
        """Builds the two-rank group of `header_link`, which the new link owns from now on. The peer must
        call it at the same time, one side as rank 0 and the other as rank 1.

        Raises LinkClosed, LinkTimeout, WireError; `header_link` is closed then.
        """
        store = LinkStore(header_link, self._timeout_s)
        link: ProcessGroupLink | None = None
        try:
            pair = self.backend.pair(store, rank, self._timeout_s)
            link = ProcessGroupLink(header_link, pair, self._watch)
            self._watch.add(link)
            # The first transfer opens the connection: here, not in the first step.
            spec = WireSpec(torch.uint8, (1,))
            if rank == 0:
                pair.send(torch.zeros(1, dtype=torch.uint8, device=pair.device))
                pair.recv(spec).cpu()
            else:
                pair.recv(spec).cpu()
                pair.send(torch.zeros(1, dtype=torch.uint8, device=pair.device))
            store.finish()
            return link
        except Exception as error:
            (link or header_link).close()
            if isinstance(error, (LinkError, torch.OutOfMemoryError)):
                raise
            raise LinkClosed(f"no group with {header_link.peer}: {_first_line(error)}") from None

    def close(self) -> None:
        """Ends the watch. Links are closed by their owners."""
        self._watch.close()


class ProcessGroupLink:
    """A `Link` whose tensors live on the backend's device. See `links.Link` for the methods.

    With NCCL, `recv` returns before the payload is there. If the peer dies in between, the tensors hold
    garbage and only `closed` tells: look at it (`LinkDispatcher.lost` does) after the step's own host
    synchronisation and before anything is committed.
    """

    def __init__(self, header_link: TcpLink, pair: Pair, watch: _PeerWatch) -> None:
        self.peer = header_link.peer
        self.device: Device = pair.device
        self.stale_dropped = 0
        self.traffic = header_link.traffic  # which has counted what it took to form the group
        self._header_link = header_link
        self._pair = pair
        self._watch = watch
        self._close_lock = threading.Lock()
        self._gave_up = False

    @property
    def closed(self) -> bool:
        return self._header_link.closed or self._pair.broken

    def fileno(self) -> int:
        return self._header_link.fileno()

    def send(self, header: Header, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        for tensor in tensors:
            if tensor.device != self._pair.device:
                raise Unsendable(f"this link carries tensors of {self._pair.device}, not {tensor.device}")
        try:
            self._header_link.send_announcement(header, tensors, body)
            for tensor in tensors:
                if tensor.numel():
                    self._pair.send(tensor.contiguous())
                    self.traffic.sent_bytes += tensor.nbytes
        except (LinkError, RuntimeError) as error:
            raise self._failed(error) from None

    def recv(self, timeout_s: float | None) -> Message:
        try:
            header, specs, body = self._header_link.recv_announcement(timeout_s)
            return Message(header, [self._recv_tensor(spec) for spec in specs], body)
        except (LinkError, RuntimeError) as error:
            raise self._failed(error) from None

    def close(self) -> None:
        self._watch.remove(self)
        self._header_link.close()
        with self._close_lock:
            gave_up, self._gave_up = self._gave_up, True
        if not gave_up:
            try:
                self._pair.abort()
            except RuntimeError as error:
                logger.warning("giving up the group with %s: %s", self.peer, _first_line(error))

    def _recv_tensor(self, spec: WireSpec) -> Tensor:
        if 0 in spec.shape:
            return torch.empty(spec.shape, dtype=spec.dtype, device=self._pair.device)
        tensor = self._pair.recv(spec)
        self.traffic.received_bytes += spec.num_bytes
        return tensor

    def _failed(self, error: LinkError | RuntimeError) -> LinkError | RuntimeError:
        """What to raise. Not raised here: an error whose traceback has a frame that names it is a circle, and
        would keep this link's memory, and that of all callers, until the next collection."""
        if isinstance(error, LinkTimeout) and not self.closed:
            return error  # between messages: the link stands
        if isinstance(error, Unsendable):
            return error  # nothing was sent
        self.close()
        if isinstance(error, (LinkError, torch.OutOfMemoryError)):
            return error  # the latter is this process's own trouble
        return LinkClosed(f"the group with {self.peer} broke: {_first_line(error)}")


class _PeerWatch:
    """One thread that closes a link as soon as its peer's socket hangs up.

    A kernel that waits for a dead peer holds its stream, and with it a host that synchronises, until
    the communicator is aborted; someone who is not waiting must see the death.
    """

    def __init__(self) -> None:
        self._links: dict[int, ProcessGroupLink] = {}
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
        self._thread.start()

    def add(self, link: ProcessGroupLink) -> None:
        with self._lock:
            number = link.fileno()
            if number >= 0:
                self._links[number] = link
                self._epoll.register(number, select.EPOLLRDHUP)

    def remove(self, link: ProcessGroupLink) -> None:
        with self._lock:
            for number, other in self._links.items():
                if other is link:
                    del self._links[number]
                    with suppress(OSError):  # a closed socket has left by itself
                        self._epoll.unregister(number)
                    return

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._epoll.close()
        os.close(self._stop)

    def _run(self) -> None:
        while True:
            for number, _ in self._epoll.poll():
                if number == self._stop:
                    return
                with self._lock:
                    link = self._links.get(number)
                    # The event may be of a former socket with this number.
                    hung_up = link is not None and _hung_up(number)
                if link is not None and hung_up:
                    logger.warning("%s hung up; its group is given up", link.peer)
                    link.close()
                del link  # or it would live until the next one hangs up


def _hung_up(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLRDHUP)
    return bool(poll.poll(0))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
