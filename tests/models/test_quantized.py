"""Models whose weights stay in INT8, INT4 or FP8 on the CPU: logits of what the weights stand for, the same bits in
any batch and sharding, and never more than a little of a weight in full width."""

import numpy as np
import pytest
import torch
from small_model import SmallModel, config_values, quantize, to_floats, to_fp8, write_checkpoint

from kernels import cpu
from kernels.int_weight import fp8_to_float
from kernels.ops import GroupScaled
from r1_cluster.weights.tensors import INT4, INT8

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# Widths that end in short groups, and stacks whose parts end in the middle of a block.
SHAPE = {"hidden_size": 200, "intermediate_size": 300, "moe_intermediate_size": 136, "v_head_dim": 20}
KINDS = pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
STORED = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind: (a checkpoint, what it stands for in float32)."""
    root = tmp_path_factory.mktemp("quantized")
    write_checkpoint(root / "float", config_values(**SHAPE))
    for name, how in (("int8", INT8), ("int4", INT4)):
        quantize(root / "float", root / name, how)
    write_checkpoint(root / "fp8", config_values(**SHAPE, quantization_config=FP8))
    to_fp8(root / "fp8")
    return {kind: (root / kind, to_floats(root / kind, root / f"{kind}-floats")) for kind in STORED}


def prompts():
    rng = np.random.default_rng(2)
    return [rng.integers(0, 96, length) for length in (70, 3)]


@KINDS
@pytest.mark.parametrize(
    ("deterministic", "bounds", "num_shards"), [(True, (), 1), (False, (), 1), (True, (1, 2), 3)]
)
def test_logits_are_those_of_what_the_weights_stand_for(folders, kind, deterministic, bounds, num_shards):
    """In float64 by transformers, over weights dequantized beforehand."""
    from transformers import DeepseekV3ForCausalLM

    folder, floats = folders[kind]
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    oracle = DeepseekV3ForCausalLM.from_pretrained(floats, dtype=torch.float64, **plain)
    model = SmallModel(folder, deterministic=deterministic, bounds=bounds, num_shards=num_shards)
    asked = prompts()
    got = [model.step(list(enumerate(asked)))]
    got.append(model.step([(0, [5]), (1, [6])]))
    for i, prompt in enumerate(asked):
        with torch.no_grad():
            expected = oracle(torch.from_numpy(np.append(prompt, 5 + i))[None]).logits[0, -2:]
        mine = torch.stack([logits[i] for logits in got]).double()
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)


@KINDS
def test_bits_depend_on_no_neighbour_and_no_shard(folders, kind):
    folder, _ = folders[kind]
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 96, 60)
    alone = SmallModel(folder, deterministic=True)
    expected = [alone.step([(0, tokens[:50])]), *(alone.step([(0, [token])]) for token in tokens[50:])]
    other = SmallModel(folder, deterministic=True, num_shards=3, bounds=(2,))
    other.step([(2, rng.integers(0, 96, 9)), (0, tokens[:17])])
    got = [other.step([(0, tokens[17:50]), (1, rng.integers(0, 96, 30))])[:1]]
    got += [other.step([(2, [3]), (0, [token]), (1, [4])])[1:2] for token in tokens[50:]]
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


@KINDS
def test_no_more_than_some_rows_are_ever_in_full_width(folders, kind, monkeypatch):
    """Any number of rows at a time gives the same logits, and weights are kept as they are stored."""
    folder, _ = folders[kind]
    expected = SmallModel(folder, deterministic=True).step([(0, np.arange(40))])
    sizes = []

    def watched(values, scale, width, dtype):
        sizes.append(len(values) * width)
        return dequantize(values, scale, width, dtype)

    dequantize = cpu.dequantize_groups
    monkeypatch.setattr(cpu, "dequantize_groups", watched)
    monkeypatch.setattr(cpu, "_MAX_DEQUANTIZED", 40 * 200)
    model = SmallModel(folder, deterministic=True)
    got = model.step([(0, np.arange(40))])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert max(sizes) <= 40 * 200
    assert len(sizes) > 100
    for weight in model.shards[0]._weights[1]:
        assert isinstance(weight, GroupScaled)
        assert weight.values.dtype == STORED[kind]


def test_fp8_numbers_are_torchs():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(fp8_to_float(every).nan_to_num(nan=999), every.float().nan_to_num(nan=999))
    assert fp8_to_float(every.view(2, 8, 16)[:, 1:, :9]).shape == (2, 7, 9)


def test_products_of_few_columns_are_padded_as_others_are():
    """A last run of fewer columns than the library takes the same way."""
    x = torch.randn(16, 30)
    weight = cpu.block_scaled(torch.randn(21, 30).to(torch.float8_e4m3fn), torch.ones(3, 4), (8, 8), x.device)
    exact = weight.values[:, :30].double()
    got = cpu.linear(x, weight, tiled=True)
    torch.testing.assert_close(got.double(), x.double() @ exact.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(cpu.linear(x[8:], weight, tiled=True), got[8:])
