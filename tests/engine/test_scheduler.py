"""The scheduler against a model that "samples" a fixed function of the tokens before it."""

import random

import pytest
from fake_workers import GREEDY, FakeWorkers, expected, request
from hypothesis import given, settings
from hypothesis import strategies as st

from r1_cluster.engine.pages import PageAllocator
from r1_cluster.engine.scheduler import Limits, Scheduler
from r1_cluster.records import (
    NOBODY,
    HeldSequence,
    Refusal,
    Request,
    StepResult,
)
from r1_cluster.text.reasoning import ReasoningSplitter, Thought
from r1_cluster.text.tokenizer import Tokenizer


def scheduler(num_pages=16, page_size=4, **limits):
    defaults = {"max_num_seqs": 8, "max_batch_tokens": 16, "max_model_len": 64}
    return Scheduler(Limits(**{**defaults, **limits}), [PageAllocator(num_pages, page_size)], frozenset({1}))


def plan_of(sched, epoch):
    """The next step's plan, of an engine with one data rank; None where there is none."""
    plans = sched.schedule(epoch)
    assert len(plans) <= 1
    return plans[0] if plans else None


def guilty(sched):
    return [request.request_id for request in sched.suspect()[0]]


def collect(sched, workers, texts, max_in_flight=1, order=lambda plans: plans.pop(0)):
    plans = []
    for _ in range(2000):
        while sched.num_in_flight < max_in_flight and (plan := plan_of(sched, 1)) is not None:
            plans.append(plan)
            sched.check()
        if not plans:
            return
        for item in sched.commit(workers.run(order(plans))):
            delta = item.delta
            assert delta.position == len(texts.setdefault(delta.request_id, []))
            texts[delta.request_id].extend(delta.tokens)
        sched.check()
    raise AssertionError("the scheduler makes no progress")


def test_one_request_is_chunked_and_decoded():
    sched, texts = scheduler(max_batch_tokens=4), {}
    prompt = list(range(2, 13))
    sched.add(request("a", prompt, 6))
    collect(sched, FakeWorkers(4), texts)
    assert texts["a"] == expected(prompt, 6)
    assert sched.idle
    assert sched.num_pages_used == 0


def test_a_decode_shares_its_step_with_a_prompts_chunk():
    sched, workers = scheduler(max_batch_tokens=8), FakeWorkers(4)
    sched.add(request("a", [5, 6, 7]))
    sched.commit(workers.run(plan_of(sched, 1)))
    sched.add(request("b", list(range(2, 22))))
    plan = plan_of(sched, 1)
    assert plan.num_new == [1, 7]
    assert [spec.index for spec in plan.samples] == [0]


def test_generated_tokens_of_a_former_engine_are_continued():
    whole = expected([5, 6, 7], 9)
    sched, texts = scheduler(), {"a": whole[:4]}
    sched.add(request("a", [5, 6, 7], 9, generated=whole[:4]))
    collect(sched, FakeWorkers(4), texts)
    assert texts["a"] == whole


def test_abort_of_waiting_running_and_in_flight():
    sched, workers = scheduler(max_num_seqs=1), FakeWorkers(4)
    sched.add(request("a", [5, 6, 7], 50))
    sched.add(request("b", [5, 6], 50))
    plan = plan_of(sched, 1)
    sched.abort("b")
    sched.abort("a")
    assert sched.num_pages_used == 1
    assert sched.commit(workers.run(plan)) == []
    sched.check()
    assert sched.idle
    assert sched.num_pages_used == 0
    sched.abort("never seen")


def test_closed_sequences_are_announced_once():
    sched, workers = scheduler(), FakeWorkers(4)
    sched.add(request("a", [5, 6, 7], 1))
    sched.commit(workers.run(plan_of(sched, 1)))
    sched.add(request("b", [5, 6, 7], 2))
    first = plan_of(sched, 1)
    assert first.closed == ["a"]
    sched.commit(workers.run(first))
    assert plan_of(sched, 1).closed == []


def test_stop_token_and_ignore_eos():
    prompt = [3, 4]
    stop = expected(prompt, 3)[2]
    sched, texts = scheduler(), {}
    sched.add(Request("a", prompt, GREEDY, 10, [stop], "sink"))
    collect(sched, FakeWorkers(4), texts)
    assert texts["a"][-1] == stop
    assert len(texts["a"]) <= 3


# The model's text after this prompt, of which every token may be the stop token or the end of the thought.
SLEEPY = [3, 4]
WHOLE = expected(SLEEPY, 12)


def asleep(stops, until, **fields):
    return Request("a", SLEEPY, GREEDY, 12, stops, "sink", sleeping_until=until, **fields)


def test_stop_tokens_sleep_until_the_end_of_the_thought():
    assert len(set(WHOLE)) == len(WHOLE) == 12
    for stops, until, length in (
        ([WHOLE[2], WHOLE[7]], WHOLE[4], 8),
        ([WHOLE[2]], WHOLE[4], 12),
        ([WHOLE[4], WHOLE[5]], WHOLE[4], 6),  # the end of the thought wakes them, and is none of them yet
        ([WHOLE[2]], 1000, 12),
        ([WHOLE[2]], None, 3),
    ):
        sched, texts = scheduler(), {}
        sched.add(asleep(stops, until))
        collect(sched, FakeWorkers(4), texts)
        assert texts["a"] == WHOLE[:length]


def test_eos_never_sleeps():
    sched, texts = Scheduler(Limits(8, 16, 64), [PageAllocator(16, 4)], frozenset({WHOLE[3]})), {}
    sched.add(asleep([], WHOLE[5]))
    collect(sched, FakeWorkers(4), texts)
    assert texts["a"] == WHOLE[:4]
    # Ignored, and given as a stop token, it sleeps like any other.
    sched.add(asleep([WHOLE[3]], WHOLE[5], ignore_eos=True))
    texts.clear()
    collect(sched, FakeWorkers(4), texts)
    assert texts["a"] == WHOLE


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize("known", range(9))
def test_an_engine_that_takes_over_knows_whether_stop_tokens_sleep(known, adopted):
    stops, until = [WHOLE[2], WHOLE[4], WHOLE[8]], WHOLE[4]
    workers, sched, texts = FakeWorkers(4), scheduler(), {"a": WHOLE[:known]}
    if adopted:
        former = scheduler()
        former.add(asleep(stops, until))
        for _ in range(min(known + 1, 8)):  # the ingress may have missed the last token
            former.commit(workers.run(plan_of(former, 1)))
        (sequence,) = former.running
        held = HeldSequence(
            sequence.tokens.tobytes(),
            former.data_ranks[0].allocator.table("a").tobytes(),
            sequence.num_computed,
        )
        sched.adopt([{"a": held}])
    sched.add(asleep(stops, until, generated=WHOLE[:known]))
    collect(sched, workers, texts)
    assert texts["a"] == WHOLE[:9]


def test_stop_tokens_stay_awake_when_a_sequence_is_computed_again():
    workers, sched, texts = FakeWorkers(4), scheduler(), {"a": WHOLE[:6]}
    sched.add(asleep([WHOLE[2], WHOLE[8]], WHOLE[4]))
    for _ in range(6):
        sched.commit(workers.run(plan_of(sched, 1)))
    sched.forget_kv([0])
    collect(sched, workers, texts)
    assert texts["a"] == WHOLE[:9]


BLANK, START, END = 10, 11, 12


def where_it_ends(tokens, stops, known, adopted=False):
    """How many of the tokens that a model writes an answer has, whose first `known` a former engine computed."""

    def new():
        return Scheduler(Limits(8, 16, 64), [PageAllocator(16, 4)], frozenset({1}), frozenset({BLANK}))

    def ask(generated):
        return Request(
            "a", SLEEPY, GREEDY, 20, stops, "sink", generated, sleeping_until=END, sleeping_from=START
        )

    sched = new()
    sched.add(ask([]))
    for i, token in enumerate(tokens, 1):
        if i - 1 == known:
            if adopted:
                (sequence,) = sched.running
                held = HeldSequence(
                    sequence.tokens.tobytes(),
                    sched.data_ranks[0].allocator.table("a").tobytes(),
                    sequence.num_computed,
                )
                sched = new()
                sched.adopt([{"a": held}])
            else:
                sched = new()
            sched.add(ask(tokens[:known]))
        plan = plan_of(sched, 1)
        (done,) = sched.commit(StepResult(1, plan.step, [token]))
        if done.delta.finish_reason is not None:
            assert done.delta.finish_reason == "stop"
            return i
    return None


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize(
    ("tokens", "stops", "length"),
    [
        ([BLANK, START, 5, BLANK, 5, END, 6, 5, 5], [5, BLANK], 8),
        ([START, 5, 5, 5], [5], None),
        ([BLANK, BLANK, 6, 5, 6], [5], 4),
        ([BLANK, 5, 6], [5, BLANK], 2),  # the answer's first token may end it
        ([5, START, 6], [5], 1),
        ([END, 6, 5, 6], [5, END], 3),
        ([6, END, 5], [END], 2),  # in an answer without a thought it is a token like any other
        ([START, START, END, 6, 5], [START, 5], 5),
    ],
)
def test_stop_tokens_sleep_only_through_a_thought_that_is_there(tokens, stops, length, adopted):
    for known in range(len(tokens)):
        assert where_it_ends(tokens, stops, known, adopted and known > 0) == length


@given(st.lists(st.sampled_from(["\n", "<think>", "</think>", "a", "b"]), max_size=12), st.integers(0, 12))
def test_the_engine_sees_the_thought_where_the_edge_shows_it(checkpoint, texts, known):
    """`b` ends the answer as soon as it is content, and not before."""
    tokenizer = Tokenizer.from_folder(checkpoint)
    splitter, length = ReasoningSplitter(tokenizer, Thought.UNDECIDED), None
    tags = {"<think>": tokenizer.think_start_id, "</think>": tokenizer.think_end_id}
    tokens = [tags[text] if text in tags else tokenizer.encode(text)[0] for text in texts]
    for i, (text, token) in enumerate(zip(texts, tokens), 1):
        if splitter.feed([token]).content.endswith("b") and text == "b":
            length = i
            break
    names = {"\n": BLANK, "<think>": START, "</think>": END, "a": 5, "b": 6}
    assert where_it_ends([names[text] for text in texts], [6], known, adopted=False) == length


def test_micro_batches_split_the_running_sequences():
    sched, workers = scheduler(micro_batches=2), FakeWorkers(4)
    for i in range(6):
        sched.add(request(f"r{i}", [2 + i, 3], 20))
    sched.commit(workers.run(plan_of(sched, 1)))
    first, second = plan_of(sched, 1), plan_of(sched, 1)
    assert len(first.seq_ids) == len(second.seq_ids) == 3
    assert not set(first.seq_ids) & set(second.seq_ids)


def test_few_sequences_decode_in_one_step_and_whoever_comes_in_between_joins_them():
    sched, workers = scheduler(micro_batches=2, least_decodes=3), FakeWorkers(4)

    def comes_in_between(name):
        sched.add(request(name, [9, 3], 20))
        prompt = plan_of(sched, 1)
        assert prompt.seq_ids == [name]
        sched.commit(workers.run(prompt))

    for i in range(4):
        sched.add(request(f"r{i}", [2 + i, 3], 20))
    sched.commit(workers.run(plan_of(sched, 1)))
    first = plan_of(sched, 1)
    assert len(first.seq_ids) == 4
    comes_in_between("r4")
    assert plan_of(sched, 1) is None
    sched.commit(workers.run(first))
    first = plan_of(sched, 1)
    assert len(first.seq_ids) == 5
    comes_in_between("r5")
    # Six are enough for two steps.
    assert plan_of(sched, 1).seq_ids == ["r5"]
    sched.commit(workers.run(first))
    assert len(plan_of(sched, 1).seq_ids) == 3


def test_unequal_micro_batches_become_equal():
    sched, workers = scheduler(micro_batches=2), FakeWorkers(4)
    for i in range(6):
        sched.add(request(f"r{i}", [2 + i, 3], 20 if i > 1 else 2))
    sched.commit(workers.run(plan_of(sched, 1)))
    first, second = plan_of(sched, 1), plan_of(sched, 1)
    sched.commit(workers.run(first))  # two of its three end
    assert len(plan_of(sched, 1).seq_ids) == 1
    sched.commit(workers.run(second))
    assert len(plan_of(sched, 1).seq_ids) == 2


def test_a_replan_computes_the_same():
    sched, workers = scheduler(), FakeWorkers(4)
    sched.add(request("a", [5, 6, 7]))
    plan = plan_of(sched, 1)
    (again,) = sched.replan(2)
    assert (again.epoch, again.step) == (2, plan.step)
    assert again.tokens == plan.tokens
    assert workers.run(again).tokens == workers.run(plan).tokens


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 4), st.integers(16, 40), st.integers(3, 30))
def test_any_load_gives_every_request_its_own_text(seed, in_flight, least, num_pages, budget):
    rng = random.Random(seed)
    options = {"micro_batches": in_flight, "least_decodes": least}
    sched = scheduler(num_pages=num_pages, max_batch_tokens=budget, **options)
    prompts = {
        f"r{i}": ([rng.randrange(2, 99) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 30))
        for i in range(rng.randrange(1, 12))
    }
    for name, (prompt, max_tokens) in prompts.items():
        sched.add(request(name, prompt, max_tokens))
    texts: dict[str, list[int]] = {}
    collect(sched, FakeWorkers(4), texts, in_flight)
    assert texts == {name: expected(prompt, n) for name, (prompt, n) in prompts.items()}
    assert sched.idle
    assert sched.num_pages_used == 0


def test_suspects_run_alone_and_only_who_kills_alone_is_guilty():
    sched, workers, texts = scheduler(), FakeWorkers(4), {}
    for name in ("good", "poison"):
        sched.add(request(name, [5, 6, 7], 4))
    assert len(plan_of(sched, 1).seq_ids) == 2
    assert guilty(sched) == []  # a worker died while both ran: nobody knows yet whose fault it was
    assert sched.replan(2) == []  # together they are not tried again
    while (plan := plan_of(sched, 2)) is not None:
        if "poison" in plan.seq_ids:
            assert plan.seq_ids == ["poison"]
            assert guilty(sched) == []
            (again,) = sched.replan(3)
            assert again.seq_ids == ["poison"]
            assert guilty(sched) == ["poison"]
            sched.abort("poison")
            assert sched.replan(4) == []
        else:
            for item in sched.commit(workers.run(plan)):
                texts.setdefault(item.delta.request_id, []).extend(item.delta.tokens)
    assert texts == {"good": expected([5, 6, 7], 4)}
    sched.check()
    assert sched.num_pages_used == 0


def test_deaths_are_forgotten_once_the_request_has_got_a_token():
    sched, workers = scheduler(), FakeWorkers(4)
    sched.add(request("alone", [5, 6, 7], 8))
    for _ in range(4):
        plan_of(sched, 1)
        assert guilty(sched) == []  # whoever died then: it had nothing to do with this request
        (plan,) = sched.replan(2)
        assert len(sched.commit(workers.run(plan))) == 1


def test_who_shares_the_workers_with_another_step_is_not_guilty():
    sched, workers = scheduler(micro_batches=2, max_batch_tokens=3), FakeWorkers(4)
    for name in ("good", "poison"):
        sched.add(request(name, [5, 6, 7], 4))
    plans = [plan_of(sched, 1), plan_of(sched, 1)]
    assert [plan.seq_ids for plan in plans] == [["good"], ["poison"]]
    assert guilty(sched) == []  # either may have killed
    assert sched.replan(2) == []
    alone = plan_of(sched, 2)
    assert alone.seq_ids == ["good"]
    assert plan_of(sched, 2) is None  # nobody beside a suspect
    sched.commit(workers.run(alone))
    assert plan_of(sched, 2).seq_ids == ["poison"]
    assert plan_of(sched, 2) is None
    assert guilty(sched) == []
    sched.replan(3)
    assert guilty(sched) == ["poison"]


def test_the_engines_own_request_is_tried_first_and_is_never_guilty():
    sched, workers = scheduler(), FakeWorkers(4)
    for name in ("suspect", "another"):
        sched.add(request(name, [5, 6, 7], 4))
    plan_of(sched, 1)
    sched.suspect()
    assert sched.replan(2) == []
    sched.put_on_trial(Request("canary", [5], GREEDY, 1, [], NOBODY))
    for epoch in range(2, 6):
        assert plan_of(sched, epoch) is None or epoch == 2
        assert guilty(sched) == []
        (plan,) = sched.replan(epoch)
        assert plan.seq_ids == ["canary"]
    sched.commit(workers.run(plan))
    assert plan_of(sched, 6).seq_ids == ["suspect"]
    sched.check()


def test_a_failed_row_ends_its_own_request_and_no_other():
    sched, workers, texts = scheduler(), FakeWorkers(4), {}
    for name in ("good", "bad", "better"):
        sched.add(request(name, [5, 6, 7], 4))
    plan = plan_of(sched, 1)
    result = workers.run(plan)
    result.tokens[plan.seq_ids.index("bad")] = -1
    finished = {item.delta.request_id: item.delta for item in sched.commit(result)}
    assert finished["bad"].tokens == []
    assert finished["bad"].finish_reason == "error"
    assert finished["bad"].error == Refusal("failed_row")
    for name in ("good", "better"):
        assert finished[name].error is None
        texts[name] = list(finished[name].tokens)
    collect(sched, workers, texts)
    assert texts == {name: expected([5, 6, 7], 4) for name in ("good", "better")}
    sched.check()
    assert sched.num_pages_used == 0


def test_where_more_decode_than_a_step_has_tokens_they_take_turns():
    sched, workers = scheduler(num_pages=64, max_num_seqs=8, max_batch_tokens=3), FakeWorkers(4)
    got = {f"r{i}": 0 for i in range(8)}
    for name in got:
        sched.add(request(name, [5, 6], 50))

    def step():
        for item in sched.commit(workers.run(plan_of(sched, 1))):
            got[item.delta.request_id] += len(item.delta.tokens)

    for _ in range(20):  # prompts, of which none may wait for the others' answers
        step()
    assert min(got.values()) >= 1
    before = dict(got)
    for _ in range(16):
        step()
    assert {got[name] - before[name] for name in got} == {6}


def test_a_prompt_is_computed_while_as_many_decode_as_a_step_has_tokens():
    sched, workers = scheduler(num_pages=64, max_num_seqs=9, max_batch_tokens=8), FakeWorkers(4)
    for i in range(8):
        sched.add(request(f"r{i}", [5], 50))
    sched.commit(workers.run(plan_of(sched, 1)))
    sched.add(request("late", [5] * 20, 50))
    got = set()
    for _ in range(12):
        got |= {item.delta.request_id for item in sched.commit(workers.run(plan_of(sched, 1)))}
    assert "late" in got


def test_after_a_stage_lost_its_kv_everything_is_computed_again():
    sched, workers, texts = scheduler(), FakeWorkers(4), {}
    sched.add(request("a", [5, 6, 7], 8))
    sched.add(request("b", list(range(2, 12)), 8))
    for _ in range(3):
        for item in sched.commit(workers.run(plan_of(sched, 1))):
            texts.setdefault(item.delta.request_id, []).extend(item.delta.tokens)
    plan_of(sched, 1)  # in flight when the stage dies
    workers.slots.clear()
    sched.forget_kv([0])
    sched.check()
    collect(sched, workers, texts)
    assert texts == {"a": expected([5, 6, 7], 8), "b": expected(list(range(2, 12)), 8)}


def test_a_request_that_is_asked_for_again_catches_up():
    sched, workers, texts = scheduler(), FakeWorkers(4), {}
    asked = request("a", [5, 6, 7], max_tokens=6, ignore_eos=True)
    assert sched.catch_up(asked) is None
    sched.add(asked)
    for _ in range(3):
        sched.commit(workers.run(plan_of(sched, 1)))
    whole = expected([5, 6, 7], 6)
    plan = plan_of(sched, 1)
    sched.abort("a")  # the ingress gave it up, and asks again before the step has ended
    missed = sched.catch_up(request("a", [5, 6, 7], max_tokens=6, ignore_eos=True, generated=whole[:1]))
    assert (missed.delta.position, missed.delta.tokens) == (1, whole[1:3])
    (item,) = sched.commit(workers.run(plan))
    texts["a"] = whole[:3] + item.delta.tokens
    collect(sched, workers, texts)
    assert texts["a"] == whole
    assert sched.idle
