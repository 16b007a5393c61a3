"""What an engine does when a worker is lost: who is missing, who has come back, what must be done again.

States: all there → (a loss) → waiting for replacements → (all there again, linked under a new epoch) → all
there. Replacements are made elsewhere (`replace` starts them and returns; they arrive by `arrived`). How
often a worker is replaced is bounded; beyond that the engine fails, for good and with a reason.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from r1_cluster.engine.pipeline import Member, Pipeline
from r1_cluster.engine.scheduler import Scheduler
from r1_cluster.records import StepPlan

logger = logging.getLogger(__name__)

MAX_RESTARTS = 10
RESTART_WINDOW_S = 60.0


class EngineFailed(Exception):
    """The engine cannot go on; the text is why."""


class Recovery:
    """The missing workers of one engine. Owned by the engine's loop; any thread may call `arrived`."""

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        replace: Callable[[str], None],
        wake: Callable[[], None],
    ) -> None:
        """`replace(name)` starts a worker anew in the background; `wake` ends the loop's wait."""
        self.missing: set[str] = set()
        self.num_recoveries = 0
        self.last_recovery_s = 0.0
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._replace = replace
        self._wake = wake
        self._arrivals: deque[tuple[str, Member | Exception]] = deque()
        self._kv_lost = False
        self._began = 0.0
        self._losses: dict[str, list[float]] = {}

    @property
    def under_way(self) -> bool:
        return bool(self.missing)

    def lose(self, names: Iterable[str]) -> list[str]:
        """Workers are gone: their replacement begins. Returns the requests that must be failed because
        workers died whenever they ran."""
        new = [name for name in dict.fromkeys(names) if name not in self.missing]
        if not new:
            return []
        if not self.missing:
            self._began = time.monotonic()
        guilty = self._scheduler.suspect() if not self.missing else []
        stages = {stage.name for stage in self._pipeline.layout.stages}
        for name in new:
            self._count(name)
            self.missing.add(name)
            self._kv_lost |= name in stages
            self._pipeline.drop(name)
            logger.warning("lost %s; replacing it", name)
            self._replace(name)
        return guilty

    def arrived(self, name: str, member: Member | Exception) -> None:
        """A replacement is ready, or could not be made."""
        self._arrivals.append((name, member))
        self._wake()

    def advance(self) -> list[StepPlan] | None:
        """Takes in what arrived. Once nobody is missing: links all under a new epoch and returns the plans
        that must be sent again; None while somebody is missing. Raises WorkerLost, EngineFailed."""
        while self._arrivals:
            name, member = self._arrivals.popleft()
            if isinstance(member, Exception):
                raise EngineFailed(f"{name} could not be replaced: {member}")
            self._pipeline.members[name] = member
            self.missing.discard(name)
        if self.missing:
            return None
        self._pipeline.link(self._pipeline.epoch + 1)
        if self._kv_lost:
            self._scheduler.forget_kv()
            self._kv_lost = False
        self.num_recoveries += 1
        self.last_recovery_s = time.monotonic() - self._began
        logger.warning("all workers are there again, %.2f s after the loss", self.last_recovery_s)
        return self._scheduler.replan(self._pipeline.epoch)

    def _count(self, name: str) -> None:
        now = time.monotonic()
        losses = [at for at in self._losses.get(name, []) if now - at < RESTART_WINDOW_S] + [now]
        self._losses[name] = losses
        if len(losses) > MAX_RESTARTS:
            raise EngineFailed(f"{name} was lost {len(losses)} times within {RESTART_WINDOW_S:.0f} s")
