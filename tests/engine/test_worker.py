"""Workers, links and the engine's loop in one process, without Ray: threads in place of actors."""

import functools
import os
import queue
import random
import threading
import time
from types import SimpleNamespace

import msgspec
import pytest
from make_checkpoint import make_checkpoint
from small_model import quantize

from r1_cluster.comm import wire
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.listener import Listener, connect
from r1_cluster.comm.wire import Header, Kind, LinkClosed, LinkError
from r1_cluster.config import LayoutConfig
from r1_cluster.engine import worker as worker_module
from r1_cluster.engine.boot import ENGINE, StepLimits, WorkerBoot
from r1_cluster.engine.core import EngineCore
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pipeline import Member, Pipeline
from r1_cluster.engine.pulse import Pulse
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.engine.streams import TokenFan, TokenSink
from r1_cluster.engine.worker import Worker
from r1_cluster.models.family import load_config
from r1_cluster.planning.layout import build_layout
from r1_cluster.planning.memory import OutOfDeviceMemory, worker_bytes
from r1_cluster.records import Request, SamplingParams
from r1_cluster.weights.tensors import INT8

SECRET = b"a secret for tests only"
PORTS = (21000, 23999)
PAGE_SIZE = 8
LAYOUTS = {
    "colocated": {"kind": "colocated"},
    "disaggregated": {"kind": "disaggregated", "stages": 2, "expert_shards": 3},
    "four stages": {"kind": "disaggregated", "stages": 4, "expert_shards": 1},
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
        **limits,
    ):
        self.num_descriptors = num_descriptors()
        self.transport = transport
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
        self.scheduler = Scheduler(
            Limits(**{**defaults, **limits}), PageAllocator(num_pages, PAGE_SIZE), frozenset({1})
        )
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
            dtype="float32",
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


@pytest.fixture(params=[*LAYOUTS, *GROUPS])
def cluster(request, checkpoint):
    if request.param in LAYOUTS:
        running = Cluster(checkpoint, LAYOUTS[request.param])
    else:
        running = Cluster(checkpoint, LAYOUTS["disaggregated"], transport=request.param)
    yield running
    running.close()


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


EXPECTED = {}


def test_every_text_is_as_if_alone_and_the_same_in_every_layout(cluster):
    asked = requests(24)
    together = cluster.run(asked)
    for request in asked[::6]:
        assert cluster.run([request]) == {request.request_id: together[request.request_id]}
    assert cluster.scheduler.allocator.num_used == 0
    assert together == EXPECTED.setdefault("texts", together)


def test_preemption_and_micro_batches_change_no_text(checkpoint):
    asked = requests(12)
    plain = Cluster(checkpoint, LAYOUTS["disaggregated"])
    scarce = Cluster(checkpoint, LAYOUTS["disaggregated"], num_pages=30, micro_batches=2, max_batch_tokens=24)
    try:
        assert scarce.run(asked) == plain.run(asked)
        assert scarce.scheduler.num_preempted > 0
        scarce.scheduler.check()
    finally:
        scarce.close()
        plain.close()


def test_a_continued_request_goes_on_at_the_next_token(cluster):
    (request,) = requests(1, ignore_eos=True)
    (text,) = cluster.run([request]).values()
    half = len(text) // 2
    continued = Request(
        "again",
        request.prompt,
        request.sampling,
        request.max_tokens,
        [],
        "sink",
        text[:half],
        ignore_eos=True,
    )
    cluster.core.submit(continued)
    rest = []
    while len(rest) < len(text) - half:
        delta = cluster.deltas.get(timeout=60)
        assert delta.position == half + len(rest)
        rest += delta.tokens
    assert text[:half] + rest == text
    cluster.ends.get(timeout=10)


def test_abort_frees_the_pages(cluster):
    cluster.core.submit(
        Request("long", [7, 8, 9], SamplingParams(0.0, 1.0, 0, 0), 190, [], "sink", ignore_eos=True)
    )
    cluster.deltas.get(timeout=60)
    cluster.core.abort("long", 0)
    assert cluster.ends.get(timeout=10) == ("long", None)
    cluster.run(requests(1))
    assert cluster.scheduler.allocator.num_used == 0
    cluster.scheduler.check()


def test_an_engine_of_an_old_epoch_is_refused(cluster):
    cluster.run(requests(1))
    worker = cluster.workers["stage-0"]
    link = connect(worker.listener.address, Hello(ENGINE, "old", 1, "control"), SECRET)
    with pytest.raises(LinkError):
        link.recv(10.0)
    cluster.run(requests(1))


def test_workers_leave_when_their_lease_ends(checkpoint):
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"], lease_s=2.0)
    cluster.run(requests(2))
    cluster.core.stop()
    for thread in cluster.threads:
        thread.join(10)
        assert not thread.is_alive()
    cluster.pulse.close()
    cluster.sink.close()


def test_workers_wait_longer_for_their_first_engine(checkpoint):
    class SlowToLoad(Cluster):
        def begin(self, name, incarnation):
            super().begin(name, incarnation)
            time.sleep(0.2)  # seven of them: by far longer than the lease

    cluster = SlowToLoad(checkpoint, LAYOUTS["disaggregated"], lease_s=0.5)
    cluster.run(requests(1))
    cluster.core.stop()
    for thread in cluster.threads:
        thread.join(10)
        assert not thread.is_alive()
    cluster.pulse.close()
    cluster.sink.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"spares": 1}, {"redundant_experts": 1}], ids=["cold", "spare", "copies"]
)
@pytest.mark.parametrize("name", ["stage-0", "stage-1", "router-0", "router-1", "experts-1"])
def test_texts_go_on_when_a_worker_dies(checkpoint, name, more):
    outlive(Cluster(checkpoint, LAYOUTS["disaggregated"] | more), name)


@pytest.mark.slow
@pytest.mark.parametrize("transport", GROUPS)
@pytest.mark.parametrize("name", ["stage-0", "stage-1", "router-1", "experts-1"])
def test_texts_go_on_when_a_member_of_process_groups_dies(checkpoint, name, transport):
    outlive(Cluster(checkpoint, LAYOUTS["disaggregated"] | {"spares": 1}, transport=transport), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage-1", "experts-1"])
def test_texts_go_on_with_int8_weights(checkpoint, tmp_path, name):
    """The successor reads the same integers; texts are those of one process, and not those of floats."""
    folder = tmp_path / "int8"
    quantize(checkpoint, folder, INT8)
    outlive(Cluster(folder, LAYOUTS["disaggregated"] | {"spares": 1}), name)
    texts = []
    for layout, weights in (("disaggregated", folder), ("colocated", folder), ("colocated", checkpoint)):
        cluster = Cluster(weights, LAYOUTS[layout])
        texts.append(cluster.run(requests(8, ignore_eos=True)))
        cluster.close()
    assert texts[0] == texts[1]
    assert texts[1] != texts[2]


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
        assert cluster.scheduler.allocator.num_used == 0
    finally:
        cluster.close()


def test_an_engine_that_takes_over_reads_back_what_the_workers_hold(checkpoint):
    (request,) = requests(1, ignore_eos=True)
    request = msgspec.structs.replace(request, max_tokens=100)
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"])
    (text,) = cluster.run([request]).values()
    cluster.core.submit(request)
    got = []
    while len(got) < 30:
        got += cluster.deltas.get(timeout=60).tokens
    cluster.core.stop()
    assert cluster.ends.get(timeout=10)[0] == request.request_id
    # The next engine, over the same workers.
    epoch = 1 + max(max(worker.epoch, worker.office) for worker in cluster.workers.values())
    members = {name: cluster.member(name, epoch) for name in cluster.workers}
    pipeline = Pipeline(cluster.layout, members, epoch, 2.0)
    pipeline.kv_era = cluster.pipeline.kv_era
    held = pipeline.link(epoch, read_back=True)
    num_known = len(request.prompt) + 30
    assert held[request.request_id].committed >= num_known - 2
    scheduler = Scheduler(Limits(16, 64, 200), PageAllocator(256, PAGE_SIZE), frozenset({1}))
    scheduler.adopt(held)
    scheduler.add(msgspec.structs.replace(request, generated=text[:30]))
    scheduler.check()
    plan = scheduler.schedule(epoch)
    assert sum(plan.num_new) <= 2
    pipeline.send(plan)
    link = pipeline.members["stage-1"].link
    while (result := pipeline.receive(link)) is None:
        pass
    assert result.tokens == text[30:31]
    pipeline.close()
    cluster.close()


def test_what_was_held_before_a_stage_lost_its_kv_is_offered_to_nobody(checkpoint):
    (request,) = requests(1, ignore_eos=True)
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"])
    try:
        cluster.core.submit(msgspec.structs.replace(request, max_tokens=100))
        while len(cluster.deltas.get(timeout=60).tokens) < 1:
            pass
        cluster.core.stop()
        epoch = 1 + max(max(worker.epoch, worker.office) for worker in cluster.workers.values())
        members = {name: cluster.member(name, epoch) for name in cluster.workers}
        pipeline = Pipeline(cluster.layout, members, epoch, 2.0)
        # The engine before had seen stage 1 replaced, and died before it planned anything anew.
        pipeline.kv_era = epoch
        assert pipeline.link(epoch, read_back=True) == {}
        pipeline.close()
    finally:
        cluster.close()


def test_a_step_whose_rows_fit_no_message_gives_the_same_text(checkpoint, monkeypatch):
    """Hidden states of a whole step fit, its rows for experts do not."""
    config = load_config(checkpoint)
    asked = requests(6)
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"])
    try:
        texts = cluster.run(asked)
        assert config.moe.num_experts_per_tok > 1
        monkeypatch.setattr(wire, "MAX_PAYLOAD_BYTES", 64 * config.hidden_size * 4)
        assert cluster.run(asked) == texts
        assert cluster.core.recovery.num_recoveries == 0
    finally:
        cluster.close()


@pytest.mark.parametrize("layout", ["disaggregated", "two stages without experts between"])
def test_what_cannot_be_sent_ends_the_engine_and_no_worker(checkpoint, monkeypatch, layout):
    """A message that does not fit would not fit on its way to a new worker either."""
    config = load_config(checkpoint)
    stages = {"kind": "disaggregated", "stages": ["0-0", "1-3"]}  # the first has no router to refuse
    cluster = Cluster(checkpoint, stages if "two" in layout else LAYOUTS[layout])
    try:
        workers = dict(cluster.workers)
        (request,) = requests(1)
        cluster.run([request])
        monkeypatch.setattr(wire, "MAX_PAYLOAD_BYTES", 40 * config.hidden_size * 4)
        too_long = msgspec.structs.replace(request, request_id="long", prompt=list(range(5, 65)))
        cluster.core.submit(too_long)
        cluster.core.join()
        assert "at most" in cluster.core.failure
        assert "stage-0" in cluster.core.failure
        name, refusal = cluster.ends.get(timeout=10)
        assert (name, refusal.text) == ("long", cluster.core.failure)
        assert cluster.workers == workers
        assert all(thread.is_alive() for thread in cluster.threads)
    finally:
        cluster.close()


def test_a_plan_that_cannot_be_sent_ends_the_engine_and_no_worker(cluster, monkeypatch):
    workers = dict(cluster.workers)
    cluster.run(requests(1))
    monkeypatch.setattr(wire, "MAX_BODY_BYTES", 150)
    cluster.core.submit(requests(1)[0])
    cluster.core.join()
    assert "what stage-0 is to be told does not fit" in cluster.core.failure
    assert cluster.workers == workers


def test_nonsense_costs_its_sender_the_link_and_nobody_else(checkpoint):
    """A peer that passed the handshake and speaks another language."""
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"])
    try:
        for worker in cluster.workers.values():
            for kind in set(Kind) - {Kind.HEARTBEAT}:  # which has nothing to read
                link = connect(worker.listener.address, Hello("stranger", "x", 1, "tensor"), SECRET)
                link.send(Header(kind, 1), (), b"\xc1nonsense")
                with pytest.raises(LinkClosed):
                    link.recv(10.0)
        assert all(thread.is_alive() for thread in cluster.threads)
        cluster.run(requests(1))
    finally:
        cluster.close()


@pytest.mark.parametrize("name", ["stage-0", "stage-1", "router-0", "experts-1"])
def test_every_role_asks_for_the_memory_that_it_needs(checkpoint, monkeypatch, name):
    asks_for_what_it_needs(checkpoint, LAYOUTS["disaggregated"], name, monkeypatch)


def asks_for_what_it_needs(checkpoint, layout, name, monkeypatch):
    """By a stand-in for a device's free memory, which counts once the weights are there."""
    config = load_config(checkpoint)
    layout = build_layout(LayoutConfig(**layout), config)
    (spec,) = [worker for worker in layout.workers if worker.name == name]
    limits = StepLimits(16, 64, 200)
    parts = worker_bytes(
        config,
        layout,
        spec,
        num_pages=256,
        page_size=PAGE_SIZE,
        max_num_seqs=16,
        max_batch_tokens=64,
        max_context_len=200,
    )
    cluster = SimpleNamespace(layout=layout, transport="sockets")
    boot = msgspec.structs.replace(Cluster.boot(cluster, checkpoint, name, 256, 5.0, 2.0), limits=limits)
    free = sum(parts.values())
    monkeypatch.setattr(worker_module, "free_device_bytes", lambda device: free)
    Worker(boot).close()
    free -= 1
    with pytest.raises(OutOfDeviceMemory, match=next(iter(parts))):
        Worker(boot)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """dense(model_type) → a checkpoint of a dense architecture; Qwen2's head is its embedding."""

    @functools.cache
    def make(model_type):
        options = {"max_position_embeddings": 2048, "tie_word_embeddings": model_type == "qwen2"}
        return make_checkpoint(tmp_path_factory.mktemp(model_type), seed=3, model_type=model_type, **options)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_dense_texts_are_as_if_alone_after_preemption_and_in_every_layout(dense, model_type):
    asked = requests(12)
    plain = Cluster(dense(model_type), DENSE_LAYOUTS["colocated"])
    scarce = {"num_pages": 30, "micro_batches": 2, "max_batch_tokens": 24}
    other = Cluster(dense(model_type), DENSE_LAYOUTS["two stages"], **scarce)
    try:
        texts = plain.run(asked)
        assert len({tuple(text) for text in texts.values()}) > len(asked) // 2
        for request in asked[::5]:
            assert plain.run([request]) == {request.request_id: texts[request.request_id]}
        assert other.run(asked) == texts
        assert other.scheduler.num_preempted > 0
        other.scheduler.check()
    finally:
        other.close()
        plain.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "layout", "name", "spares"),
    [
        ("llama", "colocated", "stage-0", 0),
        ("qwen3", "colocated", "stage-0", 1),
        ("qwen3", "two stages", "stage-0", 0),
        ("llama", "two stages", "stage-0", 1),
        ("qwen2", "two stages", "stage-1", 0),
        ("qwen3", "two stages", "stage-1", 1),
    ],
)
def test_dense_texts_go_on_when_a_stage_dies(dense, model_type, layout, name, spares):
    outlive(Cluster(dense(model_type), DENSE_LAYOUTS[layout] | {"spares": spares}), name)


def test_a_dense_stage_asks_for_the_memory_that_it_needs(dense, monkeypatch):
    asks_for_what_it_needs(dense("qwen2"), DENSE_LAYOUTS["two stages"], "stage-1", monkeypatch)
