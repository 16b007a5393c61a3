"""What Ray's own exporter shows of an engine and its workers (as `ray_r1_…`), for Prometheus set-ups that
scrape nodes."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from ray.util.metrics import Counter, Histogram

from r1_cluster.comm.links import Traffic

_BOUNDARIES_S = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]


class Recoveries:
    """How often workers were lost, by kind, and how long nothing was computed for it."""

    def __init__(self) -> None:
        self._count = Counter("r1_recoveries_total", "Workers lost and replaced", tag_keys=("actor",))
        self._seconds = Histogram(
            "r1_recovery_seconds",
            "From a loss until steps are computed again",
            boundaries=_BOUNDARIES_S,
            tag_keys=("actor",),
        )

    def note(self, lost: list[str], took_s: float) -> None:
        """One recovery; a worker's kind is its name without the number."""
        for actor in sorted({name.split("-")[0] for name in lost}):
            self._count.inc(tags={"actor": actor})
            self._seconds.observe(took_s, tags={"actor": actor})


class LinkTraffic:
    """What a worker sends and receives over its links, by kind of peer, and how long it waits in steps."""

    def __init__(self) -> None:
        tags = ("worker", "peer", "direction")
        self._messages = Counter("r1_link_messages_total", "Messages over links", tag_keys=tags)
        self._bytes = Counter("r1_link_bytes_total", "Bytes over links", tag_keys=tags)
        self._waited = Counter("r1_waited_seconds_total", "Waits for others in steps", tag_keys=("worker",))
        self._noted: collections.Counter[tuple[str, str]] = collections.Counter()
        self._noted_s = 0.0

    def note(self, worker: str, traffic: Mapping[str, Traffic], waited_s: float) -> None:
        """A worker's totals now, by peer; what they have grown by since the last call is counted."""
        for peer, total in traffic.items():
            for direction in ("sent", "received"):
                tags = {"worker": worker, "peer": peer.split("-")[0], "direction": direction}
                for what, counter in (("messages", self._messages), ("bytes", self._bytes)):
                    value = getattr(total, f"{direction}_{what}")
                    grown = value - self._noted[peer, f"{direction}_{what}"]
                    self._noted[peer, f"{direction}_{what}"] = value
                    if grown > 0:
                        counter.inc(grown, tags=tags)
        if waited_s > self._noted_s:
            self._waited.inc(waited_s - self._noted_s, tags={"worker": worker})
        self._noted_s = waited_s  # less than before where a spare has taken a place
