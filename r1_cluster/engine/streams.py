"""The way of new tokens from an engine to the ingresses: one link each, one message per step.

A `TokenSink` lives in an ingress and listens; a `TokenFan` lives in an engine and opens a link to every
ingress that gave it a request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.listener import Endpoint, Listener, connect
from r1_cluster.comm.wakeup import Wakeup
from r1_cluster.comm.wire import Header, Kind, LinkError, pack, unpack
from r1_cluster.engine.scheduler import Finished
from r1_cluster.records import TokenBatch, TokenDelta


class TokenSink:
    """Receives token batches in a thread of its own and hands their deltas to `deliver`, in that thread.

    Batches of an epoch older than the newest seen from an engine's name are dropped and counted.
    """

    def __init__(
        self,
        name: str,
        host: str,
        ports: tuple[int, int],
        secret: bytes,
        deliver: Callable[[list[TokenDelta]], None],
    ) -> None:
        self.name = name
        self.stale_dropped = 0
        self._deliver = deliver
        self._listener = Listener(name, secret, host, ports)
        self._wakeup = Wakeup()
        self._epochs: dict[str, int] = {}
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
        links: list[TcpLink] = []
        while True:
            sources: list[Listener | TcpLink | Wakeup] = [self._wakeup, self._listener, *links]
            for source in wait_any(sources, None):
                if isinstance(source, Wakeup):
                    self._listener.close()
                    for link in links:
                        link.close()
                    return
                if isinstance(source, Listener):
                    links.append(source.accept(0)[1])
                elif not self._receive(source):
                    links.remove(source)

    def _receive(self, link: TcpLink) -> bool:
        try:
            batch = unpack(link.recv(10.0).body, TokenBatch)
        except LinkError:
            link.close()
            return False
        if batch.epoch < self._epochs.get(batch.engine, 0):
            self.stale_dropped += 1
            return True
        self._epochs[batch.engine] = batch.epoch
        self._deliver(batch.deltas)
        return True


class TokenFan:
    """An engine's links to its ingresses. `attach` may be called from any thread, `emit` from one."""

    def __init__(self, engine: str, secret: bytes) -> None:
        self.engine = engine
        self.epoch = 0
        self._secret = secret
        self._links: dict[str, TcpLink] = {}
        self._lock = threading.Lock()

    def attach(self, sink: str, endpoint: Endpoint) -> None:
        """Opens the link to an ingress unless it stands; raises LinkError."""
        with self._lock:
            link = self._links.get(sink)
            if link is not None and not link.closed:
                return
            hello = Hello(self.engine, self.engine, self.epoch, "tokens")
            self._links[sink] = connect(endpoint, hello, self._secret)

    def attached(self, sink: str) -> bool:
        """Whether the link to this ingress stands."""
        link = self._links.get(sink)
        return link is not None and not link.closed

    def emit(self, finished: Iterable[Finished]) -> list[str]:
        """Sends each ingress all its deltas in one message; returns the ingresses that are gone."""
        by_sink: dict[str, list[TokenDelta]] = {}
        for item in finished:
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
        for link in self._links.values():
            link.close()
