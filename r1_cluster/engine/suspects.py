"""Which sequences may be what workers die of."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass

from r1_cluster.engine.sequence import Sequence
from r1_cluster.records import NOBODY

MAX_KILLS = 2
"""Deaths of workers in steps that a sequence had to itself, after which its request is failed."""


@dataclass
class _Suspicion:
    since: float
    num_kills: int = 0


class Suspects:
    """Sequences that took part in a step in which a worker died. Each runs alone until it has been through a
    step, so that, should it be the cause, it is found out; its next token clears it of all that it did."""

    def __init__(self) -> None:
        self._alone: set[Sequence] = set()
        self._suspicions: dict[Sequence, _Suspicion] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._alone

    def isolate(self, sequence: Sequence) -> None:
        """It runs alone, as if it were suspected."""
        self._alone.add(sequence)

    def accuse(self, batches: Collection[Collection[Sequence]]) -> tuple[list[Sequence], float]:
        """A worker died while these steps ran. Returns those that have killed MAX_KILLS times when alone, and
        since when (time.monotonic; inf for none) the first of them is suspected. The engine's own requests
        are never among them."""
        guilty: list[Sequence] = []
        since, now = math.inf, time.monotonic()
        for batch in batches:
            for sequence in batch:
                self._alone.add(sequence)
                suspicion = self._suspicions.setdefault(sequence, _Suspicion(now))
                if len(batch) == len(batches) == 1:
                    suspicion.num_kills += 1
                    if suspicion.num_kills >= MAX_KILLS and sequence.request.sink != NOBODY:
                        guilty.append(sequence)
                        since = min(since, suspicion.since)
        return guilty, since

    def survived(self, sequence: Sequence) -> None:
        """It has been through a step."""
        self._alone.discard(sequence)

    def clear(self, sequence: Sequence) -> None:
        """It has a further token, or has ended: what it killed before counts no more."""
        self._alone.discard(sequence)
        self._suspicions.pop(sequence, None)
