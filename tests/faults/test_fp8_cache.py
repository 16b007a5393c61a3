"""A service whose KV is kept in FP8: what a stage lost is computed again to the same numbers."""

from contextlib import closing

import pytest
from faults.arena import Arena, Kill, undergo

pytestmark = [pytest.mark.system, pytest.mark.cluster]


def test_a_stage_that_dies_changes_no_stream(tmp_path, checkpoint):
    layout = {"kind": "disaggregated", "stages": 2, "cpus_per_worker": 0.2}
    with closing(Arena(tmp_path, checkpoint, layout, kv_cache_dtype="fp8")) as arena:
        kept_in_fp8(arena)
        streams = arena.load().join()
        assert [stream.error for stream in streams if stream.error is not None] == []
        undisturbed = [stream.answer for stream in streams]
        before = arena.observer.holdings()
        results, record = undergo(arena, Kill("stage-1", "kill", "decode"))
        assert [stream.answer for stream in results] == undisturbed
        assert record["in_time"], "the streams were too fast for this death"
        assert record["detection_s"] is not None
        arena.observer.wait_equal(before)
        kept_in_fp8(arena)


def kept_in_fp8(arena):
    (engine,) = arena.observer.settled(60)["engines"]
    assert {worker["kv_cache_dtype"] for worker in engine["workers"]} == {"fp8"}
