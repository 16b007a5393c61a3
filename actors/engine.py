"""The engine deployment: one replica is one copy of the model. It runs the scheduler in a thread of its
own; Serve's event loop only hands requests in and waits for their end."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import msgspec
import ray
from ray import serve

from actors.cluster import engine_name, secret
from actors.supervisor import Supervisor
from r1_cluster.comm.listener import Endpoint
from r1_cluster.comm.wire import LinkError
from r1_cluster.config import Service
from r1_cluster.engine.core import EngineCore
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.engine.streams import TokenFan
from r1_cluster.models.config import ModelConfig
from r1_cluster.planning.layout import build_layout
from r1_cluster.records import Request
from r1_cluster.text.tokenizer import Tokenizer

logger = logging.getLogger("r1_cluster.engine")


def max_model_len(service: Service, model: ModelConfig) -> int:
    """Tokens that prompt and answer may have together: by the model, by configuration, by the pages."""
    engine = service.engine
    limits = [model.max_position_embeddings, engine.num_pages * engine.page_size]
    if engine.max_model_len is not None:
        limits.append(engine.max_model_len)
    return min(limits)


class Engine:
    """See the module. Created by Serve."""

    def __init__(self, service: Service) -> None:
        self._service = service
        model = ModelConfig.from_folder(service.model.path)
        layout = build_layout(service.layout, model)
        self._name = engine_name(service.name, serve.get_replica_context().rank.rank)
        link_secret = secret()
        self._supervisor = Supervisor(service, layout, self._name, link_secret)
        pipeline, held = self._supervisor.assemble()
        engine = service.engine
        limits = Limits(
            engine.max_num_seqs,
            engine.max_batch_tokens,
            max_model_len(service, model),
            engine.micro_batches,
        )
        eos_ids = Tokenizer.from_folder(service.model.path).eos_ids
        allocator = PageAllocator(engine.num_pages, engine.page_size)
        self._fan = TokenFan(self._name, link_secret)
        self._fan.epoch = pipeline.epoch
        self._loop = asyncio.get_event_loop()
        self._ends: dict[str, asyncio.Future[str | None]] = {}
        scheduler = Scheduler(limits, allocator, frozenset(eos_ids))
        scheduler.adopt(held)
        self._core = EngineCore(
            scheduler,
            pipeline,
            self._fan,
            lease_s=engine.lease_s,
            step_timeout_s=engine.step_timeout_s,
            on_end=self._on_end,
            replace=self._replace,
        )
        self._core.start()

    async def generate(self, request: bytes, endpoint: bytes) -> str | None:
        """Computes one answer; its tokens go to the sink at `endpoint`. Returns when the request has
        ended: None, or why it failed. Cancelling the call aborts the request.

        Serve counts, drains and cancels requests by this call.
        """
        record = msgspec.msgpack.decode(request, type=Request)
        capacity = self._service.engine.max_num_seqs + self._service.engine.max_queued
        if len(self._ends) >= capacity:
            return "overloaded"
        if self._core.failure is not None:
            return self._core.failure
        if not self._fan.attached(record.sink):
            where = msgspec.msgpack.decode(endpoint, type=Endpoint)
            try:
                await asyncio.to_thread(self._fan.attach, record.sink, where)
            except LinkError as error:
                return f"the ingress cannot be reached: {error}"
        end: asyncio.Future[str | None] = self._loop.create_future()
        self._ends[record.request_id] = end
        try:
            self._core.submit(record)
            return await end
        except asyncio.CancelledError:
            self._core.abort(record.request_id)
            raise
        finally:
            del self._ends[record.request_id]

    async def failure(self) -> str | None:
        """Why this engine can compute nothing any more; None while it can."""
        return self._core.failure

    async def status(self) -> dict[str, Any]:
        """What `r1-cluster status` shows of this engine."""
        core, scheduler = self._core, self._core.scheduler
        return {
            "engine": self._name,
            "epoch": core.pipeline.epoch,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "host": os.uname().nodename,
            "layout": self._service.layout.kind,
            "failure": core.failure,
            "missing": sorted(core.recovery.missing),
            "recoveries": core.recovery.num_recoveries,
            "last_recovery_s": core.recovery.last_recovery_s,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_used": scheduler.allocator.num_used,
            "pages": scheduler.allocator.num_pages,
            "preempted": scheduler.num_preempted,
            "steps": core.num_steps,
            "tokens": core.num_tokens,
            "step_ms": core.times.step_ms(),
            "overhead_ms": core.times.overhead_ms(),
            "workers": await asyncio.to_thread(self._supervisor.describe),
        }

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._core.failure is not None:
            raise RuntimeError(self._core.failure)

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None:
            core.stop()

    def _replace(self, name: str) -> None:
        # Beyond every epoch that the workers know of, and the same for all that are lost together.
        self._supervisor.replace(name, self._core.pipeline.epoch + 1, self._core.arrived)

    def _on_end(self, request_id: str, error: str | None) -> None:
        self._loop.call_soon_threadsafe(self._resolve, request_id, error)

    def _resolve(self, request_id: str, error: str | None) -> None:
        end = self._ends.get(request_id)
        if end is not None and not end.done():
            end.set_result(error)
