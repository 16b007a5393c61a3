"""An engine over worker processes of its own on one machine, without Ray: for a device's benchmarks and
tests.

What the supervisor does with actors is done with spawned processes: a worker's loop runs in each, tensors
go between them as the transport says, and who dies is started anew in the same place.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec

from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.listener import Endpoint, Listener, connect
from r1_cluster.config import KvCacheDtype, LayoutConfig
from r1_cluster.engine.boot import ENGINE, StepLimits, Transport, WorkerBoot
from r1_cluster.engine.core import EngineCore
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pipeline import Member, Pipeline
from r1_cluster.engine.pulse import Pulse
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.engine.streams import TokenFan, TokenSink
from r1_cluster.models.family import load_config
from r1_cluster.planning.layout import LEAST_DECODES, Layout, build_layout
from r1_cluster.records import Request, TokenDelta

HOST = "127.0.0.1"
PORTS = (24000, 26999)
SECRET = bytes(range(32))
START_S = 300.0
"""A process loads torch and its weights, and on a device it compiles, tunes and records before it answers."""


class Settings(msgspec.Struct, frozen=True):
    """What all workers of an engine share; see `WorkerBoot`."""

    checkpoint: str
    device: str
    dtype: str
    transport: Transport
    deterministic: bool = True
    page_size: int = 16
    num_pages: int = 1024
    max_num_seqs: int = 64
    max_batch_tokens: int = 256
    max_context_len: int = 512
    step_timeout_s: float = 15.0  # a kernel may have to be compiled in a first step
    lease_s: float = 30.0
    kv_cache_dtype: KvCacheDtype | None = None
    micro_batches: int | None = None


def worker_boot(settings: Settings, layout: Layout, name: str, incarnation: str) -> WorkerBoot:
    """What a worker of the layout is told."""
    return WorkerBoot(
        name=name,
        incarnation=incarnation,
        workers=layout.workers,
        checkpoint=settings.checkpoint,
        dtype=settings.dtype,
        device=settings.device,
        deterministic=settings.deterministic,
        threads=1,
        page_size=settings.page_size,
        num_pages=settings.num_pages,
        lease_s=settings.lease_s,
        step_timeout_s=settings.step_timeout_s,
        host=HOST,
        link_ports=PORTS,
        secret=SECRET,
        limits=StepLimits(settings.max_num_seqs, settings.max_batch_tokens, settings.max_context_len),
        transport=settings.transport,
        kv_cache_dtype=settings.kv_cache_dtype,
    )


def work(boot: WorkerBoot, parent: Connection) -> None:
    """A worker process: says where it listens once it has loaded, and ends with its engine's lease."""
    from r1_cluster.engine.worker import Worker

    worker = Worker(boot)
    parent.send(worker.listener.address)
    parent.close()
    worker.run()


class LocalEngine:
    """An engine over the workers of a layout, each a process. To be closed; a context manager does."""

    def __init__(self, settings: Settings, layout: LayoutConfig) -> None:
        self.settings = settings
        config = load_config(Path(settings.checkpoint))
        self.layout = build_layout(layout, config)
        self.processes: dict[str, BaseProcess] = {}
        self._processes_context = multiprocessing.get_context("spawn")
        self._started = 0
        self._deltas: queue.Queue[tuple[float, TokenDelta]] = queue.Queue()
        try:
            self._start()
        except BaseException:
            self._kill_all()
            raise

    def _start(self) -> None:
        settings = self.settings
        names = [spec.name for spec in self.layout.workers]
        waiting = {name: self._begin(name) for name in names}  # all at once: they load side by side
        members = {name: self._member(name, *parts, epoch=1) for name, parts in waiting.items()}
        self.pipeline = Pipeline(self.layout, members, 1, settings.step_timeout_s)
        self.pipeline.link(1)
        self._sink = TokenSink(
            Listener("sink", SECRET, HOST, PORTS),
            lambda engine, deltas: [self._deltas.put((time.monotonic(), delta)) for delta in deltas],
            lambda engine, silent: None,
        )
        fan = TokenFan("engine-0", SECRET)
        fan.epoch = 1
        fan.attach("sink", self._sink.endpoint)
        limits = Limits(
            settings.max_num_seqs,
            settings.max_batch_tokens,
            settings.max_context_len,
            settings.micro_batches or self.layout.micro_batches(settings.device),
            LEAST_DECODES if settings.micro_batches is None else 1,
        )
        allocators = [
            PageAllocator(settings.num_pages, settings.page_size) for _ in self.pipeline.layout.first_stages
        ]
        self.scheduler = Scheduler(limits, allocators, frozenset())  # requests end by their lengths
        self.core = EngineCore(
            self.scheduler,
            self.pipeline,
            fan,
            lease_s=settings.lease_s,
            step_timeout_s=settings.step_timeout_s,
            on_end=lambda request_id, error: None,
            replace=self._replace,
        )
        self._pulse = Pulse(Listener("pulse", SECRET, HOST, PORTS), lambda: self.core.well, fan.beat)
        self.core.start()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, requests: Sequence[Request], on_token: Callable[[int], None] = lambda count: None
    ) -> tuple[dict[str, list[int]], list[float]]:
        """(tokens by request, the times at which any came). `on_token` hears how many there are so far.

        Raises RuntimeError where a request ends with an error, or a token is missing or comes twice.
        """
        texts: dict[str, list[int]] = {request.request_id: [] for request in requests}
        times: list[float] = []
        for request in requests:
            self.core.submit(request)
        left = len(requests)
        while left:
            came, delta = self._deltas.get(timeout=START_S)
            text = texts[delta.request_id]
            if delta.error is not None or delta.position != len(text):
                raise RuntimeError(f"{delta.request_id}: {delta.error or 'a token is missing'}")
            text.extend(delta.tokens)
            times.append(came)
            left -= delta.finish_reason is not None
            on_token(sum(map(len, texts.values())))
        return texts, times

    def close(self) -> None:
        """Ends the engine and its processes."""
        self.core.stop()
        self._pulse.close()
        self._sink.close()
        self._kill_all()

    def _kill_all(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def _begin(self, name: str) -> tuple[str, Connection]:
        self._started += 1
        incarnation = f"start-{self._started}"
        ours, theirs = self._processes_context.Pipe(duplex=False)
        process = self._processes_context.Process(
            target=work,
            args=(worker_boot(self.settings, self.layout, name, incarnation), theirs),
            daemon=True,
        )
        process.start()
        theirs.close()
        self.processes[name] = process
        return incarnation, ours

    def _member(self, name: str, incarnation: str, parent: Connection, *, epoch: int) -> Member:
        """The worker, once it has loaded. Raises RuntimeError if it could not."""
        try:
            if not parent.poll(START_S):
                raise RuntimeError(f"{name} has not loaded within {START_S:g} s")
            endpoint: Endpoint = parent.recv()
        except EOFError:
            raise RuntimeError(f"{name} ended before it had loaded: see its messages above") from None
        link = connect(endpoint, Hello(ENGINE, "engine-0", epoch, "control"), SECRET)
        link.peer = name
        return Member(link, endpoint, incarnation)

    def _replace(self, name: str, spare: str | None, delay_s: float) -> None:
        """The supervisor's part: ends what is left of a worker, and starts another in its place."""

        def start() -> None:
            time.sleep(delay_s)
            former = self.processes[name]
            former.kill()
            former.join()
            parts = self._begin(name)
            self.core.arrived(name, self._member(name, *parts, epoch=self.pipeline.epoch + 1))

        threading.Thread(target=start, daemon=True).start()
