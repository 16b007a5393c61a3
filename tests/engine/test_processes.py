"""Stage, router and experts as processes without Ray: the twin on the CPU of tests/gpu/test_engine.py."""

import pytest
from processes import assert_texts_survive, settings
from small_model import DENSE_KERNEL_SHAPE, dense_values, write_checkpoint

from r1_cluster.config import LayoutConfig


@pytest.mark.slow
def test_texts_survive_a_killed_expert_process(tmp_path):
    """Tensors go through the host's memory as they go through a GPU's, slot by slot."""
    kind = settings(tmp_path, device="cpu", dtype="float32", transport="host memory")
    assert_texts_survive(kind, LayoutConfig(kind="disaggregated", stages=1, expert_shards=2), "experts-1")


@pytest.mark.system
def test_texts_of_a_dense_model_survive_a_killed_stage(tmp_path):
    kind = settings(tmp_path, device="cpu", dtype="float32", transport="host memory")
    values = dense_values("Qwen3ForCausalLM", **DENSE_KERNEL_SHAPE | {"num_hidden_layers": 3})
    write_checkpoint(tmp_path, values)
    assert_texts_survive(kind, LayoutConfig(kind="disaggregated", stages=3), "stage-1")
