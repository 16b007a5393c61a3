"""Rates of layouts, and what is reported of them."""

from pathlib import Path

import pytest

from benchmarks import layouts
from benchmarks.layouts import COLOCATED, DISAGGREGATED, RANKS, STREAMS, WAYS, Model, rate, report


class Scripted:
    """An engine whose tokens came at these times."""

    def __init__(self, *times):
        self.asked = None
        self._times = [*times]

    def ask(self, streams, num_tokens):
        self.asked = streams, num_tokens

    def times(self):
        return self._times


def test_engines_share_streams_and_their_time_is_that_of_all():
    first, second = Scripted(10.0, 11.0, 12.5), Scripted(10.5, 14.0)
    assert rate([first, second], 5, 9) == pytest.approx(5 * 8 / (14.0 - 10.0))
    assert (first.asked, second.asked) == ((3, 9), (2, 9))
    idle = Scripted()
    assert rate([Scripted(1.0, 3.0), idle], 1, 9) == pytest.approx(8 / 2.0)
    assert idle.asked is None


def test_ratios_are_those_of_rounds_and_goals_are_held_to_their_median():
    models = [Model(name, Path("none"), dict.fromkeys(STREAMS, 8)) for name in ("nano R1", "small")]
    for model in models:
        model.others = [0.02, 0.05, 0.03]
        model.rates = {(way, streams): [100.0, 50.0, 10.0] for way in WAYS for streams in STREAMS}
    models[1].rates[RANKS, 1] = [110.0, 60.0, 15.0]
    models[0].rates[DISAGGREGATED, 8] = [49.0, 30.0, 4.0]
    text = report(models, 3)
    assert "3% of the cores (median; at most 5%)" in text
    assert f"| {COLOCATED} | 50.0 (1.00) | 50.0 (1.00) | 50.0 (1.00) |" in text
    assert f"| {RANKS} | 60.0 (1.20) | 50.0 (1.00) | 50.0 (1.00) |" in text
    assert "two ranks ≥ 1.2 × colocated | 1.20 (1.10 to 1.50) | met |" in text
    assert "disaggregated ≥ 0.5 × colocated | 0.49 (0.40 to 0.60) | not met |" in text
    assert {goal.way for goal in layouts.GOALS} <= WAYS.keys()
