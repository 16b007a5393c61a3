"""The table of stalls."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def failures():
    path = Path(__file__).parents[2] / "benchmarks" / "failures.py"
    spec = importlib.util.spec_from_file_location("failures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(when, stalls, **changes):
    return {
        "layout": "colocated",
        "part": "stage-0",
        "how": "stop",
        "when": when,
        "streams": len(stalls),
        "lost": 0,
        "detection_s": 4.0,
        "stalls": stalls,
        **changes,
    }


def test_one_line_for_each_kind_of_death(failures):
    rows = [
        record("decode", [[1.0, 5.0], [4.0], []]),
        record("recovery", [[7.0]], detection_s=4.5, lost=1),
        record("decode", [[2.0]], how="kill", detection_s=None),
    ]
    page = failures.table(rows)
    assert "| colocated | stage-0 | SIGSTOP | 4 | 1 | 4.50 | – | 4.00 / 5.00 | – | 7.00 / 7.00 |" in page
    assert "| colocated | stage-0 | SIGKILL | 1 | 0 | – | – | 2.00 / 2.00 | – | – |" in page
    assert "3 deaths under 5 streams; lost or changed: 1." in page
