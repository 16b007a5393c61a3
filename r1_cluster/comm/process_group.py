"""Links whose payload travels by NCCL, with gloo as the twin that tests can run anywhere.

A `ProcessGroupLink` sends each message's header and descriptors over an authenticated socket and its
tensors by send/recv of a process group of exactly two ranks. The class, the rendezvous and the watch over
dead peers are the same for both; a backend says how one tensor is sent and received.

Groups are built directly over a store, pairwise, so that losing one leaves the others. Neither allreduce
nor recv_anysource is used anywhere: in gloo both can block for good when a peer dies.

The order of NCCL transfers. All of a process's transfers are enqueued on one stream and a send holds that
stream until its receive runs at the other end. So all processes must issue them in one global order,
(layer, micro-batch, phase, lower rank, higher rank); that is the caller's duty. `LinkDispatcher` keeps to
it within one dispatch by sending, then receiving, in ascending order of shards.

Neither gloo, NCCL nor torch's store authenticates its peers: they belong on a private network.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.listener import bind_port
from r1_cluster.comm.wire import (
    Header,
    Kind,
    LinkClosed,
    LinkError,
    LinkTimeout,
    Message,
    TensorSpec,
    WireError,
)

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 16


class _Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class _Group(Protocol):
    """What torch's backends have and its stubs leave out."""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> _Work: ...
    def recv(self, tensors: list[Tensor], src: int, tag: int) -> _Work: ...
    def abort(self) -> None: ...


class Pair(Protocol):
    """One side of a two-rank group. Errors of the backend surface as RuntimeError."""

    device: torch.device

    def send(self, tensor: Tensor) -> None:
        """Sends a contiguous, non-empty tensor of `device`."""

    def recv(self, spec: TensorSpec) -> Tensor:
        """A new tensor of `device`, which the current stream may use."""

    def abort(self) -> None:
        """Gives up whatever is under way; from any thread."""


class Backend(Protocol):
    """Builds pairs: one object per process, made at its start."""

    device: torch.device

    def pair(self, store: Store, rank: int, timeout_s: float) -> Pair: ...


class GlooBackend:
    """CPU tensors by gloo. `host` is the address that peers reach this process at: without it gloo would
    tell those on other hosts to connect to 127.0.0.1."""

    def __init__(self, host: str) -> None:
        self.device = torch.device("cpu")
        self._gloo_device = dist.ProcessGroupGloo.create_device(hostname=host)

    def pair(self, store: Store, rank: int, timeout_s: float) -> Pair:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [self._gloo_device]
        group = dist.ProcessGroupGloo(store, rank, 2, options)
        return GlooPair(cast(_Group, group), 1 - rank)


class GlooPair:
    """See `GlooBackend`. The group's timeout bounds every wait, and `abort` does not end one: gloo cannot
    be woken while the peer lives but is silent in the midst of a payload."""

    def __init__(self, group: _Group, peer_rank: int) -> None:
        self.device = torch.device("cpu")
        self._group: _Group | None = group
        self._peer_rank = peer_rank

    def send(self, tensor: Tensor) -> None:
        self._alive().send([tensor], self._peer_rank, 0).wait()

    def recv(self, spec: TensorSpec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self._alive().recv([tensor], self._peer_rank, 0).wait()
        return tensor

    def abort(self) -> None:
        # Dropping the group closes its sockets, which ends the peer's wait as well; its own abort() does not.
        self._group = None

    def _alive(self) -> _Group:
        if self._group is None:
            raise RuntimeError("the group was given up")
        return self._group


class NcclBackend:
    """Device tensors by NCCL, all of them on one communication stream of the process.

    Nothing here waits on the host: sends are ordered behind the stream that produced the tensor, receives
    before the stream that asked for it, by events. To be made before any other NCCL group of the process.
    """

    def __init__(self, device: torch.device) -> None:
        # NCCL's watchdog would by default end the whole process when a peer is lost; here the links'
        # owners decide, and the watchdog only cleans up.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def pair(self, store: Store, rank: int, timeout_s: float) -> Pair:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=timeout_s)
        group = dist.ProcessGroupNCCL(store, rank, 2, options)
        return NcclPair(cast(_Group, group), 1 - rank, self.device, self.stream)


class NcclPair:
    """See `NcclBackend`."""

    def __init__(
        self, group: _Group, peer_rank: int, device: torch.device, stream: torch.cuda.Stream
    ) -> None:
        self.device = device
        self._group = group
        self._peer_rank = peer_rank
        self._stream = stream

    def send(self, tensor: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._group.send([tensor], self._peer_rank, 0).wait()  # the stream waits, not the host
        tensor.record_stream(self._stream)

    def recv(self, spec: TensorSpec) -> Tensor:
        consumer = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
            self._group.recv([tensor], self._peer_rank, 0).wait()
        consumer.wait_stream(self._stream)
        tensor.record_stream(consumer)
        return tensor

    def abort(self) -> None:
        self._group.abort()


class ProcessGroups:
    """All that a process needs for its process-group links, made once and handed to them: the backend, the
    one cached client of the rendezvous store (a new client per group stalls now and then for seconds), and
    a thread that notices dead peers.

    `store_host`, `store_port`: where `serve_store` runs, best in a process that is none of the ranks.
    `timeout_s` bounds the rendezvous and, in gloo, every transfer.
    """

    def __init__(self, backend: Backend, store_host: str, store_port: int, timeout_s: float) -> None:
        self.backend = backend
        self.timeout_s = timeout_s
        self._store = TCPStore(store_host, store_port, is_master=False, timeout=timedelta(seconds=timeout_s))
        self._watch = _PeerWatch()

    def join(self, header_link: TcpLink, rank: int) -> ProcessGroupLink:
        """Builds the two-rank group of `header_link`, which the new link owns from now on. The peer must
        call it at the same time, one side as rank 0 and the other as rank 1.

        Raises LinkClosed, LinkTimeout; `header_link` is closed then.
        """
        try:
            # Each generation of a pair has its own names in the store.
            if rank == 0:
                token = secrets.token_hex(_TOKEN_BYTES).encode()
                header_link.send(Header(Kind.GROUP), (), token)
            else:
                message = header_link.recv(self.timeout_s)
                token = message.body
                if message.header.kind != Kind.GROUP or len(token) != 2 * _TOKEN_BYTES:
                    raise WireError(f"{header_link.peer} did not start a group")
            store = PrefixStore(token.decode("ascii"), self._store)
            pair = self.backend.pair(store, rank, self.timeout_s)
            # The first transfer opens the connection: here, not in the first step.
            spec = TensorSpec(torch.uint8, (1,))
            if rank == 0:
                pair.send(torch.zeros(1, dtype=torch.uint8, device=pair.device))
                pair.recv(spec)
            else:
                pair.recv(spec)
                pair.send(torch.zeros(1, dtype=torch.uint8, device=pair.device))
        except (RuntimeError, UnicodeDecodeError) as error:
            header_link.close()
            raise LinkClosed(f"no group with {header_link.peer}: {_first_line(error)}") from None
        except LinkError:
            header_link.close()
            raise
        link = ProcessGroupLink(header_link, pair, self._watch)
        self._watch.add(link)
        return link

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
        self.stale_dropped = 0
        self._header_link = header_link
        self._pair = pair
        self._watch = watch
        self._close_lock = threading.Lock()
        self._gave_up = False

    @property
    def closed(self) -> bool:
        return self._header_link.closed

    def fileno(self) -> int:
        return self._header_link.fileno()

    def send(self, header: Header, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        for tensor in tensors:
            if tensor.device != self._pair.device:
                raise WireError(f"this link carries tensors of {self._pair.device}, not {tensor.device}")
        try:
            self._header_link.send_announcement(header, tensors, body)
            for tensor in tensors:
                if tensor.numel():
                    self._pair.send(tensor.contiguous())
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
            if not self._gave_up:
                self._gave_up = True
                self._pair.abort()

    def _recv_tensor(self, spec: TensorSpec) -> Tensor:
        if 0 in spec.shape:
            return torch.empty(spec.shape, dtype=spec.dtype, device=self._pair.device)
        return self._pair.recv(spec)

    def _failed(self, error: LinkError | RuntimeError) -> LinkError:
        if isinstance(error, LinkTimeout) and not self.closed:
            return error  # between messages: the link stands
        if isinstance(error, WireError) and not self.closed:
            return error  # refused before anything was sent
        self.close()
        if isinstance(error, LinkError):
            return error
        return LinkClosed(f"the group with {self.peer} broke: {_first_line(error)}")


class _PeerWatch:
    """One thread that closes a link as soon as its peer's socket hangs up.

    A kernel that waits for a dead NCCL peer holds its stream, and with it a host that synchronises, until
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


def _hung_up(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLRDHUP)
    return bool(poll.poll(0))


def serve_store(host: str, ports: tuple[int, int]) -> TCPStore:
    """The rendezvous store of `ProcessGroups`, at a free port of the inclusive range (its `port` says
    which). Lives as long as the object. Raises LinkError if no port is free."""
    sock = bind_port(host, ports)
    port: int = sock.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=sock.detach())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
