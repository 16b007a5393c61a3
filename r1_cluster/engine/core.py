"""The engine's loop: take requests, schedule, send the plan, commit the result, send the tokens; and, when
a worker is lost, have it replaced and do again what was lost with it.

One thread owns the scheduler. Others speak to it through `submit` and `abort`, which queue a command and
wake it; nothing else is shared.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.wakeup import Wakeup
from r1_cluster.engine.pipeline import Deposed, EngineFailed, Member, Pipeline, WorkerLost
from r1_cluster.engine.recovery import PROBE_S, Recovery, Replace
from r1_cluster.engine.scheduler import Finished, Scheduler
from r1_cluster.engine.streams import NOBODY, TokenFan
from r1_cluster.records import ENGINE_LOST, Request, SamplingParams, StepPlan, StepResult, TokenDelta

HELD_S = 30.0
"""How long the KV that a former engine left waits for its requests to come again."""
DEADLINE_SLACK_S = 1.0
"""How much longer the engine waits for a step than the workers in it wait for each other."""
HEARTBEAT_S = 0.5
"""How often every worker is asked whether it lives; a third of the lease where that is less."""
CANARY_S = 5.0
"""An engine that was idle for so long computes one token, so that `/health` tells the truth."""
MAX_RECOVERY_S = 600.0
"""A recovery that takes longer no longer counts as health."""


logger = logging.getLogger(__name__)


def _canary(request_id: str) -> Request:
    """One token for nobody."""
    return Request(request_id, [0], SamplingParams(0.0, 1.0, 0, 0), 1, [], NOBODY)


class StepTimes:
    """Of the latest steps that decoded one sequence and nothing else: wall time, and the part of it that the
    model's operators took, in seconds."""

    def __init__(self, size: int = 1000) -> None:
        self.samples: deque[tuple[float, float]] = deque(maxlen=size)

    def step_ms(self) -> float | None:
        """Median wall time, from the result before to this one; None before there are any."""
        return self._median_ms([wall for wall, _ in self.samples])

    def overhead_ms(self) -> float | None:
        """Median of wall − compute: scheduling, plan, links, commit, stream."""
        return self._median_ms([wall - compute for wall, compute in self.samples])

    @staticmethod
    def _median_ms(values: list[float]) -> float | None:
        return sorted(values)[len(values) // 2] * 1e3 if values else None


class EngineCore:
    """Runs a scheduler over a pipeline of workers until `stop`."""

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        fan: TokenFan,
        *,
        lease_s: float,
        step_timeout_s: float,
        on_end: Callable[[str, str | None], None],
        replace: Replace,
        on_recovery: Callable[[list[str], float], None] = lambda lost, took_s: None,
    ) -> None:
        """`on_end(request_id, error)` is called from the loop's thread once for every request.
        `replace` starts a lost worker anew in the background, for `arrived` to bring; `on_recovery` is told
        who was lost and for how long nothing was computed."""
        self.scheduler = scheduler
        self.pipeline = pipeline
        self.fan = fan
        self.times = StepTimes()
        self.num_steps = 0
        self.num_tokens = 0
        self.failure: str | None = None
        self.deposed = False
        self.pulse = self.stepped_at = time.monotonic()
        self._on_end = on_end
        self._heartbeat_s = min(HEARTBEAT_S, lease_s / 3)
        self._step_timeout_s = step_timeout_s + DEADLINE_SLACK_S
        self._commands: deque[Request | str] = deque()
        self._wakeup = Wakeup()
        self.recovery = Recovery(scheduler, pipeline, replace, self._wakeup.set, on_recovery)
        self._stopping = False
        self._sinks: dict[str, str] = {}
        self._sent_at: dict[int, float] = {}
        self._began_at: dict[int, float] = {}
        self._ready_at = 0.0
        self._release_at = time.monotonic() + HELD_S
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)

    @property
    def ended(self) -> bool:
        """Whether the loop is over, for whatever reason."""
        return self._thread.ident is not None and not self._thread.is_alive()

    @property
    def end_reason(self) -> str:
        """What becomes of requests when the loop has ended: they go on elsewhere, or the engine has failed
        for good."""
        return self.failure or ENGINE_LOST

    @property
    def well(self) -> bool:
        """Whether the loop runs and has lately shown that it does not hang."""
        if self._thread.ident is None:
            return True
        # A worker may keep the loop waiting for a step's deadline and for the answer to a topology.
        patience_s = self._step_timeout_s + self.pipeline.answer_timeout_s
        return self._thread.is_alive() and time.monotonic() - self.pulse < patience_s

    def health(self) -> dict[str, Any]:
        """ready: a token passed through every stage lately; recovering: it will again; else why not."""
        if self.ended:
            return {"status": "unavailable", "reason": self.end_reason}
        missing = sorted(self.recovery.missing)
        idle_s = time.monotonic() - self.stepped_at
        state: dict[str, Any] = {"missing": missing, "last_step_s": round(idle_s, 3)}
        if idle_s < 2 * CANARY_S + self._step_timeout_s:
            return {"status": "recovering" if self.recovery.blocked else "ready"} | state
        if self.recovery.under_way and idle_s < MAX_RECOVERY_S:
            return {"status": "recovering"} | state
        return {"status": "unavailable", "reason": f"no step was computed for {idle_s:.0f} s"} | state

    def start(self) -> None:
        """Starts the loop's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop and closes the links; what still runs goes on at the next engine."""
        self._stopping = True
        if self._thread.is_alive():
            self._wakeup.set()
            self._thread.join()

    def join(self) -> None:
        """Waits for the loop's end."""
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Queues a request whose sink is attached to the fan."""
        self._commands.append(request)
        self._wakeup.set()

    def abort(self, request_id: str) -> None:
        """Ends a request; unknown ones are ignored."""
        self._commands.append(request_id)
        self._wakeup.set()

    def arrived(self, name: str, member: Member | Exception) -> None:
        """A replacement that `replace` was asked for."""
        self.recovery.arrived(name, member)

    def _run(self) -> None:
        try:
            self._loop()
        except Deposed as error:
            self.deposed = True
            logger.warning("this engine is deposed: %s", error)
        except EngineFailed as error:
            self.failure = str(error)
        except Exception:
            # The next engine may do better; its workers and their KV are as they were.
            logger.exception("the engine's loop failed")
        finally:
            self._end_all(self.end_reason)
            self.pipeline.close()
            self.fan.close()

    def _loop(self) -> None:
        heartbeat_at = 0.0
        self.recovery.fill()
        while not self._stopping:
            try:
                if self.recovery.under_way:
                    self._recover()
                else:
                    self._send_plans()
                now = self.pulse = time.monotonic()
                if now >= heartbeat_at:
                    heartbeat_at = now + self._heartbeat_s
                    self.pipeline.heartbeat()
                    self._look_after(now)
                self._wait(min(heartbeat_at - now, self._deadline_s()))
            except WorkerLost as error:
                self._lose(error)
            self._take_commands()

    def _wait(self, timeout_s: float) -> None:
        sources: list[TcpLink | Wakeup] = [self._wakeup]
        sources += [member.link for member in self.pipeline.members.values()]
        for source in wait_any(sources, max(timeout_s, 0.0)):
            if isinstance(source, Wakeup):
                source.clear()
            elif (result := self.pipeline.receive(source)) is not None:
                self._finish(result)

    def _look_after(self, now: float) -> None:
        """What is overdue: a worker's sign of life, sequences that nobody asked for again; and, on an idle
        engine, that no page is lost and that a token can be computed."""
        if self.scheduler.idle:
            self.scheduler.check()
            if now - self.stepped_at > CANARY_S:
                self.scheduler.add(_canary(f"canary-{self.num_steps}"))
        if now > self._release_at:
            self.scheduler.release_held()
            self._release_at = float("inf")
        silent = self.pipeline.silent(2 + int(self._step_timeout_s / self._heartbeat_s))
        if silent:
            raise WorkerLost(silent, "silent")

    def _deadline_s(self) -> float:
        """How long the oldest step may still take; raises WorkerLost, of whoever hangs in it, once it may
        not any more."""
        if not self._sent_at or self.recovery.under_way:
            return math.inf
        left_s = min(self._sent_at.values()) + self._step_timeout_s - time.perf_counter()
        if left_s <= 0:
            members, workers = self.pipeline.members, self.pipeline.layout.workers
            silent = self.pipeline.probe(members, PROBE_S)
            # If all are well, it was lost on a link between them.
            names = silent or [worker.name for worker in workers if worker.name in members]
            raise WorkerLost(names, "a step did not end in time", accused=not silent)
        return left_s

    def _lose(self, error: WorkerLost) -> None:
        logger.warning("%s: %s", ", ".join(error.names), error)
        guilty = self.recovery.accuse(error.names) if error.accused else self.recovery.lose(error.names)
        for request_id in guilty:
            sink = self._sinks.get(request_id)
            if sink is None:
                continue
            words = "workers died whenever this request ran"
            self.fan.emit([Finished(sink, TokenDelta(request_id, 0, [], "error", words))])
            self.scheduler.abort(request_id)
            self._end(request_id, words)

    def _recover(self) -> None:
        plans = self.recovery.advance(idle=not self._sent_at)
        if plans is None:
            return
        self.fan.epoch = self.pipeline.epoch
        self._sent_at.clear()
        for plan in plans:
            self._send(plan, time.perf_counter())

    def _take_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Request):
                self._sinks[command.request_id] = command.sink
                missed = self.scheduler.catch_up(command)
                if missed is None:
                    self.scheduler.add(command)
                else:
                    self._emit([missed])
            elif command in self._sinks:
                self.scheduler.abort(command)
                self._end(command, None)

    def _send_plans(self) -> None:
        while self.scheduler.num_in_flight < self.scheduler.limits.micro_batches:
            started = time.perf_counter()
            plan = self.scheduler.schedule(self.pipeline.epoch)
            if plan is None:
                return
            # A step that follows another at once began when that one's result arrived.
            self._send(plan, self._ready_at or started)
            self._ready_at = 0.0

    def _send(self, plan: StepPlan, began_at: float) -> None:
        self._sent_at[plan.step] = time.perf_counter()
        if plan.num_new == [1]:
            self._began_at[plan.step] = began_at
        self.pipeline.send(plan)

    def _finish(self, result: StepResult) -> None:
        """Commits a result, gets the next step going, and only then sends the tokens."""
        if result.step not in self._sent_at:
            return  # done again meanwhile
        del self._sent_at[result.step]
        began_at = self._began_at.pop(result.step, None)
        if result.lost:
            raise WorkerLost(result.lost, "lost by their peers in a step", accused=True)
        arrived = time.perf_counter()
        finished = self.scheduler.commit(result)
        self.num_steps += 1
        self.stepped_at = time.monotonic()
        self.num_tokens += len(finished)
        if began_at is not None:
            self.times.samples.append((arrived - began_at, result.compute_s))
        self._take_commands()
        if not self.recovery.under_way:
            self._ready_at = arrived
            try:
                self._send_plans()
            except WorkerLost as error:
                self._lose(error)
            self._ready_at = 0.0
        self._emit(finished)

    def _emit(self, finished: list[Finished]) -> None:
        for sink in self.fan.emit(finished):
            for request_id in [name for name, where in self._sinks.items() if where == sink]:
                self.scheduler.abort(request_id)
                self._end(request_id, ENGINE_LOST)  # if the ingress lives, it asks again
        for item in finished:
            if item.delta.finish_reason is not None and item.delta.request_id in self._sinks:
                self._end(item.delta.request_id, None)

    def _end(self, request_id: str, error: str | None) -> None:
        del self._sinks[request_id]
        self._on_end(request_id, error)

    def _end_all(self, error: str) -> None:
        self._take_commands()
        ending = dict(self._sinks)
        if not self.deposed:  # else its streams are another's
            self.fan.emit(
                Finished(sink, TokenDelta(request_id, 0, [], "error", error))
                for request_id, sink in ending.items()
            )
        for request_id in ending:
            self._end(request_id, error)
