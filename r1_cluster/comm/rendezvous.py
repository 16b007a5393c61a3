"""What the two ends of a link tell each other before they form a process group."""

from __future__ import annotations

import time
from datetime import timedelta

from torch._C._distributed_c10d import Store

from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.wire import Header, Kind, WireError, pack, unpack

_LEAST_S = 1.0  # for the last word, however long it took until then
_JOINED = ""  # the key that says that an end has all it needs


class LinkStore(Store):
    """torch's rendezvous store for the two ends of a link: what one sets is sent to the other.

    Lives for the time of a rendezvous, bounded by `timeout_s`. Afterwards (`finish`) nothing more is sent or
    received, because messages of the link follow on the same socket; NCCL's own threads may still look in.
    """

    def __init__(self, link: TcpLink, timeout_s: float) -> None:
        super().__init__()
        self._link: TcpLink | None = link
        self._deadline = time.monotonic() + timeout_s
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        if self._link is not None:
            self._link.send(Header(Kind.GROUP), (), pack((key, data)))

    def get(self, key: str) -> bytes:
        """Waits for what the other end sets. Raises LinkError."""
        while key not in self._values:
            if self._link is None:
                raise KeyError(key)
            message = self._link.recv(max(self._deadline - time.monotonic(), _LEAST_S))
            if message.header.kind != Kind.GROUP:
                raise WireError(f"{self._link.peer} did not start a group")
            their_key, value = unpack(message.body, tuple[str, bytes])
            self._values[their_key] = value
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def finish(self) -> None:
        """Reads what the other end has set without need, up to its own word that it is done."""
        assert self._link is not None
        self._link.send(Header(Kind.GROUP), (), pack((_JOINED, b"")))
        self.get(_JOINED)
        self._link = None
