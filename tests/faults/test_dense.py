"""A model of each dense architecture, served as a user serves it: the death of a stage changes no stream."""

from contextlib import closing

import pytest
from faults.arena import Arena, Kill, undergo
from make_checkpoint import make_checkpoint

pytestmark = [pytest.mark.system, pytest.mark.cluster]

STAGES = {"kind": "disaggregated", "stages": 2, "cpus_per_worker": 0.2}
LAYOUTS = {
    "llama": {"kind": "colocated", "cpus_per_worker": 0.5},
    "qwen2": STAGES,
    "qwen3": STAGES | {"spares": 1},
}


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_stage_that_dies_changes_no_stream(tmp_path, model_type):
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint",
        seed=3,
        model_type=model_type,
        max_position_embeddings=2048,
    )
    with closing(Arena(tmp_path, checkpoint, LAYOUTS[model_type])) as arena:
        streams = arena.load().join()
        assert [stream.error for stream in streams if stream.error is not None] == []
        undisturbed = [stream.answer for stream in streams]
        before = arena.observer.holdings()
        results, record = undergo(arena, Kill("stage-0", "kill", "decode"))
        assert [stream.answer for stream in results] == undisturbed
        assert record["in_time"], "the streams were too fast for this death"
        assert record["detection_s"] is not None
        arena.observer.wait_equal(before)
