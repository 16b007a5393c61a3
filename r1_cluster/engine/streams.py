"""The way of new tokens from an engine to the ingresses: one link each, one message per step.

A `TokenSink` lives in an ingress and listens; a `TokenFan` lives in an engine and opens a link to every
ingress that gave it a request.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable

from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.listener import Endpoint, Listener, connect
from r1_cluster.comm.wakeup import Wakeup
from r1_cluster.comm.wire import Header, Kind, LinkError, pack, unpack
from r1_cluster.engine.pulse import SILENCE_S
from r1_cluster.engine.scheduler import Finished
from r1_cluster.records import NOBODY, Request, TokenBatch, TokenDelta

SEND_TIMEOUT_S = 0.5
"""An ingress that reads nothing for so long is given up, or all other streams would wait for it. If it lives,
it asks again."""


class TokenSink:
    """Receives token batches in a thread of its own and hands their deltas to `deliver`, in that thread, with
    the engine's incarnation; `lost` gets that of an engine whose link closed, or (True) fell silent.

    Batches of an epoch older than the newest seen from an engine's name are dropped and counted.
    """

    def __init__(
        self,
        listener: Listener,
        deliver: Callable[[str, list[TokenDelta]], None],
        lost: Callable[[str, bool], None],
    ) -> None:
        """Takes the listener over; its name is the sink's."""
        self.name = listener.name
        self.stale_dropped = 0
        self._deliver = deliver
        self._lost = lost
        self._listener = listener
        self._wakeup = Wakeup()
        self._epochs: dict[str, int] = {}
        self._engines: dict[TcpLink, str] = {}
        self._heard: dict[TcpLink, float] = {}
        self._thread = threading.Thread(target=self._run, name="token-sink", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        return self._listener.address

    def close(self) -> None:
        """Ends the thread and closes all links."""
        self._wakeup.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            sources: list[Listener | TcpLink | Wakeup] = [self._wakeup, self._listener, *self._engines]
            for source in wait_any(sources, SILENCE_S / 2 if self._engines else None):
                if isinstance(source, Wakeup):
                    self._listener.close()
                    self._wakeup.close()
                    for link in self._engines:
                        link.close()
                    return
                if isinstance(source, Listener):
                    hello, link = source.accept(0)
                    self._engines[link] = hello.incarnation
                    self._heard[link] = time.monotonic()
                else:
                    self._receive(source)
            now = time.monotonic()
            for link in [link for link, at in self._heard.items() if now - at > SILENCE_S]:
                self._drop(link, silent=True)

    def _receive(self, link: TcpLink) -> None:
        try:
            message = link.recv(10.0)
            self._heard[link] = time.monotonic()
            if message.header.kind != Kind.TOKENS:
                return
            batch = unpack(message.body, TokenBatch)
        except LinkError:
            self._drop(link, silent=False)
            return
        if batch.epoch < self._epochs.get(batch.engine, 0):
            self.stale_dropped += 1
            return
        self._epochs[batch.engine] = batch.epoch
        self._deliver(self._engines[link], batch.deltas)

    def _drop(self, link: TcpLink, *, silent: bool) -> None:
        link.close()
        del self._heard[link]
        self._lost(self._engines.pop(link), silent)


class TokenFan:
    """An engine's links to its ingresses. Any thread may call any method. `incarnation` tells this engine's
    process from others under its name."""

    def __init__(self, engine: str, secret: bytes, incarnation: str = "") -> None:
        self.engine = engine
        self.epoch = 0
        self._incarnation = incarnation
        self._secret = secret
        self._links: dict[str, TcpLink] = {}
        self._lock = threading.Lock()

    def attach(self, sink: str, endpoint: Endpoint) -> None:
        """Opens the link to an ingress unless it stands; raises LinkError."""
        with self._lock:
            link = self._links.get(sink)
            if link is not None and not link.closed:
                return
            hello = Hello(self.engine, self._incarnation, self.epoch, "tokens")
            self._links[sink] = connect(endpoint, hello, self._secret, send_timeout_s=SEND_TIMEOUT_S)

    def attached(self, sink: str) -> bool:
        """Whether the link to this ingress stands."""
        link = self._links.get(sink)
        return link is not None and not link.closed

    def accept(self, request: Request) -> None:
        """Tells an ingress that its request is here, before there is a token."""
        self.emit([Finished(request.sink, TokenDelta(request.request_id, 0, [], attempt=request.attempt))])

    def beat(self) -> None:
        """Tells all ingresses that this engine lives."""
        for link in list(self._links.values()):
            with contextlib.suppress(LinkError):
                link.send(Header(Kind.HEARTBEAT, self.epoch))

    def emit(self, finished: Iterable[Finished]) -> list[str]:
        """Sends each ingress all its deltas in one message; returns the ingresses that are gone."""
        by_sink: dict[str, list[TokenDelta]] = {}
        for item in finished:
            if item.sink != NOBODY:
                by_sink.setdefault(item.sink, []).append(item.delta)
        gone = []
        header = Header(Kind.TOKENS, self.epoch)
        for sink, deltas in by_sink.items():
            try:
                self._links[sink].send(header, (), pack(TokenBatch(self.engine, self.epoch, deltas)))
            except (LinkError, KeyError):
                gone.append(sink)
        return gone

    def close(self) -> None:
        """Closes all links."""
        for link in list(self._links.values()):  # an ingress may be attaching at this moment
            link.close()
