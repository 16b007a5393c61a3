"""How long workers had nothing to compute while steps were in flight: the bubble of a pipeline."""

from __future__ import annotations

from collections import deque

SAMPLES = 60


class Bubbles:
    """Of each worker, the part of the latest time with a step in flight in which it was not busy. Workers say
    with every heartbeat how long they have been busy so far; the window is the `SAMPLES` latest of them
    between which a step was in flight. One thread notes, any thread may ask. Times are in seconds, `now` is
    of time.monotonic."""

    def __init__(self) -> None:
        self._in_flight_s = 0.0
        self._since: float | None = None
        self._samples: dict[str, deque[tuple[float, float]]] = {}

    def begin(self, now: float) -> None:
        """A step is in flight, be it one of several."""
        if self._since is None:
            self._since = now

    def end(self, now: float) -> None:
        """No step is in flight any more."""
        self._in_flight_s, self._since = self._total(now), None

    def note(self, worker: str, busy_s: float, now: float) -> None:
        """A worker says how long it has been busy, since it began."""
        samples = self._samples.setdefault(worker, deque(maxlen=SAMPLES))
        if samples and busy_s < samples[-1][1]:
            samples.clear()  # a successor's
        in_flight_s = self._total(now)
        if not samples or in_flight_s > samples[-1][0]:
            samples.append((in_flight_s, busy_s))

    def of(self, worker: str) -> float | None:
        """From 0 (always busy) to 1; None where nothing is known yet."""
        samples = list(self._samples.get(worker, ()))
        if len(samples) < 2:
            return None
        (first_s, first_busy_s), (last_s, last_busy_s) = samples[0], samples[-1]
        return max(1.0 - (last_busy_s - first_busy_s) / (last_s - first_s), 0.0)

    def _total(self, now: float) -> float:
        return self._in_flight_s + (0.0 if self._since is None else now - self._since)
