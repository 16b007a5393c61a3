"""The dense networks against transformers' Llama, Qwen2 and Qwen3, and their bits against themselves."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from network_checks import DIVISIONS, RELAXED, check_bits, chunks_of, decoded, two_threads
from safetensors.torch import load_file, save_file
from small_model import LLAMA3, SmallModel, dense_values, to_fp8, write_checkpoint

from r1_cluster.models.family import tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.network import StageModel
from r1_cluster.weights.checkpoint import Checkpoint

ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
DENSE_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SCALINGS = [None, LLAMA3, DENSE_YARN, DENSE_YARN | {"attention_factor": 0.9, "beta_fast": 20.0}]


@st.composite
def dense_configs(draw):
    architecture = draw(st.sampled_from(ARCHITECTURES))
    key_heads = draw(st.sampled_from([1, 2, 3]))
    heads = key_heads * draw(st.sampled_from([1, 2, 3, 4, 5, 7]))
    wide = draw(st.sampled_from([48, 50]))
    return dense_values(
        architecture,
        num_key_value_heads=key_heads,
        num_attention_heads=heads,
        head_dim=draw(st.sampled_from([2, 8, 10, 16, 24])),
        # transformers refuses a Llama whose heads do not divide its hidden size.
        hidden_size=-(-wide // heads) * heads if architecture == "LlamaForCausalLM" else wide,
        intermediate_size=draw(st.sampled_from([67, 80])),
        tie_word_embeddings=draw(st.booleans()),
        rope_scaling=draw(st.sampled_from(SCALINGS)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
    )


def oracle_of(folder, dtype=torch.float32):
    import transformers

    (name,) = json.loads(Path(folder, "config.json").read_text())["architectures"]
    model, report = getattr(transformers, name).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def both(folder, rng, cuts, **options):
    """(our logits, transformers' at the same places) of prompts computed together in chunks, then decoded."""
    model = SmallModel(folder, **options)
    vocab = model.config.vocab_size
    prompts = [rng.integers(0, vocab, length) for length in (110, 3, 37)]
    answers = rng.integers(0, vocab, (len(prompts), 4))
    got = decoded(model, prompts, answers, cuts)
    oracle = oracle_of(folder)
    expected = []
    for prompt, answer in zip(prompts, answers):
        with torch.no_grad():
            logits = oracle(torch.from_numpy(np.concatenate((prompt, answer)))[None]).logits[0]
        expected.append(logits[np.cumsum([len(c) for c in chunks_of(prompt, cuts)] + [1] * 4) - 1])
    return torch.cat(got), torch.cat(expected)


@pytest.mark.slow
@settings(max_examples=12, **RELAXED)
@given(
    values=dense_configs(),
    seed=st.integers(0, 2**31 - 1),
    bounds=st.sets(st.integers(1, 2), max_size=2),
    cuts=st.lists(st.integers(1, 110), max_size=3),
    deterministic=st.booleans(),
)
def test_logits_are_those_of_transformers(values, seed, bounds, cuts, deterministic):
    note(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, values, seed)
        rng = np.random.default_rng(seed)
        got, expected = both(folder, rng, cuts, deterministic=deterministic, bounds=sorted(bounds))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@settings(max_examples=20, **RELAXED)
@given(values=dense_configs(), **DIVISIONS)
def test_deterministic_logits_are_bit_identical(**layout):
    check_bits(**layout)


@pytest.mark.slow
@settings(max_examples=3, **RELAXED)
@given(values=dense_configs(), **DIVISIONS)
def test_deterministic_logits_are_bit_identical_on_two_threads(**layout):
    with two_threads():
        check_bits(**layout)


@pytest.mark.slow
def test_the_magnitude_of_r1_0528_qwen3_8b_is_one(tmp_path):
    """Its `attn_factor` undoes YaRN's own magnitude; transformers reads `attention_factor` alone."""
    scaling = DENSE_YARN | {"attn_factor": 1 / (0.1 * math.log(4) + 1)}
    values = dense_values("Qwen3ForCausalLM", rope_scaling=scaling)
    write_checkpoint(tmp_path, values)
    model = SmallModel(tmp_path, deterministic=True)
    tokens = np.random.default_rng(2).integers(0, model.config.vocab_size, 150)
    got = model.step([(0, tokens)])[0]
    said = values | {"rope_scaling": DENSE_YARN | {"attention_factor": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with torch.no_grad():
        expected = oracle_of(tmp_path)(torch.from_numpy(tokens)[None]).logits[0, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(tmp_path, architecture, deterministic):
    """Both round to BF16 in about the same places: neither may be much farther from float32."""
    values = dense_values(architecture, rope_scaling=LLAMA3, tie_word_embeddings=True)
    write_checkpoint(tmp_path, values)
    tokens = np.random.default_rng(1).integers(0, values["vocab_size"], 80)
    model = SmallModel(tmp_path, deterministic=deterministic, dtype=torch.bfloat16, bounds=[1])
    got = [model.step([(0, tokens[:70]), (1, tokens[:3])])[0]]
    got += [model.step([(1, [5]), (0, [token])])[1] for token in tokens[70:]]
    assert got[0].dtype == torch.float32
    with torch.no_grad():
        exact, rough = (
            oracle_of(tmp_path, dtype)(torch.from_numpy(tokens)[None]).logits[0, 69:].float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    assert (torch.stack(got) - exact).norm() < 1.5 * (rough - exact).norm()


def test_fp8_blocks_are_what_they_stand_for(tmp_path):
    """Against transformers over the same weights, dequantized in float64."""
    values = dense_values("Qwen2ForCausalLM", hidden_size=192, intermediate_size=200, head_dim=16)
    write_checkpoint(tmp_path / "plain", values)
    write_checkpoint(tmp_path / "fp8", values | {"quantization_config": FP8_BLOCKS})
    to_fp8(tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8/model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name).double(), tensors[name.removesuffix("_scale_inv")].double()
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        tensors[name.removesuffix("_scale_inv")] = (weight * spread[: len(weight), : weight.shape[1]]).float()
    save_file(tensors, tmp_path / "plain/model.safetensors", metadata={"format": "pt"})
    tokens = np.random.default_rng(4).integers(0, values["vocab_size"], 60)
    got = SmallModel(tmp_path / "fp8", deterministic=True).step([(0, tokens)])[0]
    with torch.no_grad():
        expected = oracle_of(tmp_path / "plain")(torch.from_numpy(tokens)[None]).logits[0, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_poisoned_neighbour_harms_nobody(tmp_path):
    config = write_checkpoint(tmp_path, dense_values("Qwen2ForCausalLM"))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 20)
    clean, poisoned = (SmallModel(tmp_path, deterministic=True) for _ in range(2))
    poisoned.step([(1, tokens)])
    for caches in poisoned.caches:
        for cache in caches:
            cache[poisoned.pages[1]] = float("nan")
    expected = clean.step([(0, tokens)])[0]
    got = poisoned.step([(0, tokens), (1, [5])])
    assert torch.equal(got[0], expected)
    assert got[1].isnan().all()


def test_a_tied_head_is_read_by_the_last_stage_and_held_once_by_an_only_one(tmp_path):
    config = write_checkpoint(tmp_path, dense_values(tie_word_embeddings=True))
    shard = Shard(torch.device("cpu"), torch.float32, deterministic=True)
    with Checkpoint(tmp_path, tensor_table(config)) as checkpoint:
        loader = Loader(checkpoint, shard)
        only, last = (StageModel(config, loader, range(first, 3)) for first in (0, 2))
    assert only._head is only._embedding
    assert last._embedding is None
    assert torch.equal(last._head, only._head)


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_that_is_stored_though_it_is_tied_is_used_as_by_transformers(tmp_path, differs):
    write_checkpoint(tmp_path, dense_values("Qwen2ForCausalLM", tie_word_embeddings=True))
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.flip(0).contiguous() if differs else embedding.clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rng = np.random.default_rng(3)
    got, expected = both(tmp_path, rng, [], deterministic=True, bounds=[2])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_plain_torch_asks_nothing_of_the_host_on_other_devices(tmp_path, deterministic):
    """Torch's `meta` plays a device without kernels of its own, such as npu: it has shapes and no values."""
    config = write_checkpoint(tmp_path, dense_values("Qwen3ForCausalLM"))
    device = torch.device("meta")
    model = SmallModel(tmp_path, deterministic=deterministic, device=device)
    for chunks in ([(0, np.arange(40)), (1, np.arange(3))], [(0, [1]), (1, [2])]):
        logits = model.step(chunks)
        assert (logits.device, logits.shape) == (device, (2, config.vocab_size))
