"""Each architecture's stages divided among ranks: logits are those of one process."""

import pytest
import torch
from ranks import PROMPT, close, in_ranks, link_ranks, logits_of_rank, names_of
from small_model import (
    CPU,
    DENSE_FP8_SHAPE,
    FP8_SHAPE,
    SmallModel,
    config_values,
    dense_values,
    write_stored,
)

from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.weights.checkpoint import Checkpoint
from r1_cluster.weights.tensors import INT4, INT8, TensorSpec, rank_slices

# For FP8: hidden units and heads of whole blocks for two ranks, and of parts of blocks for four.
WIDE = {
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MODELS = {
    "deepseek": config_values(),
    "deepseek without low-rank queries": config_values(q_lora_rank=None),
    "llama": dense_values(),
    "qwen2 tied": dense_values("Qwen2ForCausalLM", tie_word_embeddings=True, vocab_size=97),
    "qwen3": dense_values("Qwen3ForCausalLM"),
    "deepseek fp8": config_values(**FP8_SHAPE | WIDE),
    "qwen3 fp8": dense_values("Qwen3ForCausalLM", **DENSE_FP8_SHAPE | {"intermediate_size": 256}),
    "deepseek int8": config_values(),
    "llama int8": dense_values(),
    "deepseek int4": config_values(**{"moe_intermediate_size": 160}),
    "llama int4": dense_values(intermediate_size=384, head_dim=64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            forms = {"fp8": "fp8", "int8": INT8, "int4": INT4}
            form = next((how for word, how in forms.items() if word in name), "float")
            made[name] = write_stored(tmp_path_factory.mktemp("model"), MODELS[name], form)
        return made[name]

    return make


def logits_in_ranks(folder, count, dtype):
    """Of each rank, in a thread: see `logits_of_rank`."""
    links = link_ranks(count)
    try:
        return in_ranks(count, lambda rank: logits_of_rank(names_of(count), rank, links[rank], folder, dtype))
    finally:
        close(links)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_process(folder, name, count):
    plain = SmallModel(folder(name), deterministic=True).step([(0, PROMPT)])
    ranks = logits_in_ranks(folder(name), count, torch.float32)
    assert all(torch.equal(hidden, ranks[0][0]) for hidden, _ in ranks)
    assert ranks[0][1].shape == plain.shape
    assert (ranks[0][1] - plain).abs().max() <= 1e-4 * max(1.0, float(plain.abs().max()))
    again = logits_in_ranks(folder(name), count, torch.float32)
    assert torch.equal(again[0][1], ranks[0][1])


@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_one_process_is(folder, name):
    exact = SmallModel(folder(name), deterministic=True).step([(0, PROMPT)])
    plain = SmallModel(folder(name), deterministic=True, dtype=torch.bfloat16).step([(0, PROMPT)])
    ranks = logits_in_ranks(folder(name), 2, torch.bfloat16)[0][1]
    assert (ranks - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.parametrize(
    ("spec", "ranks", "expected"),
    [
        (TensorSpec("w", (6, 4), "attention", 0, units=3), 3, [(0, 2), (2, 4), (4, 6)]),
        (TensorSpec("w", (6, 4), "attention", 0, units=2), 4, [(0, 3), (0, 3), (3, 6), (3, 6)]),
        (TensorSpec("w", (8, 96), "mlp", 1), 4, [(0, 24), (24, 48), (48, 72), (72, 96)]),
        # Whole blocks of 128 where there are enough of them, of which some ranks then have one more.
        (TensorSpec("w", (8, 640), "mlp", 1), 2, [(0, 256), (256, 640)]),
        (TensorSpec("w", (8, 128), "mlp", 1), 2, [(0, 64), (64, 128)]),
        (TensorSpec("w", (7, 4), "head", 0), 2, [(0, 3), (3, 7)]),
    ],
)
def test_ranks_parts(spec, ranks, expected):
    found = [rank_slices(spec, rank, ranks)[spec.split_dim] for rank in range(ranks)]
    assert [(part.start, part.stop) for part in found] == expected
    other = rank_slices(spec, 0, ranks)[1 - spec.split_dim]
    assert other == slice(None)


def test_what_is_not_divided_is_whole():
    assert rank_slices(TensorSpec("w", (8,), "norm"), 1, 2) is None
    assert rank_slices(TensorSpec("w", (8, 8), "mlp", 0), 0, 1) is None


def test_a_rank_keeps_scaled_what_is_cut_at_blocks(folder):
    """And what is not, in the compute dtype."""
    config = load_config(folder("deepseek fp8"))
    table = tensor_table(config)
    down = "model.layers.0.mlp.down_proj.weight"
    with Checkpoint(folder("deepseek fp8"), table, config.fp8_block) as checkpoint:
        two = Loader.of(checkpoint, Shard(CPU, torch.float32, True, rank=1, ranks=2), table)
        four = Loader.of(checkpoint, Shard(CPU, torch.float32, True, rank=1, ranks=4), table)
        whole = Loader.of(checkpoint, Shard(CPU, torch.float32, True), table).get(down)
        assert two.stays_scaled(down)
        assert not four.stays_scaled(down)
        assert torch.equal(two.get(down), whole[:, 128:])
        assert torch.equal(four.weight(down), whole[:, 64:128])
        assert two.weight(down).values.shape == (128, 128)
