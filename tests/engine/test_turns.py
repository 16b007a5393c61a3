"""Micro-batches that take turns: while one waits for its experts, the other one attends."""

import threading
import time
from types import SimpleNamespace

import msgspec
import pytest
import torch
from thread_cluster import LAYOUTS, PAGE_SIZE, Cluster, outlive, requests

from r1_cluster.comm import links
from r1_cluster.comm.dispatch import StepTag
from r1_cluster.comm.links import LocalLink
from r1_cluster.comm.wire import Flags, Header, Kind, Message, Unsendable, WireError, pack_seconds
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pipeline import Pipeline
from r1_cluster.engine.roles import Asked, RemoteRouter, Step
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.engine.turns import Turn, Turns
from r1_cluster.engine.worker import Worker

NUM_MIXTURES = 3


class Harness:
    """Turns of made-up steps, and a router's end of the link that answers when it is told to."""

    def __init__(self):
        self.asked, self.ended, self.refused, self.closed = [], [], [], []
        self.link = LocalLink("router-0", self._handle)
        self.router = RemoteRouter("router-0", {"router-0": self.link}, 5.0)
        self.turns = Turns(
            self.router,
            lambda turn, lost: self.ended.append((turn.plan.step, lost)),
            lambda plan, error: self.refused.append((plan.step, str(error))),
        )
        self.ran = []

    def _handle(self, message):
        self.asked.append(message)
        return message

    def begin(self, step):
        self.turns.add(Turn(SimpleNamespace(step=step), Step(self._walk(step), None), None, 0.0))

    def _walk(self, step):
        try:
            for layer in range(NUM_MIXTURES):
                x_TD = torch.full((2, 4), float(step))
                y_TD = yield Asked(StepTag(1, step, layer, step % 2), x_TD, 2)
                assert torch.equal(y_TD, x_TD + layer)
                self.ran.append((step, layer, len(self.asked)))
            return torch.empty(0), None
        finally:
            self.closed.append(step)

    def answer(self, flags=0, body=None, **changed):
        """To the latest question."""
        message = self.asked[-1]
        header = message.header._replace(kind=int(Kind.MOE_RESULT), flags=flags, **changed)
        (x_TD,) = message.tensors
        body = pack_seconds(0.5) if body is None else body
        self.turns.take(Message(header, [x_TD + message.header.layer], body))

    def questions(self):
        return [(message.header.step, message.header.layer) for message in self.asked]


def test_the_next_question_goes_out_before_a_step_goes_on_and_there_is_one_at_a_time():
    it = Harness()
    it.begin(7)
    it.begin(8)
    assert it.questions() == [(7, 0)]
    for _ in range(2 * NUM_MIXTURES):
        it.answer()
    assert it.questions() == [(step, layer) for layer in range(NUM_MIXTURES) for step in (7, 8)]
    # (step, layer, how many had been asked by then): the other one's question was out already.
    assert it.ran[:2] == [(7, 0, 2), (8, 0, 3)]
    assert it.ended == [(7, []), (8, [])]
    assert it.turns.deadline == float("inf")


def test_what_the_router_computes_counts_as_the_step_s():
    it = Harness()
    turns = []
    it.turns._end = lambda turn, lost: turns.append(turn)
    it.begin(7)
    for _ in range(NUM_MIXTURES):
        it.answer()
    assert 1.5 < turns[0].step.compute_s < 2.0


def test_a_loss_ends_all_steps_and_is_told_once():
    it = Harness()
    for step in (7, 8, 9):
        it.begin(step)
    it.answer(flags=Flags.TAINTED, body=b"experts-1\nexperts-2")
    assert it.ended == [(7, ["experts-1", "experts-2"])]
    assert sorted(it.closed) == [7, 8, 9]
    it.turns.lose()
    assert len(it.ended) == 1
    it.begin(10)  # under the next epoch, all is well again
    assert it.questions()[-1] == (10, 0)
    it.turns.lose()
    assert it.ended[1:] == [(10, ["router-0"])]


def test_a_router_that_cannot_be_asked_is_overdue_at_once():
    it = Harness()
    it.link.close()
    it.begin(7)
    assert it.turns.deadline == 0.0
    assert it.ended == []
    it.turns.lose()
    assert it.ended == [(7, ["router-0"])]


@pytest.mark.parametrize("changed", [{"epoch": 2}, {"step": 8}, {"layer": 1}, {"kind": int(Kind.COMBINE)}])
def test_what_is_no_answer_to_the_question_is_an_error(changed):
    it = Harness()
    it.begin(7)
    it.begin(8)
    message = it.asked[-1]
    header = message.header._replace(**{"kind": int(Kind.MOE_RESULT), **changed})
    with pytest.raises(WireError):
        it.turns.take(Message(header, message.tensors, pack_seconds(0.0)))


def test_what_was_asked_by_nobody_is_an_error():
    it = Harness()
    with pytest.raises(WireError):
        it.turns.take(Message(Header(Kind.MOE_RESULT, 1), [torch.zeros(2, 4)], pack_seconds(0.0)))


def test_what_does_not_fit_a_message_is_said_and_nobody_is_lost(monkeypatch):
    it = Harness()
    it.begin(7)
    it.begin(8)
    it.answer(flags=Flags.REFUSED, body=b"too much")
    assert it.refused == [(7, "router-0: too much")]

    def send(*_):
        raise Unsendable("much too much")

    monkeypatch.setattr(it.link, "send", send)
    it.begin(9)
    assert it.refused[1:] == [(9, "much too much")]
    assert it.ended == []


@pytest.fixture
def at_once(monkeypatch):
    """The most steps that a stage had under way at the same time."""
    most = [0]
    add = Turns.add

    def watched(turns, turn):
        add(turns, turn)
        most[0] = max(most[0], len(turns._waiting))

    monkeypatch.setattr(Turns, "add", watched)
    return most


@pytest.mark.slow
def test_texts_are_those_of_one_process(checkpoint, at_once):
    asked = requests(12)
    plain = Cluster(checkpoint, LAYOUTS["colocated"])
    turning = Cluster(checkpoint, LAYOUTS["disaggregated"], micro_batches=2)
    try:
        assert turning.run(asked) == plain.run(asked)
        assert at_once == [2]
    finally:
        turning.close()
        plain.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["stage-0", pytest.param("stage-1", marks=pytest.mark.system), "router-0", "experts-1"]
)
def test_texts_go_on_when_a_worker_dies(checkpoint, at_once, name):
    outlive(Cluster(checkpoint, LAYOUTS["disaggregated"], micro_batches=3), name)
    assert at_once[0] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["router-0", pytest.param("experts-0", marks=pytest.mark.system)])
def test_texts_go_on_over_process_groups(checkpoint, at_once, name):
    """With one stage, so that two steps wait for the same router all the time."""
    layout = {"kind": "disaggregated", "stages": 1, "expert_shards": 2, "spares": 1}
    outlive(Cluster(checkpoint, layout, transport="host memory", micro_batches=2), name)
    assert at_once == [2]


@pytest.mark.slow
def test_messages_larger_than_what_links_buffer_block_nobody(checkpoint, at_once, monkeypatch):
    """A stage that sends the next question does so when no answer is under way."""
    monkeypatch.setattr(links, "UNIX_BUFFER_BYTES", 1)  # the kernel gives some KiB
    layout = {"kind": "disaggregated", "stages": 1, "expert_shards": 1}
    cluster = Cluster(checkpoint, layout, micro_batches=2, step_timeout_s=5.0)
    try:
        asked = [
            msgspec.structs.replace(request, prompt=list(range(5, 133)), max_tokens=2)
            for request in requests(6, ignore_eos=True)
        ]
        texts = cluster.run(asked)
        assert at_once == [2]
        assert cluster.core.recovery.num_recoveries == 0
        assert cluster.run(asked[:1]) == {asked[0].request_id: texts[asked[0].request_id]}
    finally:
        cluster.close()


@pytest.mark.slow
def test_an_engine_that_takes_over_finds_all_sequences_of_steps_that_wait(checkpoint, monkeypatch):
    slow, dropped = threading.Event(), []
    handle, drop = Worker._handle, Turns.drop

    def handle_slowly(worker, link, message):
        if message.header.kind == Kind.MOE and slow.is_set():
            time.sleep(0.3)
        handle(worker, link, message)

    def watched(turns):
        dropped.append(len(turns._waiting))
        drop(turns)

    monkeypatch.setattr(Worker, "_handle", handle_slowly)
    monkeypatch.setattr(Turns, "drop", watched)
    asked = [msgspec.structs.replace(r, max_tokens=60) for r in requests(2, ignore_eos=True)]
    layout = {"kind": "disaggregated", "stages": 1, "expert_shards": 1}
    cluster = Cluster(checkpoint, layout, micro_batches=2)
    try:
        texts = cluster.run(asked)
        for request in asked:
            cluster.core.submit(request)
        known = dict.fromkeys(texts, 0)
        while min(known.values()) < 10:
            delta = cluster.deltas.get(timeout=60)
            known[delta.request_id] += len(delta.tokens)
        slow.set()
        while len(cluster.workers["stage-0"].turns._waiting) < 2:
            time.sleep(0.001)
        cluster.core.stop()
        epoch = 1 + cluster.pipeline.epoch
        members = {name: cluster.member(name, epoch) for name in cluster.workers}
        pipeline = Pipeline(cluster.layout, members, epoch, 2.0)
        pipeline.kv_eras = cluster.pipeline.kv_eras
        held = pipeline.link(epoch, read_back=True)
        slow.clear()
        assert dropped[-1] == 2
        while not cluster.deltas.empty():
            delta = cluster.deltas.get()
            known[delta.request_id] += len(delta.tokens) if delta.error is None else 0
        scheduler = Scheduler(Limits(16, 64, 200, 2), [PageAllocator(256, PAGE_SIZE)], frozenset({1}))
        scheduler.adopt(held)
        for request in asked:
            name = request.request_id
            scheduler.add(msgspec.structs.replace(request, generated=texts[name][: known[name]]))
        for _ in asked:
            (plan,) = scheduler.schedule(epoch)
            assert sum(plan.num_new) <= 2 * len(plan.seq_ids)
            pipeline.send(plan)
        found = {}
        while scheduler.num_in_flight:
            if (result := pipeline.receive(pipeline.members["stage-0"].link)) is not None:
                for item in scheduler.commit(result):
                    found[item.delta.request_id] = item.delta.tokens
        assert found == {name: text[known[name] : known[name] + 1] for name, text in texts.items()}
        pipeline.close()
    finally:
        cluster.close()


@pytest.mark.slow
def test_a_router_that_hangs_is_lost_after_the_deadline(checkpoint, at_once, monkeypatch):
    """With two steps in its stage, of which it has one."""
    armed, hanging, over = threading.Event(), threading.Event(), threading.Event()
    handle = Worker._handle

    def hang(worker, link, message):
        asked = message.header.kind == Kind.MOE and worker.spec.name == "router-0"
        if asked and armed.is_set() and not hanging.is_set():
            hanging.set()
            over.wait(30)
            worker.stop()
            return
        handle(worker, link, message)

    monkeypatch.setattr(Worker, "_handle", hang)
    asked = requests(8, ignore_eos=True)
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"], step_timeout_s=1.0, micro_batches=2)
    try:
        undisturbed = cluster.run(asked)
        armed.set()
        lost = []
        lose = cluster.core.recovery.lose

        def watched(names):
            lost.extend(names)
            over.set()
            return lose(names)

        monkeypatch.setattr(cluster.core.recovery, "lose", watched)
        assert cluster.run(asked) == undisturbed
        assert hanging.is_set()
        assert set(lost) == {"router-0"}
    finally:
        over.set()
        cluster.close()


@pytest.mark.slow
def test_an_answer_of_a_former_epoch_is_nobody_s(checkpoint, at_once, monkeypatch):
    """A router that says its last word of the epoch before once more, in front of each answer."""
    late = {}
    reply = Worker._reply

    def twice(worker, link, header, tensors, body):
        if header.kind == Kind.MOE_RESULT:
            former = late.setdefault(worker.spec.name, (header, tensors, body))
            if former[0].epoch < header.epoch:
                reply(worker, link, former[0], [torch.full_like(x, 7.0) for x in former[1]], former[2])
        reply(worker, link, header, tensors, body)

    monkeypatch.setattr(Worker, "_reply", twice)
    asked = requests(8, ignore_eos=True)
    cluster = Cluster(checkpoint, LAYOUTS["disaggregated"], micro_batches=2)
    try:
        undisturbed = cluster.run(asked)
        cluster.workers["experts-1"].stop()
        assert cluster.run(asked) == undisturbed
        assert cluster.core.recovery.num_recoveries == 1
        assert cluster.workers["stage-0"].stale_dropped > 10
    finally:
        cluster.close()
