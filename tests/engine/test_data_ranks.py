"""The scheduler over several data ranks, against a model that "samples" a fixed function of the tokens before it."""

import random

from fake_workers import FakeWorkers, expected, request
from hypothesis import given, settings
from hypothesis import strategies as st

from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.records import StepResult


def data_ranks(count, num_pages=16, **limits):
    defaults = {"max_num_seqs": 8, "max_batch_tokens": 16, "max_model_len": 64}
    allocators = [PageAllocator(num_pages, 4) for _ in range(count)]
    return Scheduler(Limits(**{**defaults, **limits}), allocators, frozenset({1}))


def run_plan(sched, workers, plan, texts):
    """Computes one data rank's plan, whose KV is its own."""
    result = workers[plan.data_rank].run(plan)
    for item in sched.commit(StepResult(plan.epoch, plan.step, result.tokens, data_rank=plan.data_rank)):
        delta = item.delta
        assert delta.position == len(texts.setdefault(delta.request_id, []))
        texts[delta.request_id].extend(delta.tokens)
    sched.check()


def test_every_data_rank_has_a_plan_in_every_step_and_the_freest_takes_whoever_waits():
    sched = data_ranks(3)
    sched.add(request("a", [5, 6, 7]))
    plans = sched.schedule(1)
    assert [(plan.data_rank, plan.seq_ids, plan.step) for plan in plans] == [
        (0, ["a"], 0),
        (1, [], 0),
        (2, [], 0),
    ]
    workers, texts = [FakeWorkers(4) for _ in range(3)], {}
    assert sched.num_in_flight == 1
    for plan in reversed(plans):
        run_plan(sched, workers, plan, texts)
    assert sched.num_in_flight == 0
    for name in "bcd":
        sched.add(request(name, [5, 6, 7]))
    assert [plan.seq_ids for plan in sched.schedule(1)] == [["a", "d"], ["b"], ["c"]]


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(16, 30), st.integers(3, 30))
def test_any_load_on_data_ranks_that_come_and_go(seed, in_flight, num_pages, budget):
    """Ranks lose their KV, are away for a while or not, and results come in any order: every text is its own."""
    rng = random.Random(seed)
    count = rng.randrange(1, 4)
    sched = data_ranks(count, num_pages, max_batch_tokens=budget, micro_batches=in_flight)
    prompts = {
        f"r{i}": ([rng.randrange(2, 99) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 30))
        for i in range(rng.randrange(1, 12))
    }
    for name, (prompt, max_tokens) in prompts.items():
        sched.add(request(name, prompt, max_tokens))
    workers, texts, plans, epoch = [FakeWorkers(4) for _ in range(count)], {}, [], 1
    for _ in range(4000):
        if sched.idle:
            break
        if rng.random() < 0.05:
            epoch += 1
            lost = {rank for rank in range(count) if rng.random() < 0.5}
            away = lost - {rng.randrange(count)} if rng.random() < 0.5 else set()
            sched.suspect()
            sched.forget_kv(lost)
            sched.use([rank for rank in range(count) if rank not in away])
            for rank in lost:
                workers[rank] = FakeWorkers(4)
            plans = sched.replan(epoch)
            sched.check()
        while sched.num_in_flight < in_flight and (more := sched.schedule(epoch)):
            plans += more
        assert plans, "the scheduler makes no progress"
        # Each data rank computes its plans in their order.
        first = {plan.data_rank: plan for plan in reversed(plans)}
        plan = first[rng.choice(list(first))]
        plans.remove(plan)
        run_plan(sched, workers, plan, texts)
    assert texts == {name: expected(prompt, n) for name, (prompt, n) in prompts.items()}
    assert sched.idle
    assert sched.num_pages_used == 0


def test_a_suspect_that_lost_its_place_comes_back_alone():
    """Its data rank is away, so that it waits; whoever runs elsewhere is not planned beside it."""
    sched, workers, texts = data_ranks(2), [FakeWorkers(4), FakeWorkers(4)], {}
    for name in ("good", "poison", "late"):
        sched.add(request(name, [5, 6, 7], 4))
    plans = sched.schedule(1)
    assert [plan.seq_ids for plan in plans] == [["good", "late"], ["poison"]]
    sched.suspect()
    sched.forget_kv({1})
    sched.use([0])
    assert sched.replan(2) == []
    alone = []
    for _ in range(3):
        (plan,) = sched.schedule(2)
        alone.append(plan.seq_ids)
        run_plan(sched, workers, plan, texts)
    assert sorted(alone) == [["good"], ["late"], ["poison"]]
    (plan,) = sched.schedule(2)
    assert sorted(plan.seq_ids) == ["good", "late", "poison"]
