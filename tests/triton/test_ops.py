"""A whole small model through the Triton operations, in the interpreter, against plain torch.

Both run on the CPU here, so the model is told which operations to take. What may differ follows from the
formats: float32 sums in other orders, BF16 roundings, and FP8 activations, of which each value is off by up to
2^-4 of itself and a product's relative error is their mean square.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_checkpoint import R1_CONFIG
from small_model import (
    DENSE_FP8_SHAPE,
    DENSE_KERNEL_SHAPE,
    FP8_SHAPE,
    KERNEL_SHAPE,
    SmallModel,
    config_values,
    dense_values,
    quantize,
    to_fp8,
    write_checkpoint,
)

from kernels import cpu, ops, reference
from r1_cluster.engine.sampler import sample
from r1_cluster.models.config import UnsupportedModel
from r1_cluster.models.family import parse_config
from r1_cluster.models.fitting import check_fits
from r1_cluster.records import SampleSpec, SamplingParams
from r1_cluster.weights.tensors import INT4, INT8

either_way = pytest.mark.parametrize("deterministic", [True, pytest.param(False, marks=pytest.mark.system)])

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

STEPS = [  # (sequence, new tokens): prefill, mixed chunks, decode, decode of another batch
    [(0, 21), (1, 3)],
    [(1, 1), (0, 6), (2, 9)],
    [(2, 1), (0, 1), (1, 1)],
    [(0, 1), (2, 2)],
]


class TritonModel(SmallModel):
    """A small model whose mixtures of experts go through `DeviceOps.moe`."""

    def moe(self, layer, x, num_tokens):
        weights, ids = self.router.gate(layer, x)
        limit = torch.tensor([num_tokens], dtype=torch.int32, device=x.device)
        (experts,) = self.shards
        return experts.mixture(layer, x, weights, ids, limit) + self.router.shared(layer, x)


def run(model, seed=0):
    rng = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    return [model.step([(s, rng.integers(0, vocab, n)) for s, n in step]).cpu() for step in STEPS]


@pytest.fixture
def triton_ops(monkeypatch):
    """Every model that is loaded from here on takes the Triton operations."""
    monkeypatch.setattr(ops, "_MODULES", {DEVICE.type: "kernels.triton_ops"})
    return ops.for_device(DEVICE)


def pair(monkeypatch, folder, **options):
    """The same model on plain torch and on the kernels."""
    plain = SmallModel(folder, **options)
    monkeypatch.setattr(ops, "_MODULES", {DEVICE.type: "kernels.triton_ops"})
    return plain, TritonModel(folder, device=DEVICE, **options)


@pytest.mark.slow
@either_way
def test_float32_logits_are_those_of_plain_torch(monkeypatch, tmp_path, deterministic):
    if DEVICE.type == "cuda":
        pytest.skip("matrix units round float32 to TF32; the engine refuses float32 there")
    write_checkpoint(tmp_path, config_values(**KERNEL_SHAPE))
    plain, triton = pair(monkeypatch, tmp_path, deterministic=deterministic)
    for expected, got in zip(run(plain), run(triton), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.slow
@either_way
def test_bfloat16_is_as_near_to_float32_as_plain_torch_is(monkeypatch, tmp_path, deterministic):
    """Both round to BF16 in about the same places: neither may be much farther from float32."""
    write_checkpoint(tmp_path, config_values(**KERNEL_SHAPE))
    exact = run(SmallModel(tmp_path, deterministic=deterministic))
    plain, triton = pair(monkeypatch, tmp_path, deterministic=deterministic, dtype=torch.bfloat16)
    for truth, other, mine in zip(exact, run(plain), run(triton), strict=True):
        assert relative(mine, truth) < max(2 * relative(other, truth), 0.02)


def fp8_plain():
    """Plain torch with activations rounded to FP8 in the same places: `reference`'s definitions, in float32."""

    def product(x, weight):
        rounded = reference.dequantize(*reference.quantize(x.float()))
        return rounded @ reference.dequantize_weight(weight.values, weight.scale).T

    def linear(x, weight, bias=None, *, tiled):
        if isinstance(weight, torch.Tensor):
            return cpu.linear(x, weight, bias, tiled=tiled)
        return (product(x, weight) + (0 if bias is None else bias)).to(x.dtype)

    def mlp(x, gate_up, down, *, tiled):
        return product(reference.silu_mul(linear(x, gate_up, tiled=tiled).float()), down).to(x.dtype)

    def experts(x, counts, gate_up, down, *, tiled):
        parts = torch.split(x, counts)
        weights = [
            ops.BlockScaled(w.values[i], w.scale[i]) for i in range(len(counts)) for w in (gate_up, down)
        ]
        pairs = zip(parts, weights[::2], weights[1::2])
        return torch.cat([mlp(part, up, down, tiled=tiled) for part, up, down in pairs if len(part)])

    own = {"linear": linear, "mlp": mlp, "experts": experts, "KEEPS_FP8": True}
    own["block_scaled"] = lambda values, scale, block, device: ops.BlockScaled(values, scale)
    return SimpleNamespace(**{**vars(cpu), **own})


@pytest.fixture
def fp8_folder(monkeypatch, tmp_path):
    """folder(**changes) → a checkpoint in FP8; models on plain torch round their activations to FP8 as well."""

    def folder(**changes):
        write_checkpoint(tmp_path, config_values(**FP8_SHAPE | changes))
        to_fp8(tmp_path)
        return tmp_path

    monkeypatch.setitem(sys.modules, "fp8_plain", fp8_plain())
    monkeypatch.setattr(ops, "_MODULES", {"cpu": "fp8_plain"})
    return folder


def assert_kept_as_fp8(model):
    weight = model.shards[0]._weights[1][0]
    assert isinstance(weight, ops.BlockScaled)
    assert weight.values.element_size() == 1


@pytest.mark.slow
@either_way
def test_fp8_weights_stay_fp8(monkeypatch, fp8_folder, deterministic):
    """Rounded to FP8 in the same places, both agree to float32. But a value within float32's rounding of the
    edge between two FP8 values may fall to the other side, which moves it by 2^-4, and its sequence after it:
    seldom, and by a few per cent."""
    if DEVICE.type == "cuda":
        pytest.skip("matrix units round float32 to TF32; the engine refuses float32 there: see the next test")
    plain, triton = pair(monkeypatch, fp8_folder(), deterministic=deterministic)
    assert_kept_as_fp8(triton)
    pairs = zip(torch.cat(run(triton)), torch.cat(run(plain)), strict=True)
    errors = sorted(relative(got, expected) for got, expected in pairs)
    assert errors[len(errors) // 2] < 1e-5, errors
    assert errors[-1] < 0.1, errors


@pytest.mark.slow
def test_fp8_weights_beside_bfloat16_are_as_near_to_float32_as_plain_torch_is(monkeypatch, fp8_folder):
    """What is served on a device. BF16 rounds by 2^-9 before FP8 rounds by 2^-4: so about one value in 32 falls to
    the other neighbour, which hides what a unit's accumulators cut (2^-13). Truth is plain torch in float32 with
    FP8's roundings; as for BF16 alone, the kernels may not be much farther from it than plain torch is. Every
    token goes to every expert: a choice that tips over would hide all else."""
    folder = fp8_folder(n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)
    exact = run(SmallModel(folder, deterministic=False))
    plain, triton = pair(monkeypatch, folder, deterministic=False, dtype=torch.bfloat16)
    assert_kept_as_fp8(triton)
    for truth, other, mine in zip(exact, run(plain), run(triton), strict=True):
        assert relative(mine, truth) < 2 * relative(other, truth)


system = pytest.mark.system


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "deterministic"),
    [
        ("Qwen2ForCausalLM", False),
        ("Qwen3ForCausalLM", True),
        pytest.param("Qwen2ForCausalLM", True, marks=system),
        pytest.param("Qwen3ForCausalLM", False, marks=system),
        pytest.param("LlamaForCausalLM", True, marks=system),
        pytest.param("LlamaForCausalLM", False, marks=system),
    ],
)
def test_dense_float32_logits_are_those_of_plain_torch(monkeypatch, tmp_path, architecture, deterministic):
    if DEVICE.type == "cuda":
        pytest.skip("matrix units round float32 to TF32; the engine refuses float32 there")
    write_checkpoint(tmp_path, dense_values(architecture, **DENSE_KERNEL_SHAPE))
    plain, triton = pair(monkeypatch, tmp_path, deterministic=deterministic)
    for expected, got in zip(run(plain), run(triton), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen2ForCausalLM",
        pytest.param("Qwen3ForCausalLM", marks=system),
        pytest.param("LlamaForCausalLM", marks=system),
    ],
)
def test_dense_bfloat16_is_as_near_to_float32_as_plain_torch_is(monkeypatch, tmp_path, architecture):
    write_checkpoint(tmp_path, dense_values(architecture, **DENSE_KERNEL_SHAPE))
    exact = run(SmallModel(tmp_path, deterministic=False))
    plain, triton = pair(monkeypatch, tmp_path, deterministic=False, dtype=torch.bfloat16)
    for truth, other, mine in zip(exact, run(plain), run(triton), strict=True):
        assert relative(mine, truth) < max(2 * relative(other, truth), 0.02)


INT_SHAPE = KERNEL_SHAPE | {"hidden_size": 200, "moe_intermediate_size": 136, "intermediate_size": 160}


@pytest.fixture(params=[INT8, INT4], ids=["int8", "int4"])
def int_folder(request, tmp_path):
    """A checkpoint in integers; widths end in short groups. Every token goes to every expert."""
    chosen = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    write_checkpoint(tmp_path / "float", config_values(**INT_SHAPE | chosen))
    quantize(tmp_path / "float", tmp_path / "int", request.param)
    return tmp_path / "int"


@pytest.mark.slow
@either_way
def test_integer_weights_meet_bfloat16_as_plain_torch_has_it(monkeypatch, int_folder, deterministic):
    """Truth is plain torch in float32, to whose weights the integers are exact. In BF16 plain torch rounds
    weights, the kernels do not; neither may be much farther off than the other's roundings explain."""
    exact = run(SmallModel(int_folder, deterministic=deterministic))
    plain, triton = pair(monkeypatch, int_folder, deterministic=deterministic, dtype=torch.bfloat16)
    for weight in triton.shards[0]._weights[1]:
        assert isinstance(weight, ops.GroupScaled)
    for truth, other, mine in zip(exact, run(plain), run(triton), strict=True):
        assert relative(mine, truth) < max(2 * relative(other, truth), 0.02)


@pytest.mark.slow
def test_dense_fp8_weights_stay_fp8(monkeypatch, tmp_path):
    """Biases are added to block-scaled products. For the bounds see `test_fp8_weights_stay_fp8`."""
    if DEVICE.type == "cuda":
        pytest.skip("matrix units round float32 to TF32; the engine refuses float32 there")
    write_checkpoint(tmp_path, dense_values("Qwen2ForCausalLM", **DENSE_FP8_SHAPE))
    to_fp8(tmp_path)
    monkeypatch.setitem(sys.modules, "fp8_plain", fp8_plain())
    monkeypatch.setattr(ops, "_MODULES", {"cpu": "fp8_plain"})
    plain, triton = pair(monkeypatch, tmp_path, deterministic=False)
    assert isinstance(triton.stages[0]._layers[0].attention._qkv, ops.BlockScaled)
    pairs = zip(torch.cat(run(triton)), torch.cat(run(plain)), strict=True)
    errors = sorted(relative(got, expected) for got, expected in pairs)
    assert errors[len(errors) // 2] < 1e-5, errors
    assert errors[-1] < 0.1, errors


@pytest.mark.slow
def test_dense_deterministic_logits_do_not_depend_on_the_batch(triton_ops, tmp_path):
    write_checkpoint(tmp_path, dense_values("Qwen3ForCausalLM", **DENSE_KERNEL_SHAPE))
    deterministic_logits_do_not_depend_on_the_batch(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [pytest.param(None, id="bf16"), pytest.param(INT4, id="int4", marks=pytest.mark.system)]
)
def test_deterministic_logits_do_not_depend_on_the_batch(triton_ops, tmp_path, how):
    """The same sequence alone and among others, in other chunks, decoded or recomputed: the same bits."""
    folder = tmp_path / "float"
    write_checkpoint(folder, config_values(**KERNEL_SHAPE if how is None else INT_SHAPE))
    if how is not None:
        quantize(folder, tmp_path / "int", how)
        folder = tmp_path / "int"
    deterministic_logits_do_not_depend_on_the_batch(folder)


def deterministic_logits_do_not_depend_on_the_batch(tmp_path, fp8_cache=False):
    options = {"deterministic": True, "dtype": torch.bfloat16, "device": DEVICE, "fp8_cache": fp8_cache}
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 96, 40)
    alone = TritonModel(tmp_path, **options)
    expected = alone.step([(0, tokens)])[0]
    other = TritonModel(tmp_path, **options)
    other.step([(3, rng.integers(0, 96, 11)), (0, tokens[:17])])
    other.step([(0, tokens[17:39]), (3, rng.integers(0, 96, 2))])
    got = other.step([(3, [7]), (5, rng.integers(0, 96, 9)), (0, tokens[39:])])
    assert torch.equal(got[2], expected)


@pytest.mark.slow
def test_the_sampler_draws_as_plain_torch_does(triton_ops):
    """Same seeds, same tokens; a draw within rounding of a boundary may fall on its neighbour."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(24, 200, generator=generator) * 3
    kinds = [(0.0, 1.0, 0), (0.6, 0.95, 0), (1.0, 1.0, 20), (1.3, 0.8, 5)]
    specs = [
        SampleSpec(i, 10 + i, SamplingParams(t, p, k, seed=i))
        for i, (t, p, k) in enumerate(kinds * (len(logits) // len(kinds)))
    ]
    expected = sample(cpu, logits, specs)
    got = sample(triton_ops, logits.to(DEVICE), specs)
    assert sum(a != b for a, b in zip(got, expected)) <= 1
    assert got[::4] == expected[::4]  # greedy


# All tokens go to all experts: a choice that tips over would hide all else.
ALL_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
FP8_CACHES = {
    "mla": config_values(**KERNEL_SHAPE | ALL_EXPERTS),
    "gqa": dense_values("Qwen2ForCausalLM", **DENSE_KERNEL_SHAPE),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("mla", marks=system), "gqa"])
def test_an_fp8_cache_holds_what_plain_torchs_does(monkeypatch, tmp_path, family):
    """For the bounds see `test_fp8_weights_stay_fp8`."""
    if DEVICE.type == "cuda":
        pytest.skip("matrix units round float32 to TF32; the engine refuses float32 there")
    write_checkpoint(tmp_path, FP8_CACHES[family])
    plain, triton = pair(monkeypatch, tmp_path, deterministic=True, fp8_cache=True)
    pairs = zip(torch.cat(run(triton)), torch.cat(run(plain)), strict=True)
    errors = sorted(relative(got, expected) for got, expected in pairs)
    assert errors[len(errors) // 2] < 1e-5, errors
    assert errors[-1] < 0.1, errors


@pytest.mark.slow
@pytest.mark.parametrize("family", FP8_CACHES)
def test_an_fp8_cache_beside_bfloat16_is_as_near_to_float32_as_plain_torch_is(monkeypatch, tmp_path, family):
    """What is served on a device; see `test_fp8_weights_beside_bfloat16...`."""
    write_checkpoint(tmp_path, FP8_CACHES[family])
    exact = run(SmallModel(tmp_path, deterministic=False, fp8_cache=True))
    plain, triton = pair(monkeypatch, tmp_path, deterministic=False, fp8_cache=True, dtype=torch.bfloat16)
    for truth, other, mine in zip(exact, run(plain), run(triton), strict=True):
        assert relative(mine, truth) < max(2 * relative(other, truth), 0.02)


@pytest.mark.slow
def test_deterministic_logits_over_an_fp8_cache_do_not_depend_on_the_batch(triton_ops, tmp_path):
    """Of latents the kernel's own test holds it."""
    write_checkpoint(tmp_path, FP8_CACHES["gqa"])
    deterministic_logits_do_not_depend_on_the_batch(tmp_path, fp8_cache=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": 24}, "kv_lora_rank 24 is not a power of two of 16 or more"),
        ({"qk_rope_head_dim": 8}, "qk_rope_head_dim 8"),
        ({"page_size": 24}, "engine.page_size 24 is not a multiple of 16"),
        ({"hidden_size": 192}, r"inner widths \[192\] do not divide"),
        ({"moe_intermediate_size": 192}, r"inner widths \[192\] do not divide"),
        ({"q_lora_rank": 192}, r"weights of \[192\] rows have another below"),
    ],
)
def test_what_the_kernels_cannot_serve_is_named_before_anything_starts(triton_ops, changes, words):
    page_size = changes.pop("page_size", 16)
    config = parse_config(config_values(**FP8_SHAPE | changes))
    with pytest.raises(UnsupportedModel, match=words):
        check_fits(config, triton_ops, torch.bfloat16, page_size)
    check_fits(parse_config(config_values(**FP8_SHAPE)), triton_ops, torch.bfloat16, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 24}, "head_dim 24 is not a power of two of 16 or more"),
        ({"head_dim": 8}, "head_dim 8"),
        ({"page_size": 24}, "engine.page_size 24 is not a multiple of 16"),
        ({"intermediate_size": 192}, r"inner widths \[192\] do not divide"),
        ({"num_key_value_heads": 1}, r"weights of \[64\] rows have another below"),
    ],
)
def test_what_the_kernels_cannot_serve_of_a_dense_model_is_named(triton_ops, changes, words):
    page_size = changes.pop("page_size", 16)
    config = parse_config(dense_values("Qwen2ForCausalLM", **DENSE_FP8_SHAPE | changes))
    with pytest.raises(UnsupportedModel, match=words):
        check_fits(config, triton_ops, torch.bfloat16, page_size)
    sound = parse_config(dense_values("Qwen2ForCausalLM", **DENSE_FP8_SHAPE))
    check_fits(sound, triton_ops, torch.bfloat16, 16)


@pytest.mark.parametrize(("heads", "key_heads"), [(12, 2), (28, 4), (40, 8), (32, 8), (64, 8)])
def test_the_distilled_models_fit(triton_ops, heads, key_heads):
    values = dense_values(num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=128)
    check_fits(parse_config(values), triton_ops, torch.bfloat16, 16)


def test_r1_fits(triton_ops):
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    shape = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
    }
    config = parse_config(R1_CONFIG | shape | fp8)
    check_fits(config, triton_ops, torch.bfloat16, 64)
