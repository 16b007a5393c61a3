"""The model that benchmarks.layers times, made small, on the CPU."""

import torch
from small_model import FP8_SHAPE, config_values

from benchmarks.layers import PAGE, build, decode_plan, r1_config
from r1_cluster.models.config import ModelConfig


def test_a_random_model_decodes():
    config = ModelConfig.from_dict(config_values(**FP8_SHAPE))
    stage = build(config, torch.device("cpu"), torch.float32, 8)
    hidden, tokens = stage.forward(decode_plan(3, PAGE + 5, config.vocab_size, 0), None)
    assert hidden.isfinite().all()
    assert len(tokens) == 3


def test_the_shape_is_that_of_r1():
    config = r1_config(3, 256)
    assert (config.latent_dim, config.moe_layers) == (576, range(1, 3))
