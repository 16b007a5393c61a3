"""What a role does by itself, without a worker around it."""

import contextlib
import time

import pytest
import torch
from small_model import config_values, write_checkpoint

from r1_cluster.comm.links import LocalLink
from r1_cluster.comm.wire import Flags, Message, Unsendable
from r1_cluster.engine.boot import StepLimits
from r1_cluster.engine.graphs import dummy_plan
from r1_cluster.engine.roles import RemoteRouter, RouterRole, StageRole, local_dispatcher
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel, RouterModel
from r1_cluster.models.network import StageModel
from r1_cluster.weights.checkpoint import Checkpoint

SHARD = Shard(torch.device("cpu"), torch.float32, deterministic=False)
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, config_values())
    return folder


@pytest.fixture
def stage(folder):
    config = load_config(folder)
    with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
        loader = Loader(checkpoint, SHARD)
        model = StageModel(config, loader, range(config.num_hidden_layers))
    return StageRole(model, None, num_pages=8, page_size=PAGE_SIZE)


@pytest.fixture
def router(folder):
    config = load_config(folder)
    with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
        loader = Loader(checkpoint, SHARD)
        role = RouterRole(RouterModel(config, loader, config.moe_layers))
        every = range(config.moe.n_routed_experts)
        experts = ExpertModel(config, loader, config.moe_layers, every)
    role.dispatcher = local_dispatcher(experts)
    return role


def behind_link(stage, answer):
    """The stage, its router in another process, as far as it can see."""
    stage.moe = RemoteRouter("router-0", {"router-0": LocalLink("router-0", answer)}, 5.0)
    return stage


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


@pytest.mark.parametrize("slow", ["router", "link"])
def test_only_operators_count_as_computing(stage, router, monkeypatch, slow):
    """A stage's time holds its router's operators, wherever they ran, and no wait for anybody."""
    gate = router.model.gate

    def slow_gate(layer, x_TD):
        time.sleep(0.1)
        return gate(layer, x_TD)

    def answer(message):
        if slow == "link":
            time.sleep(0.1)
        return Message(*router.answer(message))

    if slow == "router":
        monkeypatch.setattr(router.model, "gate", slow_gate)
    plan = dummy_plan([3], [3], PAGE_SIZE)
    began = time.perf_counter()
    behind_link(stage, answer).forward(plan, None)
    took_s = time.perf_counter() - began
    num_moe = len(stage.model.config.moe_layers)
    assert took_s > 0.1 * num_moe
    if slow == "router":
        assert 0.1 * num_moe < stage.compute_s < took_s
    else:
        assert 0 < stage.compute_s < took_s - 0.1 * num_moe


def test_a_router_that_cannot_answer_is_not_lost(stage):
    def refuse(message):
        return Message(message.header._replace(kind=6, flags=Flags.REFUSED), (), b"3 bytes; at most 2")

    behind_link(stage, refuse)
    with pytest.raises(Unsendable, match="router-0: 3 bytes; at most 2"):
        stage.forward(dummy_plan([3], [3], PAGE_SIZE), None)
    assert stage.take_lost() == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: reply._replace(tensors=[]),
        lambda reply: reply._replace(tensors=[reply.tensors[0][:-1]]),
        lambda reply: reply._replace(tensors=[reply.tensors[0].double()]),
        lambda reply: reply._replace(header=reply.header._replace(step=99)),
        lambda reply: reply._replace(body=b"no duration"),
    ],
)
def test_a_router_that_answers_nonsense_is_lost(stage, router, spoil):
    behind_link(stage, lambda message: spoil(Message(*router.answer(message))))
    stage.forward(dummy_plan([3], [3], PAGE_SIZE), None)
    assert stage.take_lost() == ["router-0"]
