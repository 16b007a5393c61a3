"""The engine's loop, of which a test calls the parts; no worker and no thread."""

import sys
import threading
import time

import pytest

from r1_cluster.engine.core import EngineCore, StepTimes
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pipeline import Member, WorkerLost
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.planning.layout import Layout, WorkerSpec
from r1_cluster.records import Refusal, Request, SamplingParams, StepPlan, StepResult

LAYOUT = Layout(
    (
        WorkerSpec("stage-0", stage=(0, 2)),
        WorkerSpec("router-0", router=(0, 2)),
        WorkerSpec("experts-0", experts=(0, 4)),
        WorkerSpec("experts-0-copy-1", experts=(0, 4)),
    ),
    2,
)


class Pipeline:
    """Stands in for `pipeline.Pipeline`: keeps the plans, and answers as it is told to."""

    def __init__(self):
        self.layout = LAYOUT
        self.epoch, self.kv_eras = 1, [1]
        self.members = {worker.name: Member(None, None, "") for worker in LAYOUT.workers}
        self.assigned = set()
        self.spares = []
        self.answer_timeout_s = 1.0
        self.mute = set()
        self.plans = []
        self.probed = []

    def send(self, plan):
        self.plans.append(plan)

    def link(self, epoch):
        self.epoch = epoch

    def drop(self, name):
        self.members.pop(name, None)
        self.assigned.discard(name)

    def probe(self, names, timeout_s):
        self.probed = sorted(names)
        return sorted(self.mute & set(names))


class Fan:
    """Keeps what is said to ingresses."""

    epoch = 1

    def __init__(self):
        self.said = []

    def emit(self, finished):
        self.said += [item.delta for item in finished]
        return []


class Harness:
    def __init__(self, **limits):
        self.pipeline, self.fan, self.ends = Pipeline(), Fan(), []
        numbers = {"max_num_seqs": 4, "max_batch_tokens": 64, "max_model_len": 100, **limits}
        self.core = EngineCore(
            Scheduler(Limits(**numbers), [PageAllocator(32, 8)], frozenset()),
            self.pipeline,
            self.fan,
            lease_s=10.0,
            step_timeout_s=0.0,
            on_end=lambda *end: self.ends.append(end),
            replace=lambda name, spare, delay_s: self.core.arrived(name, Member(None, None, "again")),
        )

    def ask(self, name, prompt=(1, 2, 3), **more):
        self.core.submit(Request(name, list(prompt), SamplingParams(0.0, 1.0, 0, 0), 5, [], "sink", **more))
        self.core._take_commands()

    def send(self):
        """The plan that is sent next."""
        if self.core.recovery.under_way:
            self.core._recover()
        self.core._send_plans()
        return self.pipeline.plans[-1]

    def finish(self, plan, token=7):
        self.core._finish(StepResult(plan.epoch, plan.step, [token] * len(plan.samples)))

    def kill(self):
        self.core._lose(WorkerLost(["stage-0"], "gone"))


def test_medians_may_be_asked_for_while_steps_are_noted():
    times, ended = StepTimes(), threading.Event()

    def note():
        while not ended.is_set():
            times.note(0.002, 0.001)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=note)
    try:
        thread.start()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            assert times.step_ms() in (None, 2.0)
            assert times.overhead_ms() in (None, 1.0)
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(before)


def test_who_is_loading_is_not_blamed_for_a_step_that_does_not_end(monkeypatch):
    it = Harness()
    it.pipeline.assigned = it.pipeline.mute = {"experts-0-copy-1"}  # a spare that loads answers nobody
    it.core._recover()
    it.ask("a")
    it.send()
    monkeypatch.setattr(it.core, "_step_timeout_s", -1.0)
    with pytest.raises(WorkerLost) as lost:
        it.core._deadline_s()
    assert it.pipeline.probed == ["experts-0", "router-0", "stage-0"]
    assert lost.value.accused  # all that take part are well, so it was a link
    assert "experts-0-copy-1" not in lost.value.names


def test_nothing_is_kept_of_steps_that_are_not_done_again():
    it = Harness()
    it.ask("a")
    for _ in range(5):
        it.finish(it.send()) if it.core.num_steps < 1 else it.send()
        it.kill()
        it.core._recover()
        it.core.recovery.stepped()
        it.core.recovery._losses.clear()
    assert len(it.core._sent) <= 1


def test_a_convicted_request_is_refused_when_it_comes_again_and_so_are_its_equals():
    it = Harness()
    it.ask("poison", [9, 9])
    it.ask("same", [9, 9])
    it.ask("good")
    assert it.send().seq_ids == ["poison", "same", "good"]
    it.kill()
    assert it.send().seq_ids == ["poison"]
    it.kill()
    assert it.send().seq_ids == ["poison"]
    it.kill()
    refused = [delta.request_id for delta in it.fan.said if delta.error == Refusal("convicted")]
    assert sorted(refused) == ["poison", "same"]
    assert sorted(it.ends) == [("poison", Refusal("convicted")), ("same", Refusal("convicted"))]
    canary = it.send()
    assert [name.split("-")[0] for name in canary.seq_ids] == ["canary"]
    assert it.core.recovery._losses["stage-0"]
    it.finish(canary)
    assert it.core.recovery._losses["stage-0"] == []
    it.ask("again", [9, 9])
    assert it.fan.said[-1].request_id == "again"
    assert it.fan.said[-1].error == Refusal("convicted")
    assert it.send().seq_ids == ["good"]


def test_a_failed_row_is_said_to_its_own_request_alone():
    it = Harness()
    it.ask("good")
    it.ask("bad", attempt=4)
    plan = it.send()
    it.core._finish(StepResult(plan.epoch, plan.step, [7, -1]))
    assert it.ends == [("bad", Refusal("failed_row"))]
    good, bad = it.fan.said
    assert (good.tokens, good.error) == ([7], None)
    assert (bad.tokens, bad.error, bad.attempt) == ([], Refusal("failed_row"), 4)
    assert it.core.num_tokens == 1


def test_an_abort_of_a_former_attempt_leaves_the_present_one_alone():
    it = Harness()
    it.ask("a", attempt=1)
    it.ask("a", attempt=2)
    it.core.abort("a", 1)
    it.core._take_commands()
    assert not it.ends
    it.finish(it.send())
    assert it.fan.said[-1].attempt == 2
    it.core.abort("a", 2)
    it.core._take_commands()
    assert it.ends == [("a", None)]


def test_steps_without_one_token_are_no_health():
    it = Harness()
    it.core.stepped_at = before = time.monotonic() - 1000
    it.ask("bad")
    it.finish(it.send(), token=-1)
    assert it.core.stepped_at == before
    it.ask("good")
    it.finish(it.send())
    assert it.core.stepped_at > before


def test_a_canary_has_a_name_that_no_former_engine_gave():
    first, second = Harness(), Harness()
    second.pipeline.epoch = 1 << 20
    assert first.core._canary().request_id != second.core._canary().request_id
    assert first.core._canary().request_id != first.core._canary().request_id


def test_steps_that_share_the_workers_are_not_timed():
    it = Harness(micro_batches=2)
    it.ask("a")
    it.finish(it.send())
    alone = it.send()
    it.finish(alone)
    assert len(it.core.times._samples) == 1
    it.ask("b")
    it.send()
    first, second = it.pipeline.plans[-2:]
    it.finish(second)
    it.finish(first)
    first, second = it.pipeline.plans[-2:]
    assert [plan.num_new for plan in (first, second)] == [[1], [1]]
    it.finish(first)
    assert len(it.core.times._samples) == 1


def test_time_with_a_step_in_flight_is_what_the_bubbles_are_of(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    it = Harness(micro_batches=2)
    it.pipeline.on_busy("stage-0", 0.0)
    it.ask("a")
    plan = it.send()
    now += 3.0
    it.finish(plan)  # the next one follows at once
    now += 1.0
    it.pipeline.on_busy("stage-0", 1.0)
    assert it.core.bubbles.of("stage-0") == 0.75
    it.core.abort("a", 0)
    it.core._take_commands()
    it.finish(it.pipeline.plans[-1])
    now += 50.0
    it.pipeline.on_busy("stage-0", 1.0)
    assert it.core.bubbles.of("stage-0") == 0.75
    assert it.core.bubbles.of("router-0") is None


def test_a_plan_that_cannot_be_sent_keeps_no_other_data_rank_from_its_own():
    """What it says was closed is not said again."""
    it = Harness()

    def send(plan):
        if plan.data_rank == 0:
            raise WorkerLost(["dp-0"], "gone")
        it.pipeline.plans.append(plan)

    it.pipeline.send = send
    plans = [StepPlan(1, 7, 0, [], [], [], b"", [], b"", [], data_rank=rank) for rank in range(3)]
    with pytest.raises(WorkerLost):
        it.core._send(plans, 0.0)
    assert it.pipeline.plans == plans[1:]
