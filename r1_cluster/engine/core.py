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
from typing import Any, NamedTuple

from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.wakeup import Wakeup
from r1_cluster.engine.bubbles import Bubbles
from r1_cluster.engine.convicts import Convicts
from r1_cluster.engine.pipeline import Deposed, EngineFailed, Member, Pipeline, WorkerLost
from r1_cluster.engine.recovery import PROBE_S, Recovery, Replace
from r1_cluster.engine.scheduler import Finished, Scheduler, refused
from r1_cluster.engine.streams import TokenFan
from r1_cluster.records import (
    ENGINE_LOST,
    NOBODY,
    Refusal,
    Request,
    SamplingParams,
    StepPlan,
    StepResult,
)

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

_CONVICTED = Refusal("convicted")


class _Sent(NamedTuple):
    """When a plan was sent and, of a step that decodes one sequence and nothing else while no other is in
    flight, when that began; both by time.perf_counter."""

    at: float
    began_at: float | None


class StepTimes:
    """Of the latest steps that decoded one sequence and nothing else: wall time, and the part of it that the
    model's operators took, in seconds. One thread notes them, any thread may ask."""

    def __init__(self, size: int = 1000) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=size)

    def note(self, wall_s: float, compute_s: float) -> None:
        """One more step."""
        self._samples.append((wall_s, compute_s))

    def step_ms(self) -> float | None:
        """Median wall time, from the result before to this one; None before there are any."""
        return self._median_ms([wall for wall, _ in self._samples.copy()])

    def overhead_ms(self) -> float | None:
        """Median of wall − compute: scheduling, plan, links, commit, stream."""
        return self._median_ms([wall - compute for wall, compute in self._samples.copy()])

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
        on_end: Callable[[str, Refusal | None], None],
        replace: Replace,
        on_recovery: Callable[[list[str], float], None] = lambda lost, took_s: None,
    ) -> None:
        """`on_end(request_id, refusal)` is called from the loop's thread once for every request.
        `replace` starts a lost worker anew in the background, for `arrived` to bring; `on_recovery` is told
        who was lost and for how long nothing was computed."""
        self.scheduler = scheduler
        self.pipeline = pipeline
        self.fan = fan
        self.times = StepTimes()
        self.bubbles = Bubbles()
        pipeline.on_busy = lambda name, busy_s: self.bubbles.note(name, busy_s, time.monotonic())
        self.num_steps = 0
        self.num_tokens = 0
        self.failure: str | None = None
        self.deposed = False
        self.pulse = self.stepped_at = time.monotonic()
        self._on_end = on_end
        self._heartbeat_s = min(HEARTBEAT_S, lease_s / 3)
        self._step_timeout_s = step_timeout_s + DEADLINE_SLACK_S
        self._commands: deque[Request | tuple[str, int]] = deque()
        self._wakeup = Wakeup()
        self.recovery = Recovery(scheduler, pipeline, replace, self._wakeup.set, on_recovery)
        self._stopping = False
        self._requests: dict[str, Request] = {}
        self._convicts = Convicts()
        self._num_canaries = 0
        self._sent: dict[tuple[int, int], _Sent] = {}  # by step and data rank
        self._drawn: list[int] = []  # by the data ranks that have computed their part of a step
        self._ready_at = 0.0
        self._release_at = time.monotonic() + HELD_S
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)

    @property
    def ended(self) -> bool:
        """Whether the loop is over, for whatever reason."""
        return self._thread.ident is not None and not self._thread.is_alive()

    @property
    def end_refusal(self) -> Refusal:
        """What becomes of requests when the loop has ended: they go on elsewhere, or the engine has failed
        for good."""
        return ENGINE_LOST if self.failure is None else Refusal("failed", self.failure)

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
            return {"status": "unavailable", "reason": self.failure or "the engine was lost"}
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

    def refuses(self, request: Request) -> bool:
        """Whether it was convicted."""
        return request in self._convicts

    def abort(self, request_id: str, attempt: int) -> None:
        """Ends a request, unless it is unknown or was asked for again since that attempt."""
        self._commands.append((request_id, attempt))
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
            self._end_all(self.end_refusal)
            self.pipeline.close()
            self.fan.close()
            self._wakeup.close()

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
                self.scheduler.add(self._canary())
        if now > self._release_at:
            self.scheduler.release_held()
            self._release_at = float("inf")
        silent = self.pipeline.silent(2 + int(self._step_timeout_s / self._heartbeat_s))
        if silent:
            raise WorkerLost(silent, "silent")

    def _deadline_s(self) -> float:
        """How long the oldest step may still take; raises WorkerLost, of whoever hangs in it, once it may
        not any more."""
        if not self._sent or self.recovery.under_way:
            return math.inf
        left_s = min(sent.at for sent in self._sent.values()) + self._step_timeout_s - time.perf_counter()
        if left_s <= 0:
            # Who is loading takes no part in the step, and answers nobody until it has loaded.
            taking_part = self.pipeline.members.keys() - self.pipeline.assigned
            silent = self.pipeline.probe(taking_part, PROBE_S)
            # If all are well, it was lost on a link between them.
            names = silent or [w.name for w in self.pipeline.layout.workers if w.name in taking_part]
            raise WorkerLost(names, "a step did not end in time", accused=not silent)
        return left_s

    def _lose(self, error: WorkerLost) -> None:
        logger.warning("%s: %s", ", ".join(error.names), error)
        self.bubbles.end(time.monotonic())
        guilty = self.recovery.accuse(error.names) if error.accused else self.recovery.lose(error.names)
        for request in guilty:
            self._convict(request)

    def _convict(self, request: Request) -> None:
        """Fails a request in whose steps workers die, with all that are the same. The next step is a
        canary's: should it kill too, then it was the workers' fault, and counts."""
        self._convicts.convict(request)
        for other in self.scheduler.requests():
            if other.request_id in self._requests and other in self._convicts:
                self.scheduler.abort(other.request_id)
                self._refuse(other, _CONVICTED)
        self.scheduler.put_on_trial(self._canary())

    def _refuse(self, request: Request, refusal: Refusal) -> None:
        self.fan.emit([refused(request, refusal)])
        self._end(request.request_id, refusal)

    def _canary(self) -> Request:
        """One token for nobody, under a name that no former engine's had: what the workers hold of that one's
        is not this one's."""
        self._num_canaries += 1
        name = f"canary-{self.pipeline.epoch}-{self._num_canaries}"
        return Request(name, [0], SamplingParams(0.0, 1.0, 0, 0), 1, [], NOBODY)

    def _recover(self) -> None:
        plans = self.recovery.advance(idle=not self._sent)
        if plans is None:
            return
        self.fan.epoch = self.pipeline.epoch
        self._sent.clear()
        self._drawn.clear()
        self._send(plans, time.perf_counter())

    def _take_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Request):
                self._take(command)
                continue
            request_id, attempt = command
            if request_id in self._requests and self._requests[request_id].attempt <= attempt:
                self.scheduler.abort(request_id)
                self._end(request_id, None)

    def _take(self, request: Request) -> None:
        self._requests[request.request_id] = request
        if request in self._convicts:
            self._refuse(request, _CONVICTED)
            return
        missed = self.scheduler.catch_up(request)
        if missed is None:
            self.scheduler.add(request)
        else:
            self._emit([missed])

    def _send_plans(self) -> None:
        while self.scheduler.num_in_flight < self.scheduler.limits.micro_batches:
            started = time.perf_counter()
            plans = self.scheduler.schedule(self.pipeline.epoch)
            if not plans:
                return
            # A step that follows another at once began when that one's result arrived.
            self._send(plans, self._ready_at or started)
            self._ready_at = 0.0

    def _send(self, plans: list[StepPlan], began_at: float) -> None:
        """Sends plans of one time, which belong to one step unless they are sent again."""
        # Steps that share the workers say nothing of how long one takes.
        alone = [new for plan in plans for new in plan.num_new] == [1] and not self._sent
        self._sent = {key: sent._replace(began_at=None) for key, sent in self._sent.items()}
        self.bubbles.begin(time.monotonic())
        lost: WorkerLost | None = None
        for plan in plans:
            sent = _Sent(time.perf_counter(), began_at if alone and plan.num_new else None)
            self._sent[plan.step, plan.data_rank] = sent
            try:
                self.pipeline.send(plan)
            except WorkerLost as error:
                # The others must hear all the same what was closed, which is not said twice.
                lost = lost or error
        if lost is not None:
            raise lost

    def _finish(self, result: StepResult) -> None:
        """Commits a result, gets the next step going, and only then sends the tokens."""
        sent = self._sent.pop((result.step, result.data_rank), None)
        if sent is None:
            return  # done again meanwhile
        if not self._sent:
            self.bubbles.end(time.monotonic())
        if result.lost:
            # The other data ranks say the same.
            self._sent = {key: sent for key, sent in self._sent.items() if key[0] != result.step}
            raise WorkerLost(result.lost, "lost by their peers in a step", accused=True)
        arrived = time.perf_counter()
        finished = self.scheduler.commit(result)
        complete = all(step != result.step for step, _ in self._sent)
        self.num_steps += complete
        # Where not one row of all data ranks had a token, that is no health.
        self._drawn += result.tokens
        if complete:
            if max(self._drawn, default=0) >= 0:
                self.stepped_at = time.monotonic()
                if not self.recovery.under_way:
                    self.recovery.stepped()
            self._drawn.clear()
        self.num_tokens += sum(len(item.delta.tokens) for item in finished)
        if sent.began_at is not None:
            self.times.note(arrived - sent.began_at, result.compute_s)
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
            for request_id in [name for name, request in self._requests.items() if request.sink == sink]:
                self.scheduler.abort(request_id)
                self._end(request_id, ENGINE_LOST)  # if the ingress lives, it asks again
        for item in finished:
            request = self._requests.get(item.delta.request_id)
            # It may have been asked for again meanwhile.
            ended = request is not None and request.attempt == item.delta.attempt
            if ended and item.delta.finish_reason is not None:
                self._end(item.delta.request_id, item.delta.error)

    def _end(self, request_id: str, refusal: Refusal | None) -> None:
        del self._requests[request_id]
        self._on_end(request_id, refusal)

    def _end_all(self, refusal: Refusal) -> None:
        self._take_commands()
        ending = list(self._requests.values())
        if not self.deposed:  # else its streams are another's
            self.fan.emit(refused(request, refusal) for request in ending)
        for request in ending:
            self._end(request.request_id, refusal)
