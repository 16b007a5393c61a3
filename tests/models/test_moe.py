"""Gate and experts: against the definitions, and the same bits in any sharding."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import config_values, write_checkpoint

from kernels import cpu, reference
from kernels.ops import Routing, for_device
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel, RouterModel
from r1_cluster.weights.checkpoint import Checkpoint

OPTIONS = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, config_values())
    return folder


def load(folder, layers, experts, deterministic=True):
    config = load_config(folder)
    with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
        loader = Loader(checkpoint, Shard(**OPTIONS, deterministic=deterministic))
        return ExpertModel(config, loader, layers, experts)


def load_router(folder, layers):
    config = load_config(folder)
    with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
        loader = Loader(checkpoint, Shard(**OPTIONS, deterministic=False))
        return RouterModel(config, loader, layers)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31 - 1),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    top_k=st.integers(1, 2),
    normalize=st.booleans(),
    group_size=st.sampled_from([2, 3]),
)
def test_gate_is_that_of_the_reference(seed, groups, top_k, normalize, group_size):
    generator = torch.Generator().manual_seed(seed)
    num_experts = groups[0] * max(group_size, top_k)
    x = torch.randn(16, 20, generator=generator)
    weight = torch.randn(num_experts, 20, generator=generator)
    bias = torch.randn(num_experts, generator=generator)
    routing = Routing(*groups, top_k, normalize, 2.5)
    weights, ids = cpu.gate(x, weight, bias, routing, tiled=True)
    expected_weights, expected_ids = reference.gate(
        x.double() @ weight.double().T,
        bias.double(),
        num_groups=groups[0],
        top_groups=groups[1],
        top_k=top_k,
        normalize=normalize,
        scaling=2.5,
    )
    assert torch.equal(ids, expected_ids.long())
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected_weights, atol=1e-5, rtol=1e-5)


def test_gates_bits_do_not_depend_on_the_batch():
    x = torch.randn(64, 20)
    weight, bias = torch.randn(6, 20), torch.randn(6)
    routing = Routing(3, 2, 2, True, 2.5)
    weights, ids = cpu.gate(x, weight, bias, routing, tiled=True)
    order = torch.randperm(64)[:8]
    some_weights, some_ids = cpu.gate(x[order], weight, bias, routing, tiled=True)
    assert torch.equal(some_weights, weights[order])
    assert torch.equal(some_ids, ids[order])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31 - 1),
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 30]), min_size=8, max_size=8),
    cuts=st.sets(st.integers(1, 7), max_size=3),
)
def test_experts_bits_do_not_depend_on_the_sharding(folder, seed, counts, cuts):
    x = torch.randn(sum(counts), 48, generator=torch.Generator().manual_seed(seed))
    whole = load(folder, [1], range(8)).forward(1, x, counts)
    parts, first = [], 0
    edges = [0, *sorted(cuts), 8]
    for a, b in pairwise(edges):
        rows = sum(counts[a:b])
        parts.append(load(folder, [1], range(a, b)).forward(1, x[first : first + rows], counts[a:b]))
        first += rows
    assert torch.equal(torch.cat(parts), whole)
    loose = load(folder, [1], range(8), deterministic=False).forward(1, x, counts)
    torch.testing.assert_close(loose, whole, atol=1e-4, rtol=1e-4)
    first = 0
    for expert, count in enumerate(counts):
        if count:
            one_count = [1 if i == expert else 0 for i in range(8)]
            one = load(folder, [1], range(8)).forward(1, x[first : first + 1], one_count)
            assert torch.equal(one[0], whole[first])
        first += count


def test_experts_compute_their_mlp(folder):
    with Checkpoint(folder) as checkpoint:
        gate, up, down = (
            checkpoint.get(f"model.layers.2.mlp.experts.5.{part}_proj.weight", **OPTIONS).double()
            for part in ("gate", "up", "down")
        )
    x = torch.randn(3, 48)
    hidden = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    y = load(folder, [1, 2], range(4, 8)).forward(2, x, [0, 3, 0, 0])
    torch.testing.assert_close(y.double(), hidden @ down.T, atol=1e-5, rtol=1e-5)


def test_experts_refuse_counts_that_do_not_fit(folder):
    model = load(folder, [1], range(2, 4))
    with pytest.raises(ValueError, match="3 rows came with 2 counts of sum 2 for 2 experts"):
        model.forward(1, torch.zeros(3, 48), [1, 1])
    with pytest.raises(ValueError, match="1 counts"):
        model.forward(1, torch.zeros(3, 48), [3])
    assert model.forward(1, torch.zeros(0, 48), [0, 0]).shape == (0, 48)
    with pytest.raises(ValueError, match="no range of the 8 routed experts"):
        load(folder, [1], range(4, 9))


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (16, [1, 2, 4, 8, 16]), (20, [1, 2, 4, 8, 16, 20]), (3, [1, 2, 3])]
)
def test_warming_up_goes_to_the_most_there_can_be(folder, monkeypatch, most, sizes):
    """Kernels are tuned for each power of two, rounded up: 20 rows are another case than 16."""
    experts, router = load(folder, [1], range(2, 5)), load_router(folder, [1])
    seen = {"forward": [], "share": [], "gate": [], "shared": []}

    def watch(model, name):
        method = getattr(model, name)

        def watched(layer, x, *rest):
            seen[name].append(len(x))
            return method(layer, x, *rest)

        monkeypatch.setattr(model, name, watched)

    watch(experts, "forward")
    monkeypatch.setattr(experts, "share", lambda layer, x, *rest: seen["share"].append(len(x)))
    watch(router, "gate")
    watch(router, "shared")
    experts.warm_up(most)
    experts.warm_up_shares(most, 2)
    router.warm_up(most)
    assert seen == dict.fromkeys(seen, sizes)


@pytest.mark.parametrize(("device", "name"), [("cuda", "kernels.triton_ops"), ("cpu", "kernels.cpu")])
def test_operations_are_chosen_by_the_device(device, name):
    assert for_device(torch.device(device)).__name__ == name


def test_a_device_without_kernels_of_its_own_gets_plain_torch():
    assert for_device(torch.device("meta")) is cpu
