"""What Ray's own exporter shows of an engine (as `ray_r1_…`), for Prometheus set-ups that scrape nodes."""

from __future__ import annotations

from ray.util.metrics import Counter, Histogram

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
