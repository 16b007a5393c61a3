"""What an engine does when a worker is lost: who is missing, who has come back, what must be done again.

The links are right when all who are present are linked under one epoch. A loss spoils the steps in flight:
as soon as those who are left can compute (the missing are expert shards with another host) or all are there
again, they are linked under a new epoch and the steps are done again. Whoever comes back later joins
between two steps. Replacements are made elsewhere: a spare takes the place at once, or `replace` starts a
worker and it arrives by `arrived`. How often a worker is replaced is bounded; beyond that the engine fails,
for good and with a reason.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from r1_cluster.engine.pipeline import Deposed, EngineFailed, Member, Pipeline, WorkerLost
from r1_cluster.engine.scheduler import Scheduler
from r1_cluster.records import Request, StepPlan

logger = logging.getLogger(__name__)

MAX_RESTARTS = 10
RESTART_WINDOW_S = 60.0
MAX_FAILED_STARTS = 5
MAX_ACCUSATIONS = 3
ACCUSATION_WINDOW_S = 30.0
PROBE_S = 0.5
"""How soon a worker that others call lost must answer, to keep its place."""
LOCKSTEP_PROBE_S = 1.5
"""The same where workers go through a step side by side: one may wait for another, that hangs, for half a
second longer than it is waited for itself."""


class Replace(Protocol):
    """Ends what is left of worker `name` and, in the background, starts another: in its place or, where a
    spare has taken that, as a new spare. `delay_s` is to be waited first."""

    def __call__(self, name: str, spare: str | None, delay_s: float) -> None: ...


class Recovery:
    """The missing workers of one engine. Owned by the engine's loop; any thread may call `arrived`."""

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        replace: Replace,
        wake: Callable[[], None],
        on_recovery: Callable[[list[str], float], None],
    ) -> None:
        """For a pipeline whose members are linked. `wake` ends the loop's wait."""
        self.num_recoveries = 0
        self.log: deque[dict[str, Any]] = deque(maxlen=256)
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._replace = replace
        self._wake = wake
        self._on_recovery = on_recovery
        self._roles = frozenset(worker.name for worker in pipeline.layout.workers)
        # Whose death takes KV, and of which data rank.
        self._kv_of = {rank.name: rank.data_rank for stage in pipeline.layout.stages for rank in stage}
        in_lockstep = len(pipeline.layout.first_stages) > 1
        self._probe_s = LOCKSTEP_PROBE_S if in_lockstep else PROBE_S
        self._linked = self._present()
        self._arrivals: deque[tuple[str, Member | Exception]] = deque()
        self._spoiled = False
        self._kv_lost: set[int] = set()
        self._began = 0.0
        self._lost: list[str] = []
        self._losses: dict[str, list[float]] = {}
        self._excused_since = self._excused_until = math.inf
        self._accusations: dict[str, list[float]] = {}
        self._failed_starts: dict[str, int] = {}

    @property
    def missing(self) -> frozenset[str]:
        """Workers that are gone, or still loading."""
        return self._roles - self._present()

    @property
    def blocked(self) -> bool:
        """Whether no step can be computed until somebody comes back."""
        return not self._pipeline.layout.can_do_without(self.missing)

    @property
    def under_way(self) -> bool:
        """Whether `advance` must be called before the next step."""
        return self._spoiled or bool(self._arrivals) or self._present() != self._linked

    def fill(self) -> None:
        """Whoever a former engine left missing is replaced."""
        spares = [spare.name for spare in self._pipeline.layout.spares]
        absent = [spare for spare in spares if spare not in self._pipeline.members]
        for name in sorted(self.missing):
            self._vacate(name)
        for spare in absent:
            self._replace(spare, None, 0.0)

    def accuse(self, names: Iterable[str]) -> list[Request]:
        """Peers of these workers lost them. Those that answer us have lost a link, which is made anew; the
        others, and those that are accused again and again, are lost (see `lose`). Who is loading has taken
        the place of the one that was meant."""
        accused = list(dict.fromkeys(names))
        names = [name for name in accused if name not in self._pipeline.assigned]
        convicted = set(self._pipeline.probe(names, self._probe_s)) | (
            set(names) - self._pipeline.members.keys()
        )
        for name in names:
            if _count(self._accusations, name, ACCUSATION_WINDOW_S) >= MAX_ACCUSATIONS:
                self._accusations.pop(name)
                convicted.add(name)
        guilty = self.lose(convicted)
        for name in sorted(set(names) - convicted):
            logger.warning("the link to %s broke; linking anew", name)
            self._spoil(name)
        if not self._spoiled:  # whoever is accused was lost before; the step must be done again all the same
            self._spoil(accused[0])
        return guilty

    def lose(self, names: Iterable[str]) -> list[Request]:
        """Workers are gone: their replacement begins. Returns the requests that must be failed because
        workers died whenever they ran. Their kills are excused, unless the very next step kills as well:
        then it was the workers' own fault (see `stepped`)."""
        # Whoever is no member any more was lost before.
        lost = [name for name in dict.fromkeys(names) if name in self._pipeline.members]
        needed = [name for name in lost if name in self._roles]
        guilty: list[Request] = []
        if needed and not self._spoiled:
            guilty, self._excused_since = self._scheduler.suspect()
            self._excused_until = math.inf
        for name in lost:
            self._pipeline.drop(name)
        for name in lost:
            logger.warning("lost %s; replacing it", name)
            if name not in self._roles:
                self._replace(name, None, 0.0)
                continue
            _count(self._losses, name, RESTART_WINDOW_S)
            times = sum(not self._is_excused(at) for at in self._losses[name])
            if times > MAX_RESTARTS:
                raise EngineFailed(f"{name} was lost {times} times within {RESTART_WINDOW_S:.0f} s")
            self._vacate(name)
        if guilty:  # what is lost from now on, while all is put right, is not their doing
            self._excused_until = time.monotonic()
        return guilty

    def _is_excused(self, at: float) -> bool:
        return self._excused_since <= at <= self._excused_until

    def stepped(self) -> None:
        """A step was computed by all workers: what a convicted request killed before counts for nothing."""
        if self._excused_since < math.inf:
            for name, times in self._losses.items():
                self._losses[name] = [at for at in times if not self._is_excused(at)]
            self._excused_since = math.inf

    def arrived(self, name: str, member: Member | Exception) -> None:
        """A replacement is ready, or could not be made; `Deposed` where that is another engine's business."""
        self._arrivals.append((name, member))
        self._wake()

    def advance(self, *, idle: bool) -> list[StepPlan] | None:
        """Takes in what arrived. Once all who are needed are there (and, where nothing was spoiled, the
        pipeline is `idle`): links them under a new epoch and returns the plans that must be sent again;
        None before. Raises WorkerLost, EngineFailed, Deposed."""
        while self._arrivals:
            self._take_in(*self._arrivals.popleft())
        present = self._present()
        if self.blocked or not (self._spoiled or (idle and present != self._linked)):
            return None
        epoch = self._pipeline.epoch + 1
        for data_rank in self._kv_lost:
            self._pipeline.kv_eras[data_rank] = epoch
        self._pipeline.link(epoch)
        self._linked = present
        self._scheduler.forget_kv(self._kv_lost)
        self._kv_lost.clear()
        self._scheduler.use(self._pipeline.layout.whole_data_ranks(self.missing))
        if self._spoiled:
            self._note()
        self._spoiled = False
        return self._scheduler.replan(self._pipeline.epoch)

    def _present(self) -> frozenset[str]:
        return self._roles & self._pipeline.members.keys() - self._pipeline.assigned

    def _spoil(self, name: str) -> None:
        if not self._spoiled:
            self._began = time.monotonic()
            self._lost = []
        self._spoiled = True
        if name not in self._lost:
            self._lost.append(name)

    def _vacate(self, name: str) -> None:
        """A worker's place, and what it held of KV, is lost: somebody else is on the way to it."""
        self._spoil(name)
        if name in self._kv_of:
            self._kv_lost.add(self._kv_of[name])
        self._replace(name, self._take_spare(name), 0.0)

    def _take_spare(self, name: str) -> str | None:
        for spare in self._pipeline.spares:
            try:
                self._pipeline.assign(spare, name)
                return spare
            except WorkerLost:  # it died, too
                self._pipeline.drop(name)
                self._replace(spare, None, 0.0)
        return None

    def _take_in(self, name: str, member: Member | Exception) -> None:
        if isinstance(member, Deposed):
            raise member
        if isinstance(member, Exception):
            failures = self._failed_starts[name] = self._failed_starts.get(name, 0) + 1
            if failures >= MAX_FAILED_STARTS:
                raise EngineFailed(f"{name} could not be started {failures} times; the last time: {member}")
            self._replace(name, None, 0.5 * 2**failures)
            return
        self._failed_starts.pop(name, None)
        self._pipeline.members[name] = member

    def _note(self) -> None:
        self.num_recoveries += 1
        took_s = time.monotonic() - self._began
        starts = [m.start_s for name, m in self._pipeline.members.items() if name in self._lost]
        start_s = max(starts, default=0.0)
        self.log.append({"lost": self._lost, "at": time.time(), "took_s": took_s, "start_s": start_s})
        self._on_recovery(self._lost, took_s)
        logger.warning("computing again, %.2f s after the loss of %s", took_s, ", ".join(self._lost))


def _count(table: dict[str, list[float]], name: str, window_s: float) -> int:
    """Notes one more event of `name` now; how many there were within the window."""
    now = time.monotonic()
    table[name] = [at for at in table.get(name, []) if now - at < window_s] + [now]
    return len(table[name])
