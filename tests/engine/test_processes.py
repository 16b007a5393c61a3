"""Stage, router and experts as processes without Ray: the twin on the CPU of tests/gpu/test_engine.py."""

import pytest
import torch
from processes import COLOCATED, assert_texts_survive, requests, settings
from small_model import DENSE_KERNEL_SHAPE, dense_values, write_checkpoint

from benchmarks.processes import LocalEngine, worker_boot
from r1_cluster.config import LayoutConfig
from r1_cluster.engine import loading
from r1_cluster.engine.worker import Worker
from r1_cluster.models.family import load_config
from r1_cluster.planning.layout import build_layout


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


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("mla", marks=pytest.mark.system), "gqa"])
def test_texts_over_an_fp8_cache_are_the_same_after_preemption_and_in_other_chunks(tmp_path, family):
    """With pages for a third of the requests and prompts in small chunks; grouped queries in two stages."""
    options = {"device": "cpu", "dtype": "float32", "transport": "sockets", "kv_cache_dtype": "fp8"}
    kind, scarce = (
        settings(tmp_path, **options | more) for more in ({}, {"num_pages": 14, "max_batch_tokens": 9})
    )
    layout = COLOCATED
    if family == "gqa":
        write_checkpoint(tmp_path, dense_values("Qwen2ForCausalLM", **DENSE_KERNEL_SHAPE))
        layout = LayoutConfig(kind="disaggregated", stages=2)
    asked = requests(8, 30)
    with LocalEngine(kind, COLOCATED) as engine:
        texts, _ = engine.run(asked)
        for request in asked[:2]:
            assert engine.run([request])[0] == {request.request_id: texts[request.request_id]}
    with LocalEngine(scarce, layout) as engine:
        assert engine.run(asked)[0] == texts
        assert engine.scheduler.num_preempted > 0
        engine.scheduler.check()


@pytest.mark.parametrize(("said", "kept"), [("fp8", torch.float8_e4m3fn), (None, torch.float32)])
def test_a_worker_keeps_its_pages_as_it_is_told_and_asks_for_as_much_memory(
    tmp_path, monkeypatch, said, kept
):
    kind = settings(tmp_path, device="cpu", dtype="float32", transport="sockets", kv_cache_dtype=said)
    config = load_config(tmp_path)
    asked = []
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1)
    monkeypatch.setattr(loading, "check_room", lambda parts, free: asked.append(parts["pages"]))
    boot = worker_boot(kind, build_layout(COLOCATED, config), "stage-0", "first")
    # What is asked for is a device's, which computes in BF16.
    width = config.attention.cache_width + 4 * 2 if said else 2 * config.attention.cache_width
    worker = Worker(boot)
    try:
        assert asked == [config.num_hidden_layers * kind.num_pages * kind.page_size * width]
        for cache in worker.stage.caches:
            assert (cache.values if said else cache).dtype == kept
    finally:
        worker.close()
