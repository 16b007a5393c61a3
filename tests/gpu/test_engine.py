"""The engine on a GPU, without Ray: in one process, and, over CUDA IPC, in processes of their own.

What of it needs no GPU runs in tests/engine/test_processes.py, by the same code.
"""

import pytest
import torch
from processes import COLOCATED, assert_texts_survive, requests, settings
from small_model import DENSE_KERNEL_SHAPE, FP8_SHAPE, config_values, dense_values, to_fp8, write_checkpoint

from benchmarks.processes import LocalEngine
from r1_cluster.config import LayoutConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DISAGGREGATED = LayoutConfig(kind="disaggregated", stages=2, expert_shards=3)


@pytest.mark.parametrize("victim", ["experts-1", "stage-0"])
def test_texts_survive_a_killed_process(tmp_path, victim):
    kind = settings(tmp_path, device="cuda", dtype="bfloat16", transport="device")
    assert_texts_survive(kind, DISAGGREGATED, victim)


def test_texts_of_a_dense_model_survive_a_killed_stage(tmp_path):
    kind = settings(tmp_path, device="cuda", dtype="bfloat16", transport="device")
    write_checkpoint(
        tmp_path, dense_values("Qwen3ForCausalLM", **DENSE_KERNEL_SHAPE | {"num_hidden_layers": 3})
    )
    assert_texts_survive(kind, LayoutConfig(kind="disaggregated", stages=3), "stage-1")


@pytest.mark.parametrize("family", ["mla", "gqa"])
def test_texts_over_an_fp8_cache_survive_a_killed_stage(tmp_path, family):
    options = {"device": "cuda", "dtype": "bfloat16", "transport": "device", "kv_cache_dtype": "fp8"}
    kind = settings(tmp_path, **options)
    layout = LayoutConfig(kind="disaggregated", stages=2, expert_shards=1)
    if family == "gqa":
        layout = LayoutConfig(kind="disaggregated", stages=3)
        values = dense_values("Qwen3ForCausalLM", **DENSE_KERNEL_SHAPE | {"num_hidden_layers": 3})
        write_checkpoint(tmp_path, values)
    assert_texts_survive(kind, layout, "stage-1")


@pytest.mark.parametrize("deterministic", [True, False])
def test_fp8_weights_are_served(tmp_path, deterministic):
    """In deterministic mode the same texts alone and together; otherwise as many tokens as were asked for."""
    kind = settings(
        tmp_path, device="cuda", dtype="bfloat16", transport="device", deterministic=deterministic
    )
    write_checkpoint(tmp_path, config_values(**FP8_SHAPE))
    to_fp8(tmp_path)
    asked = requests(8, 30)
    with LocalEngine(kind, COLOCATED) as engine:
        together, _ = engine.run(asked)
        alone = {request.request_id: engine.run([request])[0][request.request_id] for request in asked}
    assert all(len(text) == 30 for text in together.values())
    if deterministic:
        assert alone == together
