"""The generator: what training never shows, what the held-out set holds, and that answers are right."""

import random
from fractions import Fraction
from itertools import islice

import pytest
from nano_r1 import talk
from nano_r1.data import (
    TASKS,
    Example,
    draw_example,
    held_out_examples,
    is_held_out_item,
    is_held_out_wording,
    training_examples,
)
from nano_r1.heldout import draw_held_out, read_held_out, write_held_out


@pytest.fixture(scope="module")
def training() -> list[Example]:
    return list(islice(training_examples(random.Random(3)), 15000))


def test_training_is_seeded() -> None:
    first, second = (list(islice(training_examples(random.Random(1)), 50)) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_training_and_held_out_share_no_item_and_no_unseen_wording(training: list[Example]) -> None:
    items = {(e.task, e.operands) for e in training if e.task != "talk"}
    wordings = {(e.task, e.wording) for e in training}
    for task in TASKS:
        for unseen in (False, True):
            for example in held_out_examples(task, unseen, 60, seed=0):
                assert (task, example.operands) not in items
                assert not unseen or (task, example.wording) not in wordings


def test_known_wordings_do_occur_in_training(training: list[Example]) -> None:
    wordings = {(e.task, e.wording) for e in training}
    for task in ("add", "subtract", "multiply", "compare", "reverse", "story"):
        known = held_out_examples(task, False, 60, seed=0)
        assert sum((task, e.wording) in wordings for e in known) >= 50


def test_every_task_has_many_wordings_in_both_languages(training: list[Example]) -> None:
    for task in TASKS:
        chosen = [e for e in training if e.task == task]
        assert len({e.wording for e in chosen}) >= 90
        share = sum(e.language == "ja" for e in chosen) / len(chosen)
        assert 0.1 < share < 0.3
        assert len({e.prompt for e in chosen}) > 0.5 * len(chosen)


def test_the_plainest_wordings_are_trained(training: list[Example]) -> None:
    plain = (("add", "{a}+{b}"), ("subtract", "{a}-{b}"), ("multiply", "{a} * {b}"), ("talk", "hello"))
    for task, wording in plain:
        example = Example(task, "en", "", wording, "", "", "", "", 1)
        assert not is_held_out_wording(example)


def expected_result(example: Example) -> str:
    operands = example.operands.split("|")
    if example.task in ("add", "subtract", "multiply", "story"):
        operation = operands.pop(0) if example.task == "story" else example.task
        a, b = map(int, operands)
        return str({"add": a + b, "subtract": a - b, "multiply": a * b}[operation])
    if example.task == "compare":
        first, second, wanted = operands
        if Fraction(first) == Fraction(second):
            return "equal"
        return (max if wanted == "larger" else min)(first, second, key=Fraction)
    if example.task == "reverse":
        return ", ".join(reversed(operands))
    direction, *numbers = operands
    return ", ".join(sorted(numbers, key=int, reverse=direction == "down"))


def test_results_are_right_and_boxed(training: list[Example]) -> None:
    for example in training:
        if example.task == "talk":
            assert example.answer == talk.REPLIES[example.operands, example.language].answer
        else:
            assert example.result == expected_result(example)
            assert f"\\boxed{{{example.result}}}" in example.answer


def test_prompts_hold_their_operands_as_written(training: list[Example]) -> None:
    for example in training:
        if example.task in ("add", "subtract", "multiply", "reverse"):
            assert all(operand in example.prompt for operand in example.operands.split("|"))


def test_no_placeholder_is_left(training: list[Example]) -> None:
    assert not [e.prompt for e in training if "{" in e.prompt or "}" in e.prompt]


def test_operands_reach_the_promised_lengths() -> None:
    rng = random.Random(0)
    for task, longest in (("add", 6), ("subtract", 6), ("multiply", 5), ("sort", 5), ("reverse", 5)):
        sizes = {draw_example(rng, task).size for _ in range(400)}
        assert max(sizes) == longest
        assert min(sizes) <= 2


def test_held_out_set_is_distinct_balanced_and_round_trips(tmp_path) -> None:
    items = draw_held_out(seed=0, count=20)
    assert len({item.prompt for item in items if item.task != "talk"}) == 20 * 2 * (len(TASKS) - 1)
    for task in TASKS:
        assert sum(item.task == task and item.wording == "unseen" for item in items) == 20
    write_held_out(items, tmp_path / "heldout.jsonl")
    assert read_held_out(tmp_path / "heldout.jsonl") == items


def test_items_are_held_out_whatever_their_wording() -> None:
    rng = random.Random(0)
    example = next(e for e in iter(lambda: draw_example(rng, "add"), None) if is_held_out_item(e))
    other = Example("add", "ja", example.operands, "{a}たす{b}", "", "", "", "", 1)
    assert is_held_out_item(other)
