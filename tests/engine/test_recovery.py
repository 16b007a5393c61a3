"""What an engine does about lost workers, decided without any worker."""

import pytest
from small_model import config_values

from r1_cluster.config import LayoutConfig
from r1_cluster.engine import recovery as module
from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.pipeline import Deposed, Member, WorkerLost
from r1_cluster.engine.recovery import EngineFailed, Recovery
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.models.family import parse_config
from r1_cluster.planning.layout import build_layout
from r1_cluster.records import NOBODY, Request, SamplingParams, StepResult


class Pipeline:
    """Stands in for `pipeline.Pipeline`: notes what it is asked, and answers as it is told to."""

    def __init__(self, layout):
        self.layout = layout
        self.epoch, self.kv_eras = 1, [1]
        self.members = {w.name: Member(None, None, "") for w in (*layout.workers, *layout.spares)}
        self.assigned = set()
        self.silent = []
        self.links = []
        self.dead_spares = set()

    @property
    def spares(self):
        return [spare.name for spare in self.layout.spares if spare.name in self.members]

    def probe(self, names, timeout_s):
        return [name for name in names if name in self.silent]

    def drop(self, name):
        self.members.pop(name, None)
        self.assigned.discard(name)

    def assign(self, spare, name):
        self.members[name] = self.members.pop(spare)
        self.assigned.add(name)
        if spare in self.dead_spares:
            raise WorkerLost([name], "gone")

    def link(self, epoch):
        self.epoch = epoch
        self.links.append(frozenset(self.members.keys() - self.assigned))


class Harness:
    def __init__(self, **layout):
        model = parse_config(config_values())
        config = LayoutConfig(kind="disaggregated", stages=2, expert_shards=2, **layout)
        self.pipeline = Pipeline(build_layout(config, model))
        self.scheduler = Scheduler(Limits(4, 64, 100), [PageAllocator(16, 8)], frozenset())
        self.replaced = []
        self.noted = []
        self.recovery = Recovery(
            self.scheduler,
            self.pipeline,
            lambda *call: self.replaced.append(call),
            lambda: None,
            lambda lost, took_s: self.noted.append(lost),
        )


def test_nothing_is_computed_until_a_lost_stage_is_back():
    it = Harness()
    it.recovery.lose(["stage-0"])
    assert it.replaced == [("stage-0", None, 0.0)]
    assert it.recovery.under_way
    assert it.recovery.blocked
    assert it.recovery.advance(idle=False) is None
    it.recovery.arrived("stage-0", Member(None, None, "again"))
    assert it.recovery.advance(idle=False) == []
    assert (it.pipeline.epoch, it.pipeline.kv_eras) == (2, [2])
    assert not it.recovery.under_way
    assert it.noted == [["stage-0"]]


def test_a_copy_takes_over_at_once_and_the_lost_shard_joins_between_two_steps():
    it = Harness(redundant_experts=1)
    it.recovery.lose(["experts-1"])
    assert not it.recovery.blocked
    assert it.recovery.advance(idle=False) == []
    assert "experts-1" not in it.pipeline.links[-1]
    assert not it.recovery.under_way
    assert it.pipeline.kv_eras == [1]  # no KV was lost
    it.recovery.arrived("experts-1", Member(None, None, "again"))
    assert it.recovery.under_way
    assert it.recovery.advance(idle=False) is None
    assert it.recovery.advance(idle=True) == []
    assert "experts-1" in it.pipeline.links[-1]
    assert it.noted == [["experts-1"]]


def test_both_hosts_of_a_shard_block():
    it = Harness(redundant_experts=1)
    it.recovery.lose(["experts-1", "experts-1-copy-1"])
    assert it.recovery.blocked
    it.recovery.arrived("experts-1-copy-1", Member(None, None, "again"))
    assert it.recovery.advance(idle=False) == []


def test_a_spare_takes_the_place_and_another_spare_is_started():
    it = Harness(spares=1)
    it.recovery.lose(["router-1"])
    assert it.replaced == [("router-1", "spare-0", 0.0)]
    assert it.recovery.advance(idle=False) is None
    it.pipeline.assigned.clear()  # it has loaded
    assert it.recovery.advance(idle=False) == []
    it.recovery.arrived("spare-0", Member(None, None, "new"))
    assert it.recovery.advance(idle=False) is None
    assert not it.recovery.under_way
    assert it.pipeline.spares == ["spare-0"]


def test_a_dead_spare_is_no_help():
    it = Harness(spares=2)
    it.pipeline.dead_spares = {"spare-0"}
    it.recovery.lose(["router-1"])
    assert it.replaced == [("spare-0", None, 0.0), ("router-1", "spare-1", 0.0)]


def test_a_spare_that_dies_while_it_loads_is_replaced():
    it = Harness(spares=1)
    it.recovery.lose(["router-1"])
    it.recovery.lose(["router-1"])
    assert it.replaced == [("router-1", "spare-0", 0.0), ("router-1", None, 0.0)]


def test_a_broken_link_is_made_anew_and_nobody_is_replaced():
    it = Harness()
    it.recovery.accuse(["experts-1"])
    assert it.replaced == []
    assert it.recovery.under_way
    assert it.recovery.advance(idle=False) == []
    assert it.pipeline.links[-1] >= {"experts-0", "experts-1"}


def test_who_is_accused_and_silent_is_lost():
    it = Harness()
    it.pipeline.silent = ["experts-1"]
    it.recovery.accuse(["experts-1"])
    assert it.replaced == [("experts-1", None, 0.0)]


def test_who_is_accused_again_and_again_is_lost():
    it = Harness()
    for _ in range(module.MAX_ACCUSATIONS):
        assert it.replaced == []
        it.recovery.accuse(["experts-1"])
        it.recovery.advance(idle=False)
    assert it.replaced == [("experts-1", None, 0.0)]


def test_a_spare_is_not_blamed_for_its_predecessor():
    it = Harness(spares=1)
    it.recovery.lose(["router-1"])
    it.pipeline.silent = ["router-1"]  # it loads
    it.recovery.accuse(["router-1"])  # by a peer, for the death before
    assert it.replaced == [("router-1", "spare-0", 0.0)]
    it.pipeline.assigned.clear()
    assert it.recovery.advance(idle=False) == []


def test_a_deposed_engine_starts_nobody():
    it = Harness()
    it.recovery.lose(["stage-0"])
    it.recovery.arrived("stage-0", Deposed("another has taken over"))
    with pytest.raises(Deposed):
        it.recovery.advance(idle=False)


def test_a_start_that_fails_is_tried_again_later_and_not_for_ever():
    it = Harness()
    it.recovery.lose(["experts-0"])
    for failures in range(1, module.MAX_FAILED_STARTS):
        it.recovery.arrived("experts-0", RuntimeError("no room"))
        assert it.recovery.advance(idle=False) is None
        assert it.replaced[-1] == ("experts-0", None, 0.5 * 2**failures)
    it.recovery.arrived("experts-0", RuntimeError("no room"))
    with pytest.raises(EngineFailed, match="no room"):
        it.recovery.advance(idle=False)


def test_a_worker_that_dies_all_the_time_ends_the_engine():
    it = Harness()
    for _ in range(module.MAX_RESTARTS):
        it.recovery.lose(["router-1"])
        it.recovery.arrived("router-1", Member(None, None, "again"))
        it.recovery.advance(idle=False)
    with pytest.raises(EngineFailed, match="router-1 was lost"):
        it.recovery.lose(["router-1"])


def run(it, name):
    """A step of one request, alone among suspects, in which stage-0 dies; the requests that are guilty of it."""
    (plan,) = it.scheduler.schedule(it.pipeline.epoch)
    assert plan is None or plan.seq_ids == [name]
    guilty = it.recovery.lose(["stage-0"])
    it.recovery.arrived("stage-0", Member(None, None, "again"))
    it.recovery.advance(idle=False)
    return [request.request_id for request in guilty]


def ask(it, name, sink="sink"):
    it.scheduler.add(Request(name, [1, 2, 3], SamplingParams(0.0, 1.0, 0, 0), 5, [], sink))


def test_kills_of_convicted_requests_count_against_nobody():
    it = Harness()
    for i in range(3 * module.MAX_RESTARTS):
        ask(it, f"poison-{i}")
        assert run(it, f"poison-{i}") == []
        assert run(it, f"poison-{i}") == [f"poison-{i}"]
        it.scheduler.abort(f"poison-{i}")
        ask(it, f"canary-{i}", NOBODY)
        (plan,) = it.scheduler.schedule(it.pipeline.epoch)
        it.scheduler.commit(StepResult(plan.epoch, plan.step, [7]))
        it.recovery.stepped()
        it.scheduler.abort(f"canary-{i}")


def test_a_worker_that_kills_the_canary_as_well_is_not_excused():
    it = Harness()

    def broken():
        for i in range(module.MAX_RESTARTS):
            ask(it, f"innocent-{i}")
            run(it, f"innocent-{i}")
            run(it, f"innocent-{i}")
            it.scheduler.abort(f"innocent-{i}")
            ask(it, f"canary-{i}", NOBODY)
            assert run(it, f"canary-{i}") == []
            it.scheduler.abort(f"canary-{i}")

    with pytest.raises(EngineFailed, match="stage-0 was lost"):
        broken()


def test_only_the_kills_of_a_convicted_request_are_excused():
    """Not what dies while its last kill is put right: a worker that is no sooner there than gone."""
    it = Harness()
    ask(it, "poison")
    run(it, "poison")
    it.scheduler.schedule(it.pipeline.epoch)
    assert it.recovery.lose(["stage-0"]) != []

    def never_linked():
        for _ in range(module.MAX_RESTARTS + 1):
            it.recovery.arrived("stage-0", Member(None, None, "again"))
            it.recovery._take_in(*it.recovery._arrivals.popleft())
            it.recovery.lose(["stage-0"])

    with pytest.raises(EngineFailed, match="stage-0 was lost"):
        never_linked()


def test_what_a_former_engine_left_missing_is_filled():
    it = Harness(spares=2)
    for name in ("stage-1", "spare-1"):
        del it.pipeline.members[name]
    it.recovery = Recovery(
        it.scheduler, it.pipeline, lambda *call: it.replaced.append(call), lambda: None, lambda *_: None
    )
    it.recovery.fill()
    assert it.replaced == [("stage-1", "spare-0", 0.0), ("spare-1", None, 0.0)]
    it.pipeline.assigned.clear()
    assert it.recovery.advance(idle=False) == []
