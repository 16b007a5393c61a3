"""Ranks of a stage as processes without Ray: the twin on the CPU of tests/gpu/test_ranks.py."""

import pytest
from processes import (
    OWN_TEXTS,
    assert_logits_are_those_of_one_process,
    assert_own_texts_survive,
    settings,
)

from benchmarks.ranks import TOKENS, in_processes, time_sums
from r1_cluster.config import LayoutConfig

# Host memory is as CUDA IPC, and gloo as NCCL; what is longer is for `make test-system`.
LONGER = pytest.mark.system


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "transport", "dtype"),
    [(2, "host memory", "float32"), pytest.param(4, "gloo", "bfloat16", marks=LONGER)],
)
def test_logits_are_those_of_one_process(tmp_path, count, transport, dtype):
    kind = settings(tmp_path, device="cpu", dtype=dtype, transport=transport)
    assert_logits_are_those_of_one_process(kind, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two ranks", pytest.param("four data ranks", marks=LONGER)])
def test_texts_survive_a_killed_process(tmp_path, name):
    layout, victim = OWN_TEXTS[name]
    kind = settings(tmp_path, device="cpu", dtype="float32", transport="host memory")
    assert_own_texts_survive(kind, LayoutConfig(**layout), victim)


@LONGER
def test_sums_are_timed_between_processes():
    first, _, _, last = in_processes(4, "host memory", time_sums, "cpu", 3)
    assert len(first) == 2 * len(TOKENS)
    assert set(last) == {name for name in first if name.startswith("4 processes")}
    assert all(0 < row["p50_us"] <= row["p90_us"] for row in first.values())


@LONGER
def test_a_rank_that_ends_is_an_error():
    with pytest.raises(RuntimeError, match="a rank ended"):
        in_processes(2, "sockets", time_sums, "no device", 1)
