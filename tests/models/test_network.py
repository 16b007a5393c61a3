"""The network against transformers' DeepseekV3ForCausalLM, and its bits against themselves."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from network_checks import DIVISIONS, RELAXED, check_bits, chunks_of, decoded, two_threads
from small_model import YARN, SmallModel, config_values, write_checkpoint


@st.composite
def small_configs(draw):
    groups, top_groups = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]))
    dense = draw(st.integers(0, 3))
    return config_values(
        n_group=groups,
        topk_group=top_groups,
        num_experts_per_tok=draw(st.integers(1, 2)),
        n_routed_experts=draw(st.sampled_from([8, 12])),
        q_lora_rank=draw(st.sampled_from([None, 24])),
        rope_scaling=draw(st.sampled_from([None, YARN, YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}])),
        first_k_dense_replace=dense,
        n_shared_experts=draw(st.integers(1, 2)),
        num_attention_heads=(heads := draw(st.sampled_from([1, 2, 3, 4, 5]))),
        num_key_value_heads=heads,
        norm_topk_prob=draw(st.booleans()),
        v_head_dim=draw(st.sampled_from([9, 12, 20])),
        hidden_size=draw(st.sampled_from([48, 50])),
        intermediate_size=draw(st.sampled_from([67, 80])),
        moe_intermediate_size=draw(st.sampled_from([23, 24])),
        kv_lora_rank=draw(st.sampled_from([14, 16])),
    )


@settings(max_examples=12, **RELAXED)
@given(
    values=small_configs(),
    seed=st.integers(0, 2**31 - 1),
    bounds=st.sets(st.integers(1, 2), max_size=2),
    cuts=st.lists(st.integers(1, 110), max_size=3),
    deterministic=st.booleans(),
)
def test_logits_are_those_of_transformers(values, seed, bounds, cuts, deterministic):
    from transformers import DeepseekV3ForCausalLM

    note(f"seed {seed}")
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = write_checkpoint(folder, values, seed)
        oracle, report = DeepseekV3ForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        model = SmallModel(folder, deterministic=deterministic, bounds=sorted(bounds))
        prompts = [rng.integers(0, config.vocab_size, length) for length in (110, 3, 37)]
        answers = rng.integers(0, config.vocab_size, (len(prompts), 4))
        got = decoded(model, prompts, answers, cuts)
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            with torch.no_grad():
                expected = oracle(torch.from_numpy(np.concatenate((prompt, answer)))[None]).logits[0]
            lengths = np.cumsum([len(c) for c in chunks_of(prompt, cuts)] + [1] * 4)
            torch.testing.assert_close(got[i], expected[lengths - 1], atol=1e-4, rtol=0)


def test_absorbed_and_expanded_attention_agree(tmp_path):
    config = write_checkpoint(tmp_path, config_values(rope_scaling=YARN))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 200)
    absorbed = SmallModel(tmp_path, deterministic=True)
    expanded = SmallModel(tmp_path, deterministic=False)
    for cut in ((0, 90), (90, 200)):  # the second chunk expands the cached latents of the first
        a, b = (model.step([(0, tokens[slice(*cut)])]) for model in (absorbed, expanded))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert expanded.batches([(1, tokens)])[0].attention.has_expanded
    assert not absorbed.batches([(1, tokens)])[0].attention.has_expanded


@pytest.mark.slow
@settings(max_examples=20, **RELAXED)
@given(values=small_configs(), **DIVISIONS)
def test_deterministic_logits_are_bit_identical(**layout):
    check_bits(**layout)


@pytest.mark.slow
@settings(max_examples=3, **RELAXED)
@given(values=small_configs(), **DIVISIONS)
def test_deterministic_logits_are_bit_identical_on_two_threads(**layout):
    with two_threads():
        check_bits(**layout)


@pytest.mark.parametrize("deterministic", [True, False])
def test_bfloat16_stays_near_float32(tmp_path, deterministic):
    config = write_checkpoint(tmp_path, config_values())
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 80)
    exact, rough = (
        SmallModel(tmp_path, deterministic=deterministic, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for chunks in ([(0, tokens), (1, tokens[:2])], [(0, [3]), (1, tokens[:20])]):
        a, b = exact.step(chunks), rough.step(chunks)
        assert b.dtype == torch.float32
        assert torch.cosine_similarity(a, b).min() > 0.98


def test_a_poisoned_neighbour_harms_nobody(tmp_path):
    config = write_checkpoint(tmp_path, config_values())
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


def test_a_step_can_be_done_again(tmp_path):
    config = write_checkpoint(tmp_path, config_values())
    model = SmallModel(tmp_path, deterministic=True)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 70)
    model.step([(0, tokens[:50])])
    first = model.step([(0, tokens[50:])])
    model.cached[0] = 50
    assert torch.equal(model.step([(0, tokens[50:])]), first)


@pytest.mark.parametrize("layers", [range(2, 2), range(2, 4), range(-1, 2), range(0, 3, 2)])
def test_a_stage_takes_a_range_of_the_layers_alone(tmp_path, layers):
    from r1_cluster.models.loader import Loader, Shard
    from r1_cluster.models.network import StageModel
    from r1_cluster.weights.checkpoint import Checkpoint

    config = write_checkpoint(tmp_path, config_values())
    shard = Shard(torch.device("cpu"), torch.float32, deterministic=True)
    with pytest.raises(ValueError, match="no range of the 3 layers"):
        StageModel(config, Loader(Checkpoint(tmp_path), shard), layers)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_shipped_checkpoint_has_transformers_logits(deterministic):
    from transformers import DeepseekV3ForCausalLM

    folder = Path(__file__).parents[2] / "r1_cluster/assets/nano_r1"
    oracle = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = SmallModel(folder, deterministic=deterministic, bounds=[2])
    tokens = np.random.default_rng(0).integers(0, oracle.config.vocab_size, 200)
    got = [model.step([(0, tokens[:150])])[0]]
    got += [model.step([(0, [token])])[0] for token in tokens[150:]]
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens)[None]).logits[0][149:]
    torch.testing.assert_close(torch.stack(got), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_plain_torch_asks_nothing_of_the_host_on_other_devices(tmp_path, deterministic):
    """Torch's `meta` plays a device without kernels of its own, such as npu: it has shapes and no values."""
    config = write_checkpoint(tmp_path, config_values())
    device = torch.device("meta")
    model = SmallModel(tmp_path, deterministic=deterministic, device=device)
    model.moe = lambda layer, x_TD, num_tokens: torch.zeros_like(x_TD)
    for chunks in ([(0, np.arange(40)), (1, np.arange(3))], [(0, [1]), (1, [2])]):
        logits = model.step(chunks)
        assert (logits.device, logits.shape) == (device, (2, config.vocab_size))
    weights, ids = model.router.gate(1, torch.zeros(8, config.hidden_size, device=device))
    assert weights.device == ids.device == device
    rows = torch.zeros(6, config.hidden_size, device=device)
    assert model.shards[0].forward(1, rows, [1, 0, 2, 0, 0, 0, 3, 0]).device == device
