"""The engine deployment: a replica in office runs one copy of the model, another one stands by. It runs the
scheduler in a thread of its own; Serve's event loop only hands requests in and waits for their end."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import Any

import msgspec
import ray
from ray import serve

from actors.cluster import head_answers, secret
from actors.metrics import Recoveries
from actors.office import Offices
from actors.supervisor import Supervisor
from r1_cluster.comm.listener import Endpoint, Listener
from r1_cluster.comm.wire import LinkError
from r1_cluster.config import Service
from r1_cluster.engine.core import EngineCore
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pulse import Pulse
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.engine.streams import TokenFan
from r1_cluster.models.family import load_config
from r1_cluster.planning.layout import LEAST_DECODES, build_layout
from r1_cluster.planning.limits import check_messages, max_model_len
from r1_cluster.records import Refusal, Request
from r1_cluster.text.tokenizer import Tokenizer

logger = logging.getLogger("r1_cluster.engine")

TAKEOVER_S = 10.0
"""How long a request waits for a standby that is about to take over."""
RETRY_S = 0.5
HEAD_TIMEOUT_S = 1.0


def num_places(service: Service) -> int:
    """How many requests one engine holds, running or queued."""
    return service.engine.max_num_seqs * service.layout.data_parallel + service.engine.max_queued


class Engine:
    """See the module. Created by Serve. Holds an office (`actors.office`), or waits for one as a standby."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._model = load_config(service.model.path)
        tokenizer = Tokenizer.from_folder(service.model.path)
        self._eos_ids, self._blank_ids = tokenizer.eos_ids, tokenizer.blank_ids()
        self._layout = build_layout(service.layout, self._model)
        check_messages(service, self._model)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._secret = secret()
        self._loop = asyncio.get_event_loop()
        self._ends: dict[str, asyncio.Future[Refusal | None]] = {}
        self._name = ""
        self._supervisor: Supervisor | None = None
        self._fan: TokenFan | None = None
        self._core: EngineCore | None = None
        self._in_office = False
        self._stopping = False
        self._settled = threading.Event()  # a core is there, or it is clear that this is a standby
        self._recoveries = Recoveries()
        me = f"{service.name}/process-{self._id}"
        host = ray.util.get_node_ip_address()
        listener = Listener(me, self._secret, host, service.cluster.link_ports)
        self._pulse = Pulse(listener, self._well, self._beat)
        self._offices = Offices(service.name, service.engine.replicas, me, self._secret)
        office = self._offices.claim(self._pulse.endpoint)
        if office is not None:
            self._take(*office)
        threading.Thread(target=self._wait_for_office, name="office", daemon=True).start()

    def _wait_for_office(self) -> None:
        """Takes an office when one falls vacant; waits again whenever this process is deposed."""
        while not self._stopping:
            try:
                if self._in_office:
                    assert self._core is not None
                    self._core.join()
                    if not self._core.deposed:
                        return  # it failed, or is stopped: Serve replaces this process
                    self._in_office = False
                    self._core = None
                self._settled.set()
                self._offices.wait_for_vacancy(lambda: self._stopping)
                self._settled.clear()
                office = self._offices.claim(self._pulse.endpoint)
                if office is not None:
                    logger.warning("%s is vacant: taking over in term %d", *office)
                    self._take(*office)
            except Exception:
                logger.exception("an office could not be taken")
                self._in_office = False
                time.sleep(RETRY_S)

    def _take(self, name: str, term: int) -> None:
        """Assembles the workers of an engine and begins to run it."""
        service, engine = self._service, self._service.engine
        self._in_office = True
        self._name = name
        supervisor = Supervisor(
            service, self._layout, name, self._secret, lambda: self._offices.holds(name, term)
        )
        pipeline, held = supervisor.assemble(term)
        limits = Limits(
            engine.max_num_seqs,
            engine.max_batch_tokens,
            max_model_len(service, self._model),
            engine.micro_batches or self._layout.micro_batches(service.layout.device),
            LEAST_DECODES if engine.micro_batches is None else 1,
        )
        allocators = [PageAllocator(engine.num_pages, engine.page_size) for _ in self._layout.first_stages]
        scheduler = Scheduler(limits, allocators, self._eos_ids, self._blank_ids)
        scheduler.adopt(held)
        fan = TokenFan(name, self._secret, self._id)
        fan.epoch = pipeline.epoch

        def replace(name: str, spare: str | None, delay_s: float) -> None:
            # Beyond every epoch that the workers know of, and the same for all that are lost together.
            supervisor.replace(name, spare, delay_s, pipeline.epoch + 1, core.arrived)

        core = EngineCore(
            scheduler,
            pipeline,
            fan,
            lease_s=engine.lease_s,
            step_timeout_s=engine.step_timeout_s,
            on_end=self._on_end,
            replace=replace,
            on_recovery=self._recoveries.note,
        )
        self._supervisor, self._fan, self._core = supervisor, fan, core
        core.start()
        self._settled.set()
        threading.Thread(
            target=self._offices.sweep, args=(lambda: self._stopping or core.ended,), daemon=True
        ).start()

    def _well(self) -> bool:
        """Whether whoever watches this process may rest: it holds an office, and its loop runs."""
        core = self._core
        return self._in_office and (core is None or core.well)

    def _beat(self) -> None:
        if self._fan is not None:
            self._fan.beat()

    async def generate(self, request: bytes, endpoint: bytes) -> Refusal | None:
        """Computes one answer; its tokens go to the sink at `endpoint`. Returns when the request has
        ended: None, or why it failed. Cancelling the call aborts the request.

        Serve counts, drains and cancels requests by this call.
        """
        core, fan = await self._office()
        if core is None or fan is None:
            return Refusal("not_in_office", self._id)
        if len(self._ends) >= num_places(self._service):
            return Refusal("overloaded")
        if core.ended:
            return core.end_refusal
        record = msgspec.msgpack.decode(request, type=Request)
        if core.refuses(record):
            return Refusal("convicted")  # before the client is told that its request was taken
        if not fan.attached(record.sink):
            where = msgspec.msgpack.decode(endpoint, type=Endpoint)
            try:
                await asyncio.to_thread(fan.attach, record.sink, where)
            except LinkError as error:
                return Refusal("failed", f"the ingress cannot be reached: {error}")
        end: asyncio.Future[Refusal | None] = self._loop.create_future()
        self._ends[record.request_id] = end
        try:
            fan.accept(record)
            core.submit(record)
            return await end
        except asyncio.CancelledError:
            if self._ends.get(record.request_id) is end:
                core.abort(record.request_id, record.attempt)
            raise
        finally:
            # An ingress whose link broke may have asked again before this call was cancelled.
            if self._ends.get(record.request_id) is end:
                del self._ends[record.request_id]

    async def _office(self) -> tuple[EngineCore | None, TokenFan | None]:
        """The loop that runs, once it is clear whether one does: a takeover is waited for."""
        if not self._settled.is_set():
            await asyncio.to_thread(self._settled.wait, TAKEOVER_S)
        core = self._core
        return (None, None) if core is None or core.deposed else (core, self._fan)

    async def health(self) -> dict[str, Any]:
        """Whether requests can be served, or will be once a recovery is over; and why not."""
        core, _ = await self._office()
        if core is None:
            return {"status": "standby", "replica": self._id}
        state = {"engine": self._name, "replica": self._id} | core.health()
        if not await asyncio.to_thread(head_answers, HEAD_TIMEOUT_S):
            state["warning"] = "Ray's head does not answer: whoever dies now is replaced when it is back"
        return state

    async def status(self) -> dict[str, Any]:
        """What `r1-cluster status` shows of this engine."""
        core, supervisor = self._core, self._supervisor
        process = {"replica": self._id, "pid": os.getpid(), "host": os.uname().nodename}
        if core is None or supervisor is None:
            return {"engine": "", "standby": True, **process}
        scheduler = core.scheduler
        workers = await asyncio.to_thread(supervisor.describe)
        return {
            "engine": self._name,
            "standby": False,
            **process,
            "epoch": core.pipeline.epoch,
            "node": ray.get_runtime_context().get_node_id(),
            "layout": self._service.layout.kind,
            "failure": core.failure,
            "missing": sorted(core.recovery.missing),
            "recoveries": core.recovery.num_recoveries,
            "recovery_log": list(core.recovery.log),
            "health": core.health(),
            "stale_dropped": core.pipeline.stale_dropped,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_used": scheduler.num_pages_used,
            "pages": scheduler.num_pages,
            "data_ranks": [
                {"running": len(rank.running), "pages_used": rank.allocator.num_used}
                for rank in scheduler.data_ranks
            ],
            "preempted": scheduler.num_preempted,
            "steps": core.num_steps,
            "tokens": core.num_tokens,
            "step_ms": core.times.step_ms(),
            "overhead_ms": core.times.overhead_ms(),
            "workers": [row | {"bubble": core.bubbles.of(row["name"])} for row in workers],
        }

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        core = self._core
        if core is not None and not core.well and not core.deposed:
            raise RuntimeError(core.failure or "the engine's loop hangs")

    def __del__(self) -> None:
        self._stopping = True
        # The constructor may have failed half way.
        core: EngineCore | None = getattr(self, "_core", None)
        pulse: Pulse | None = getattr(self, "_pulse", None)
        if core is not None:
            core.stop()
        if pulse is not None:
            pulse.close()

    def _on_end(self, request_id: str, error: Refusal | None) -> None:
        self._loop.call_soon_threadsafe(self._resolve, request_id, error)

    def _resolve(self, request_id: str, error: Refusal | None) -> None:
        end = self._ends.get(request_id)
        if end is not None and not end.done():
            end.set_result(error)
