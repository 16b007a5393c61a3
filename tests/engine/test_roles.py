"""What a role does by itself, without a worker around it."""

import contextlib

import pytest
import torch
from small_model import config_values, write_checkpoint

from r1_cluster.engine.boot import StepLimits
from r1_cluster.engine.roles import StageRole
from r1_cluster.models.config import ModelConfig
from r1_cluster.models.network import StageModel
from r1_cluster.weights.checkpoint import Checkpoint

OPTIONS = {"dtype": torch.float32, "device": torch.device("cpu"), "deterministic": False}
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, config_values())
    return folder


@pytest.fixture
def stage(folder):
    config = ModelConfig.from_folder(folder)
    with Checkpoint(folder, config) as checkpoint:
        model = StageModel.load(config, checkpoint, range(config.num_hidden_layers), **OPTIONS)
    return StageRole(model, None, num_pages=8, page_size=PAGE_SIZE)


@pytest.mark.parametrize(
    ("most", "longest", "sizes"),
    [
        (64, 128, [1, 2, 4, 8, 16, 32, 64]),
        (20, 128, [1, 2, 4, 8, 16, 20]),  # rounded up to 32 a kernel of its own
        (50, 24, [1, 2, 4, 8, 16, 32, 50]),  # more tokens than one context holds
    ],
)
def test_a_stage_is_prepared_up_to_its_largest_step(stage, monkeypatch, most, longest, sizes):
    seen = []
    forward = stage.model.forward

    def watched(x_TD, batch, caches, moe):
        seen.append((len(x_TD), max(batch.context_lens)))
        return forward(x_TD, batch, caches, moe)

    monkeypatch.setattr(stage.model, "forward", watched)
    stage.prepare(StepLimits(3, most, longest), lambda: (None, contextlib.nullcontext()))
    assert seen == [(size, min(size, longest)) for size in sizes]
