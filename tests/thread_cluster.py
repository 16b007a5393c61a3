"""Workers, links and the engine's loop in one process, without Ray: threads in place of actors."""

import os
import queue
import random
import threading

import msgspec
import pytest

from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.listener import Listener, connect
from r1_cluster.config import LayoutConfig
from r1_cluster.engine.boot import ENGINE, WorkerBoot
from r1_cluster.engine.core import EngineCore
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pipeline import Member, Pipeline
from r1_cluster.engine.pulse import Pulse
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.engine.streams import TokenFan, TokenSink
from r1_cluster.engine.worker import Worker
from r1_cluster.models.family import load_config
from r1_cluster.planning.layout import build_layout
from r1_cluster.records import Request, SamplingParams

SECRET = b"a secret for tests only"
PORTS = (21000, 23999)
PAGE_SIZE = 8
LAYOUTS = {
    "colocated": {"kind": "colocated"},
    "disaggregated": {"kind": "disaggregated", "stages": 2, "expert_shards": 3},
    "four stages": {"kind": "disaggregated", "stages": 4, "expert_shards": 1},
    "expert-parallel": {"kind": "expert-parallel", "data_parallel": 3},
}
DENSE_LAYOUTS = {
    "colocated": {"kind": "colocated"},
    "two stages": {"kind": "disaggregated", "stages": 2},
}
# The ways of tensors beside the sockets that run without a GPU; the second is a device's, but for its memory.
GROUPS = [pytest.param("gloo", marks=pytest.mark.system), "host memory"]


def num_descriptors():
    return len(os.listdir("/proc/self/fd"))


class Cluster:
    """An engine over the workers of a layout."""

    def __init__(
        self,
        checkpoint,
        layout,
        num_pages=256,
        lease_s=5.0,
        step_timeout_s=2.0,
        transport="sockets",
        dtype="float32",
        **limits,
    ):
        self.num_descriptors = num_descriptors()
        self.transport, self.dtype = transport, dtype
        config = load_config(checkpoint)
        self.layout = build_layout(LayoutConfig(**layout), config)
        names = [spec.name for spec in (*self.layout.workers, *self.layout.spares)]
        self.boots = {name: self.boot(checkpoint, name, num_pages, lease_s, step_timeout_s) for name in names}
        self.workers, self.threads, self.replacing, self.links = {}, [], [], []
        for name in names:
            self.begin(name, "first")
        self.pipeline = Pipeline(self.layout, {name: self.member(name, 1) for name in names}, 1, 2.0)
        self.pipeline.link(1)
        self.deltas = queue.Queue()
        self.ends = queue.Queue()
        self.sink = TokenSink(
            Listener("sink", SECRET, "127.0.0.1", PORTS),
            lambda engine, deltas: [self.deltas.put(delta) for delta in deltas],
            lambda engine, silent: None,
        )
        fan = TokenFan("engine-0", SECRET)
        fan.epoch = 1
        fan.attach("sink", self.sink.endpoint)
        defaults = {"max_num_seqs": 16, "max_batch_tokens": 64, "max_model_len": 200}
        allocators = [PageAllocator(num_pages, PAGE_SIZE) for _ in self.layout.first_stages]
        self.scheduler = Scheduler(Limits(**{**defaults, **limits}), allocators, frozenset({1}))
        self.core = EngineCore(
            self.scheduler,
            self.pipeline,
            fan,
            lease_s=lease_s,
            step_timeout_s=step_timeout_s,
            on_end=lambda *end: self.ends.put(end),
            replace=self.replace,
        )
        pulse = Listener("pulse", SECRET, "127.0.0.1", PORTS)
        self.pulse = Pulse(pulse, lambda: self.core.well, fan.beat)
        self.core.start()

    def boot(self, checkpoint, name, num_pages, lease_s, step_timeout_s):
        return WorkerBoot(
            name=name,
            incarnation="first",
            workers=self.layout.workers,
            checkpoint=str(checkpoint),
            dtype=self.dtype,
            device="cpu",
            deterministic=True,
            threads=1,
            page_size=PAGE_SIZE,
            num_pages=num_pages,
            lease_s=lease_s,
            step_timeout_s=step_timeout_s,
            host="127.0.0.1",
            link_ports=PORTS,
            secret=SECRET,
            transport=self.transport,
        )

    def member(self, name, epoch):
        worker = self.workers[name]
        address = worker.listener.address
        link = connect(address, Hello(ENGINE, "engine-0", epoch, "control"), SECRET)
        link.peer = name
        return Member(link, address, worker.boot.incarnation)

    def begin(self, name, incarnation):
        boot = msgspec.structs.replace(self.boots[name], incarnation=incarnation)
        worker = self.workers[name] = Worker(boot)
        self.threads.append(threading.Thread(target=worker.run))
        self.threads[-1].start()

    def replace(self, name, spare, delay_s):
        """What the supervisor does with Ray: ends what is left of a worker, starts another in its place."""
        former = self.workers.pop(name)
        if spare:
            self.workers[name] = self.workers.pop(spare)
        successor = spare or name

        def work():
            former.stop()
            self.begin(successor, f"again-{len(self.threads)}")
            member = self.member(successor, self.pipeline.epoch + 1)
            self.links.append(member.link)
            self.core.arrived(successor, member)

        self.replacing.append(threading.Thread(target=work))
        self.replacing[-1].start()

    def run(self, requests):
        """Texts by request id, checked for gaps, once all requests have ended."""
        texts = {}
        for request in requests:
            self.core.submit(request)
        open_ids = {request.request_id for request in requests}
        while open_ids:
            delta = self.deltas.get(timeout=60)
            if delta.request_id not in open_ids:
                continue  # the last token of a request that was aborted meanwhile
            text = texts.setdefault(delta.request_id, [])
            assert delta.position == len(text)
            text.extend(delta.tokens)
            if delta.finish_reason is not None:
                assert delta.error is None, delta.error
                open_ids.remove(delta.request_id)
        ends = {self.ends.get(timeout=10) for _ in requests}
        assert ends == {(request.request_id, None) for request in requests}
        return texts

    def close(self):
        self.core.stop()
        # A spare may still load when all texts are there; whoever comes after the engine's end, it does not close.
        for thread in self.replacing:
            thread.join(60)
            assert not thread.is_alive()
        for link in self.links:
            link.close()
        self.pulse.close()
        self.sink.close()
        for worker in self.workers.values():
            worker.stop()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        # All goes at once: nothing waits for the collector.
        assert num_descriptors() <= self.num_descriptors


def requests(count, seed=5, **options):
    rng = random.Random(seed)
    return [
        Request(
            f"r{i}",
            [rng.randrange(5, 400) for _ in range(rng.randrange(1, 90))],
            SamplingParams(0.0, 1.0, 0, 0) if i % 2 else SamplingParams(1.0, 0.95, 0, i),
            max_tokens=rng.randrange(1, 40),
            stop_token_ids=[],
            sink="sink",
            **options,
        )
        for i in range(count)
    ]


def outlive(cluster, name):
    """Texts are as before, though the worker is ended twice meanwhile."""
    asked = requests(8, ignore_eos=True)
    try:
        undisturbed = cluster.run(asked)
        steps = cluster.core.num_steps

        def disturb():
            for count in (3, 30):
                # Where others have copies, steps go on while the successor loads.
                while cluster.core.num_steps < steps + count or name not in cluster.workers:
                    threading.Event().wait(0.001)
                cluster.workers[name].stop()

        thread = threading.Thread(target=disturb)
        thread.start()
        assert cluster.run(asked) == undisturbed
        thread.join()
        assert cluster.core.recovery.num_recoveries >= 1
        assert cluster.core.failure is None
        assert cluster.scheduler.num_pages_used == 0
    finally:
        cluster.close()


def texts_of(checkpoint, layout, asked, **options):
    """The texts of a cluster of its own, each as if alone, that leave nothing behind."""
    cluster = Cluster(checkpoint, layout, **options)
    try:
        together = cluster.run(asked)
        for request in asked[::4]:
            assert cluster.run([request]) == {request.request_id: together[request.request_id]}
        assert cluster.scheduler.num_pages_used == 0
        cluster.scheduler.check()
        return together
    finally:
        cluster.close()
