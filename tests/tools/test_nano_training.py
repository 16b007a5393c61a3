"""Batches, workers, resuming and scoring."""

import random
from collections import Counter
from itertools import islice

import pytest
import torch
import train_nano_r1
from nano_r1.batches import LONG_EVERY, chats_at, groups_for
from nano_r1.data import TASKS, training_examples
from nano_r1.evaluate import FreeRun, LogitError, Outcome, boxed, evaluate, final_answer, guess_rate
from nano_r1.export import save_model
from nano_r1.heldout import HeldOut, draw_held_out
from nano_r1.model import NanoConfig, NanoR1
from nano_r1.report import Measured, TrainingRun, render_card, render_report
from nano_r1.tokenizer import EOS_ID, ChatEncoder, train_tokenizer
from nano_r1.workers import StepPlan, WorkerPool, accumulate
from tokenizers import Tokenizer
from train_nano_r1 import Trainer, TrainingConfig, mtp_weight, schedule

SMALL = NanoConfig(
    hidden_size=32, intermediate_size=48, moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16
)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    examples = islice(training_examples(random.Random(0)), 4000)
    tokenizer: Tokenizer = train_tokenizer(t for e in examples for t in (e.prompt, e.thought, e.answer))
    return ChatEncoder(tokenizer)


def test_schedule_warms_up_and_always_ends_at_zero() -> None:
    assert schedule(0.0) < 0.05
    assert schedule(0.2) == 1.0
    assert schedule(0.65) == pytest.approx(0.5)
    assert schedule(1.0) == 0.0
    assert (mtp_weight(0.0), mtp_weight(1.0)) == (0.3, 0.15)


def test_batches_depend_on_seed_and_step_alone(encoder: ChatEncoder) -> None:
    assert chats_at(3, 0, encoder, 1500) == chats_at(3, 0, encoder, 1500)
    assert chats_at(3, 0, encoder, 1500) != chats_at(4, 0, encoder, 1500)
    longest = max(len(chat.ids) for chat in chats_at(LONG_EVERY - 1, 0, encoder, 6000))
    assert longest > 300


def test_groups_hold_every_chat_once_and_learn_only_completions(encoder: ChatEncoder) -> None:
    chats = chats_at(0, 0, encoder, 3000)
    groups = groups_for(chats, 0, 2) + groups_for(chats, 1, 2)
    assert sum(len(group.ids) for group in groups) == len(chats)
    assert sum(int(group.learnt.sum()) for group in groups) == sum(len(c.ids) - c.num_prompt for c in chats)
    rows = [
        row[learnt].tolist() for group in groups for row, learnt in zip(group.ids, group.learnt, strict=True)
    ]
    assert sorted(rows) == sorted(chat.ids[chat.num_prompt :] for chat in chats)
    assert all(row[-1] == EOS_ID for row in rows)


def gradients(model: NanoR1) -> list[torch.Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
def test_shares_of_the_gradient_add_up(encoder: ChatEncoder) -> None:
    torch.manual_seed(0)
    model = NanoR1(SMALL)
    chats = chats_at(0, 0, encoder, 800)
    loss = accumulate(model, chats, 0.3, 0, 1)
    whole = gradients(model)
    shares = accumulate(model, chats, 0.3, 0, 2) + accumulate(model, chats, 0.3, 1, 2)
    torch.testing.assert_close(shares, loss)
    for name, ours, all_of_it in zip(dict(model.named_parameters()), gradients(model), whole, strict=True):
        torch.testing.assert_close(ours, all_of_it, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
def test_worker_processes_give_the_same_gradient(encoder: ChatEncoder) -> None:
    torch.manual_seed(0)
    model = NanoR1(SMALL)
    plan = StepPlan(step=0, seed=0, num_tokens=800, mtp_weight=0.3)
    accumulate(model, chats_at(0, 0, encoder, 800), 0.3, 0, 1)
    whole = gradients(model)
    pool = WorkerPool(model, encoder, 2)
    try:
        for _ in range(2):  # the second step must not see the first one's gradient
            model.zero_grad(set_to_none=True)
            result, loads = pool.gradient(plan)
            for ours, all_of_it in zip(gradients(model), whole, strict=True):
                torch.testing.assert_close(ours, all_of_it, rtol=1e-3, atol=1e-6)
    finally:
        pool.close()
    assert result.num_tokens >= 800
    assert loads.shape == (4, SMALL.n_routed_experts)


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(encoder: ChatEncoder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train_nano_r1, "NanoConfig", lambda: SMALL)
    config = TrainingConfig(num_tokens=500)

    def run(num_steps: int) -> Trainer:
        trainer = Trainer(config, encoder, tmp_path)
        trainer.resume()
        pool = WorkerPool(trainer.model, encoder, 1)
        while trainer.step < num_steps:
            trainer.train_step(pool)
            trainer.seconds = 60.0 * trainer.step  # the schedule of both runs, whatever the machine
        return trainer

    whole = run(4)
    run(2).save()
    resumed = run(4)
    for ours, other in zip(
        resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, other)


def test_a_state_of_another_configuration_is_refused(encoder: ChatEncoder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train_nano_r1, "NanoConfig", lambda: SMALL)
    Trainer(TrainingConfig(seed=1), encoder, tmp_path).save()
    with pytest.raises(SystemExit, match="another configuration"):
        Trainer(TrainingConfig(seed=2), encoder, tmp_path).resume()


def test_final_answer_is_the_last_box_after_the_thought(encoder: ChatEncoder) -> None:
    assert final_answer("\\boxed{1}\n</think>\n\nThe answer is \\boxed{2, 3}.") == "2, 3"
    assert final_answer("a greeting\n</think>\n\nHello!") == "Hello!"
    ids = encoder.completion("x", "\\boxed{7}")
    assert boxed(ids, encoder) == "7"
    assert boxed(ids[:-1], encoder) is None


def item(task: str, size: int, result: str) -> HeldOut:
    return HeldOut(task, "en", "known", size, "", "", "", result)


def test_guess_rates() -> None:
    assert guess_rate([item("sort", 3, "1, 2, 3"), item("sort", 2, "1, 2")]) == pytest.approx(
        (1 / 6 + 1 / 2) / 2
    )
    assert guess_rate([item("add", 2, "37")]) == pytest.approx(1 / 90)
    assert guess_rate(
        [item("talk", 1, "Hi"), item("talk", 1, "Hi"), item("talk", 1, "Bye")]
    ) == pytest.approx(2 / 3)


def test_report_says_what_is_not_met() -> None:
    questions = draw_held_out(seed=0, count=10)
    outcomes = [Outcome(q, q.task != "sort", True, 1.0, True) for q in questions]
    counts = Counter(dict.fromkeys(TASKS, 100))
    free_run = FreeRun(counts, counts, {1: [5, 5], 2: [9, 1]})
    double, single = LogitError(2e-5, 0, 1000), LogitError(0.12, 7, 1000)
    measured = Measured(outcomes, free_run, double, single, 4 * 2**20)
    run = TrainingRun(steps=10, tokens=10**6, minutes=1.0, num_parameters=1, seed=0)
    report = render_report(measured, run)
    assert "| trace, known wordings: sorting lists | ≥ 0.90 | 0.000 | **not met** |" in report
    assert "| expert load, max/mean of the worst layer | ≤ 1.5 | 1.80 | **not met** |" in report
    assert "| MTP acceptance, free-running greedy output | ≥ 0.90 | 1.000 | met |" in report
    assert report.count("**not met**") == 2
    assert "at all but 7 of 1,000 positions" in report
    assert "| sorting lists | 0.00 | 0.00 |" in render_card(run, outcomes)


@pytest.mark.system  # a quarter of a minute
def test_evaluate_scores_an_untrained_network_as_wrong(encoder: ChatEncoder, tmp_path) -> None:
    torch.manual_seed(0)
    save_model(NanoR1(SMALL), tmp_path)
    outcomes, free_run = evaluate(tmp_path, encoder, draw_held_out(seed=0, count=1)[:3])
    assert not any(outcome.trace or outcome.answer or outcome.voted for outcome in outcomes)
    assert free_run.drafted.total() > 0
    assert all(sum(load) > 0 for load in free_run.loads.values())
