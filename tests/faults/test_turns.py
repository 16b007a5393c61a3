"""Two steps in flight, which take turns in each stage: deaths change no stream."""

from contextlib import closing

import pytest
from faults.arena import Arena, Kill, undergo

pytestmark = [pytest.mark.system, pytest.mark.cluster]


def test_deaths_with_two_steps_in_flight_change_no_stream(tmp_path, checkpoint):
    """With one stage, so that both always wait for the same router."""
    layout = {"kind": "disaggregated", "stages": 1, "expert_shards": 2, "cpus_per_worker": 0.2, "spares": 1}
    with closing(Arena(tmp_path, checkpoint, layout, micro_batches=2)) as arena:
        streams = arena.load().join()
        assert [stream.error for stream in streams if stream.error is not None] == []
        undisturbed = [stream.answer for stream in streams]
        before = arena.observer.holdings()
        for kill in (
            Kill("router-0", "kill", "decode"),
            Kill("experts-1", "stop", "decode"),
            Kill("stage-0", "kill", "prefill"),
        ):
            results, record = undergo(arena, kill)
            assert [stream.answer for stream in results] == undisturbed, kill
            assert record["in_time"], "the streams were too fast for this death"
            assert record["detection_s"] is not None
            arena.observer.wait_equal(before)
        (engine,) = arena.observer.settled(60)["engines"]
        bubbles = {worker["name"]: worker["bubble"] for worker in engine["workers"]}
        assert all(0 <= bubbles[name] < 1 for name in ("stage-0", "router-0", "experts-0", "experts-1"))
        assert bubbles["spare-0"] in (None, 1.0)
