"""What links count in a step is what arithmetic says, to the byte, in every kind of layout; and a mistake shows."""

import pytest
from small_model import config_values, dense_values, write_checkpoint

from benchmarks.processes import Settings
from benchmarks.traffic import Steps, measure, tables
from r1_cluster.comm.wire import HEADER_SIZE, SPEC_SIZE
from r1_cluster.config import LayoutConfig

DISAGGREGATED = {"kind": "disaggregated", "stages": 2, "expert_shards": 2}


def steps_over(folder, layout, **changes):
    settings = Settings(str(folder), "cpu", "float32", "sockets", num_pages=64)
    return Steps(settings, LayoutConfig(**layout))


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        (config_values(), DISAGGREGATED | {"redundant_experts": 1}),
        (config_values(), DISAGGREGATED | {"tensor_parallel": 2}),
        (config_values(), {"tensor_parallel": 2}),
        (config_values(), {"kind": "expert-parallel", "data_parallel": 3, "redundant_experts": 1}),
        (config_values(), {"kind": "expert-parallel", "data_parallel": 2, "tensor_parallel": 2}),
        (dense_values(), {"kind": "disaggregated", "stages": 3}),
        (dense_values("Qwen2ForCausalLM", tie_word_embeddings=True), {"tensor_parallel": 4}),
    ],
    ids=[
        "copies",
        "ranks of stages",
        "ranks",
        "data ranks",
        "data ranks of ranks",
        "dense stages",
        "ranks with a tied head",
    ],
)
def test_counted_is_what_arithmetic_says(tmp_path, values, layout):
    config = write_checkpoint(tmp_path, values)
    with steps_over(tmp_path, layout) as steps:
        found = measure(steps, [1, 9], 20)
        lines, as_due = tables(config, steps.layout, found, 4)
        assert as_due, "\n".join(lines)
        _, as_due = tables(config, steps.layout, found, 2)
        assert not as_due


def test_rows_of_experts_by_hand(tmp_path):
    """Nine tokens, three experts each of eight on two shards, 48 floats wide, two layers with experts: the first in
    stage 0 of one dense layer and it, the second in stage 1."""
    config = write_checkpoint(tmp_path, config_values())
    with steps_over(tmp_path, DISAGGREGATED | {"stages": ["0-1", "2-2"]}) as steps:
        step = measure(steps, [9], 20)["decode of 9"]
    assert config.moe_layers == range(1, 3)
    for name in ("router-0", "router-1"):
        there = [step.carried.get((name, f"experts-{i}"), (0, 0)) for i in range(2)]
        back = [step.carried.get((f"experts-{i}", name), (0, 0)) for i in range(2)]
        messages = sum(count for count, _ in there)
        assert 1 <= messages <= 2
        rows = 9 * 3 * 48 * 4
        assert sum(size for _, size in there) == rows + messages * (HEADER_SIZE + SPEC_SIZE + 4 * 4)
        assert sum(size for _, size in back) == rows + messages * (HEADER_SIZE + SPEC_SIZE + 8)
    asked = HEADER_SIZE + SPEC_SIZE + 16 * 48 * 4  # nine rows in tiles of eight
    assert step.carried["stage-0", "router-0"] == (1, asked)
    assert step.carried["router-1", "stage-1"] == (1, asked + 8)
    assert "due" not in "".join(tables(config, steps.layout, {"decode": step}, 4)[0])
