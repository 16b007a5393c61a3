"""The engine's loop: take requests, schedule, send the plan, commit the result, send the tokens.

One thread owns the scheduler. Others speak to it through `submit` and `abort`, which queue a command and
wake it; nothing else is shared.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.wakeup import Wakeup
from r1_cluster.comm.wire import Header, Kind, LinkError, pack
from r1_cluster.engine.scheduler import Finished, Scheduler
from r1_cluster.engine.streams import TokenFan
from r1_cluster.records import Request, StepPlan, StepResult, TokenDelta


class WorkerLost(Exception):
    """A worker is gone; the text names it."""


class Pipeline:
    """The engine's control links to all its workers; plans go to the first stage, results come from the
    last one (or from one that could not pass its part on)."""

    def __init__(self, links: dict[str, TcpLink], first_stage: str, epoch: int) -> None:
        self.links = links
        self.epoch = epoch
        self._first = links[first_stage]
        self._results = msgspec.msgpack.Decoder(StepResult)

    def send(self, plan: StepPlan) -> None:
        """Sends a plan to the first stage; raises WorkerLost."""
        header = Header(Kind.PLAN, plan.epoch, plan.step, -1, plan.micro_batch)
        try:
            self._first.send(header, (), pack(plan))
        except LinkError as error:
            raise WorkerLost(str(error)) from None

    def heartbeat(self) -> None:
        """Renews every worker's lease; raises WorkerLost."""
        try:
            for link in self.links.values():
                link.send(Header(Kind.HEARTBEAT, self.epoch))
        except LinkError as error:
            raise WorkerLost(str(error)) from None

    def receive(self, link: TcpLink) -> StepResult | None:
        """What a worker sent; None for an answered heartbeat. Raises WorkerLost."""
        try:
            message = link.recv(1.0)
        except LinkError as error:
            raise WorkerLost(str(error)) from None
        if message.header.kind != Kind.RESULT or message.header.epoch != self.epoch:
            return None
        return self._results.decode(message.body)

    def close(self) -> None:
        """Closes the control links; the workers' lease starts to run out."""
        for link in self.links.values():
            link.close()


class StepTimes:
    """The latest steps' wall time and the part of it that the model's operators took, in seconds."""

    def __init__(self, size: int = 1000) -> None:
        self.samples: deque[tuple[float, float, int]] = deque(maxlen=size)

    def overhead_ms(self) -> float | None:
        """Median of (wall − compute) over steps of one decoding sequence; None before there are any."""
        values = sorted(wall - compute for wall, compute, rows in self.samples if rows == 1)
        return values[len(values) // 2] * 1e3 if values else None

    def step_ms(self) -> float | None:
        """Median wall time of a step of one decoding sequence."""
        values = sorted(wall for wall, _, rows in self.samples if rows == 1)
        return values[len(values) // 2] * 1e3 if values else None


class EngineCore:
    """Runs a scheduler over a pipeline of workers until `stop`."""

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        fan: TokenFan,
        *,
        lease_s: float,
        on_end: Callable[[str, str | None], None],
    ) -> None:
        """`on_end(request_id, error)` is called from the loop's thread once for every request."""
        self.scheduler = scheduler
        self.pipeline = pipeline
        self.fan = fan
        self.times = StepTimes()
        self.num_steps = 0
        self.num_tokens = 0
        self.failure: str | None = None
        self._on_end = on_end
        self._heartbeat_s = lease_s / 3
        self._commands: deque[Request | str] = deque()
        self._wakeup = Wakeup()
        self._stopping = False
        self._sinks: dict[str, str] = {}
        self._sent_at: dict[int, float] = {}
        self._ready_at = 0.0
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)

    def start(self) -> None:
        """Starts the loop's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop and closes the links; what still runs ends with an error."""
        self._stopping = True
        self._wakeup.set()
        self._thread.join()
        self._wakeup.close()

    def submit(self, request: Request) -> None:
        """Queues a request whose sink is attached to the fan."""
        self._commands.append(request)
        self._wakeup.set()

    def abort(self, request_id: str) -> None:
        """Ends a request; unknown ones are ignored."""
        self._commands.append(request_id)
        self._wakeup.set()

    def _run(self) -> None:
        try:
            self._loop()
        except WorkerLost as error:
            self.failure = f"a worker was lost: {error}"
        except Exception as error:
            self.failure = f"the engine's loop failed: {type(error).__name__}: {error}"
            raise
        finally:
            self._end_all(self.failure or "the engine was stopped")
            self.pipeline.close()
            self.fan.close()

    def _loop(self) -> None:
        sources: list[TcpLink | Wakeup] = [self._wakeup, *self.pipeline.links.values()]
        heartbeat_at = 0.0
        while not self._stopping:
            self._send_plans()
            now = time.monotonic()
            if now >= heartbeat_at:
                self.pipeline.heartbeat()
                heartbeat_at = now + self._heartbeat_s
            for source in wait_any(sources, heartbeat_at - now):
                if isinstance(source, Wakeup):
                    source.clear()
                elif (result := self.pipeline.receive(source)) is not None:
                    self._finish(result)
            self._take_commands()

    def _take_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Request):
                self._sinks[command.request_id] = command.sink
                self.scheduler.add(command)
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
            self._sent_at[plan.step] = self._ready_at or started
            self._ready_at = 0.0
            self.pipeline.send(plan)

    def _finish(self, result: StepResult) -> None:
        """Commits a result, gets the next step going, and only then sends the tokens."""
        arrived = time.perf_counter()
        if result.lost:
            raise WorkerLost(", ".join(result.lost))
        finished = self.scheduler.commit(result)
        self.num_steps += 1
        self.num_tokens += len(finished)
        self.times.samples.append(
            (arrived - self._sent_at.pop(result.step), result.compute_s, len(result.tokens))
        )
        self._ready_at = arrived
        self._take_commands()
        self._send_plans()
        self._ready_at = 0.0
        for sink in self.fan.emit(finished):
            for request_id in [name for name, where in self._sinks.items() if where == sink]:
                self.scheduler.abort(request_id)
                self._end(request_id, "the link to the ingress broke")
        for item in finished:
            if item.delta.finish_reason is not None and item.delta.request_id in self._sinks:
                self._end(item.delta.request_id, None)

    def _end(self, request_id: str, error: str | None) -> None:
        del self._sinks[request_id]
        self._on_end(request_id, error)

    def _end_all(self, error: str) -> None:
        self._take_commands()
        ending = dict(self._sinks)
        self.fan.emit(
            Finished(sink, TokenDelta(request_id, 0, [], "error", error))
            for request_id, sink in ending.items()
        )
        for request_id in ending:
            self._end(request_id, error)
