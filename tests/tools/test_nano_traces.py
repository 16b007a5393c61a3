"""The thoughts: every equation in them holds, and they end in the right result."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_r1.traces import (
    add_trace,
    compare_trace,
    multiply_trace,
    reverse_trace,
    sort_trace,
    subtract_trace,
    tag_columns,
)

NUMBERS = st.integers(0, 999_999)


def test_columns_are_lettered_from_the_units() -> None:
    assert tag_columns("4823") == "d4c8b2a3"
    assert tag_columns("12.05") == "b1a2.p0q5"


def last_result(thought: str) -> str:
    return thought.splitlines()[-1].split(" → ")[1].split(" ")[0]


def assert_equations_hold(thought: str) -> None:
    for line in thought.splitlines()[1:]:
        sides = line.split(": ")[1].split(" → ")[0].split("=")
        values = [eval(side) for side in sides]  # digits and + - * only, by the pattern below
        assert all(re.fullmatch(r"[-+*0-9]+", side) for side in sides)
        # "5*2=10+0=10": each side continues from the value before it
        assert values[0] == eval(sides[1].split("+")[0])
        assert values[-1] == values[-2]


@given(NUMBERS, NUMBERS)
def test_addition(a: int, b: int) -> None:
    thought = add_trace(a, b)
    assert int(last_result(thought)) == a + b
    assert_equations_hold(thought)
    assert thought.endswith("carry 0")


@given(NUMBERS, NUMBERS)
def test_subtraction(a: int, b: int) -> None:
    a, b = max(a, b), min(a, b)
    thought = subtract_trace(a, b)
    assert int(last_result(thought)) == a - b
    assert_equations_hold(thought)
    assert thought.endswith("borrow 0")


def test_subtraction_refuses_negative_results() -> None:
    with pytest.raises(ValueError, match="negative"):
        subtract_trace(3, 5)


@given(NUMBERS, st.integers(0, 9))
def test_multiplication(a: int, digit: int) -> None:
    thought = multiply_trace(a, digit)
    assert int(last_result(thought)) == a * digit
    assert_equations_hold(thought)


@given(st.decimals(0, 9999, places=3), st.decimals(0, 9999, places=2), st.sampled_from(("larger", "smaller")))
def test_comparison(a, b, wanted: str) -> None:
    thought, answer = compare_trace(str(a), str(b), wanted)
    if a == b:
        assert answer == "equal"
    else:
        assert answer == str(max(a, b) if wanted == "larger" else min(a, b))
    assert thought.splitlines()[0] == wanted
    for line in thought.splitlines()[2:-1]:
        x, y, sign = line.split(": ")[1].split(" ")
        assert sign == ("=" if x == y else ">" if x > y else "<")


def test_comparison_stops_at_the_first_difference() -> None:
    thought, answer = compare_trace("3.7", "3.65", "larger")
    assert thought == "larger\na3.p7 ? a3.p6q5\na: 3 3 =\np: 7 6 >\nfirst"
    assert answer == "3.7"
    assert compare_trace("2.5", "2.50", "smaller")[1] == "equal"


def test_reversal_writes_the_same_pairs_backwards() -> None:
    assert reverse_trace(["cat", "7", "x"]) == "①cat②7③x\n③x②7①cat"


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True), st.booleans())
def test_sorting(numbers: list[int], descending: bool) -> None:
    direction, *lines = sort_trace(numbers, descending).splitlines()
    assert direction == ("down" if descending else "up")
    assert [int(part) for part in lines[-1].split(" | ")[1].split()] == sorted(numbers, reverse=descending)
    choose = max if descending else min
    for line in lines:
        left, rest = line.split(" → ")
        best, *steps = rest.split(" | ")[0].split(",")
        assert [best, *(step[:2] for step in steps)] == left.split()
        for step in steps:
            number, sign, chosen = step[:2], step[2], step[3:]
            assert (sign == ">") == (best > number)
            assert chosen == choose(best, number)
            best = chosen


def test_sorting_as_written() -> None:
    assert sort_trace([12, 7, 30], False) == (
        "up\n12 07 30 → 12,07>07,30<07 | 07\n12 30 → 12,30<12 | 07 12\n30 → 30 | 07 12 30"
    )


def test_sorting_refuses_what_two_digits_cannot_hold() -> None:
    for numbers in ([1, 1], [100, 2], [-1, 2]):
        with pytest.raises(ValueError, match="distinct"):
            sort_trace(numbers, False)
