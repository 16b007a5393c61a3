"""The model that benchmarks.layers times, made small, on the CPU."""

import pytest
import torch
from small_model import FP8_SHAPE, config_values, dense_values

from benchmarks.kernels import Ceilings
from benchmarks.layers import PAGE, build, decode_plan, floor_s, published, step_work
from r1_cluster.models.family import parse_config


@pytest.mark.parametrize(
    "values", [config_values(**FP8_SHAPE), dense_values("Qwen2ForCausalLM")], ids=["R1", "dense"]
)
def test_a_random_model_decodes(values):
    config = parse_config(values)
    stage = build(config, torch.device("cpu"), torch.float32, 8)
    hidden, tokens = stage.forward(decode_plan(3, PAGE + 5, config.vocab_size, 0), None)
    assert hidden.isfinite().all()
    assert len(tokens) == 3


def test_the_shape_is_that_of_r1():
    config = published("DeepSeek-R1", 3, 256)
    assert (config.attention.cache_width, config.moe_layers) == (576, range(1, 3))


def test_floors_are_those_of_r1s_arithmetic():
    """By hand, for one dense layer and two with experts: 187 million weights of attention's products a layer, of which
    16.8 million (kv_b) in two bytes; 396 million of the dense MLP, 44 million of each expert."""
    config = published("DeepSeek-R1", 3, 256)
    bytes_of = {work.name: work.num_bytes for work in step_work(config, 1, 4096)}
    attention = 3 * (1536 * 7168 + 24576 * 1536 + 576 * 7168 + 7168 * 16384)
    expert = 3 * 7168 * 2048
    assert bytes_of == {
        "attention's products": attention,
        "keys and values absorbed": 3 * 2 * 32768 * 512,
        "attention over the cache": 3 * 4096 * 576 * 2,
        "dense MLP and shared experts": 3 * 7168 * 18432 + 2 * expert,
        "routed experts": pytest.approx(2 * 8 * expert),
        "gates": 2 * 256 * 7168 * 4,
        "head": 129280 * 7168 * 2,
    }
    many = {work.name: work for work in step_work(config, 256, 4096)}
    assert 0.999 < many["routed experts"].num_bytes / (2 * 256 * expert) < 1
    assert many["routed experts"].operations == pytest.approx(2 * 2 * 256 * 8 * expert)
    # Bytes alone, then operations alone.
    assert floor_s(Ceilings(1.0, 1e30), config, 1, 4096) == pytest.approx(sum(bytes_of.values()))
    operations = sum(w.operations / (2 if w.fp8 else 1) for w in many.values())
    assert floor_s(Ceilings(1e30, 1.0), config, 256, 4096) == pytest.approx(operations)


def test_floors_of_a_dense_model():
    """By hand, for two layers of Llama 8B in two bytes: 32 heads of 128, 8 of keys and values, an MLP of 14336."""
    config = published("DeepSeek-R1-Distill-Llama-8B", 2, 256)
    bytes_of = {work.name: work.num_bytes for work in step_work(config, 4, 1000) if work.num_bytes}
    assert bytes_of == {
        "attention's products": 2 * 2 * (4096 * 4096 * 2 + 4096 * 1024 * 2),
        "attention over the cache": 2 * 4 * 1000 * 2048 * 2,
        "dense MLP and shared experts": 2 * 2 * 3 * 4096 * 14336,
        "head": 128256 * 4096 * 2,
    }
    (attention,) = [work for work in step_work(config, 4, 1000) if work.name == "attention over the cache"]
    assert attention.operations == 2 * 4 * 1000 * 32 * 128 * 4  # two products, two operations a number
