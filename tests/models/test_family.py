"""Configurations are read as they are published, or refused: one sentence says what cannot be run. Tensors are those
that are published."""

import json
import math
from pathlib import Path

import pytest
from small_model import LLAMA3, YARN, config_values, dense_values

from r1_cluster.models.config import GqaShape, Llama3Rope, ModelConfigError, UnsupportedModel, Yarn
from r1_cluster.models.family import load_config, mtp_table, parse_config, tensor_table

R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"factor": 40, "original_max_position_embeddings": 4096},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_r1_as_published():
    config = parse_config(R1)
    assert config.attention.cache_width == 576
    assert config.moe_layers == range(3, 61)
    assert config.fp8_block == (128, 128)
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (1,)
    assert config.rope.scaling is not None
    assert config.rope.scaling.factor == 40.0
    assert config.rope.scaling.truncate


def test_what_transformers_writes_means_the_same(tmp_path):
    from transformers import DeepseekV3Config

    values = config_values(rope_scaling=YARN)
    DeepseekV3Config(**values).save_pretrained(tmp_path)
    written = json.loads(Path(tmp_path, "config.json").read_text())
    assert "rope_parameters" in written
    assert load_config(tmp_path) == parse_config(values)


def test_other_architectures_are_named():
    with pytest.raises(UnsupportedModel) as error:
        parse_config({"architectures": ["MistralForCausalLM"]})
    assert str(error.value) == (
        "MistralForCausalLM is not supported; supported: "
        "DeepseekV3ForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' (only 'silu')"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 (only 4)"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "supported: fp8"),
    ],
)
def test_other_variants_are_named(changes, words):
    with pytest.raises(UnsupportedModel) as error:
        parse_config(config_values(**changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "the key hidden_size is missing"),
        ({"hidden_size": "48"}, "hidden_size must be of type int, it is '48'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be of type int"),
        ({"hidden_size": 0, "vocab_size": -1}, "vocab_size must be positive, it is -1; hidden_size"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, it is 7"),
        ({"n_group": 3}, "n_routed_experts 8 is not a multiple of n_group 3"),
        ({"topk_group": 5}, "topk_group 5 exceeds n_group 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds the 4 experts of topk_group 2 groups"),
        ({"n_group": 8}, "n_group 8 is too large"),
        ({"n_routed_experts": 10**9}, "n_routed_experts 1000000000 exceeds 100000"),
        (
            {"num_hidden_layers": 10**9, "num_nextn_predict_layers": 10**9},
            "num_nextn_predict_layers 1000000000",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "the key factor is missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"eos_token_id": ["a"]}, "eos_token_id"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
            "weight_block_size",
        ),
    ],
)
def test_contradictions_name_their_key(changes, words):
    with pytest.raises(ModelConfigError) as error:
        parse_config(config_values(**changes))
    assert words in str(error.value)


def test_a_folder_without_a_readable_config(tmp_path):
    with pytest.raises(ModelConfigError, match="is not there"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelConfigError, match="must hold a JSON object"):
        load_config(tmp_path)


def test_r1_has_as_many_parameters_as_published():
    config = parse_config(R1)
    counts = [sum(math.prod(spec.shape) for spec in table(config)) for table in (tensor_table, mtp_table)]
    assert [f"{count / 1e9:.1f}" for count in counts] == ["671.0", "13.5"]
    assert {spec.layer for spec in tensor_table(config)} == {None, *range(61)}
    assert {spec.layer for spec in mtp_table(config)} == {61}


# DeepSeek-V3 inference/convert.py, `mapping`; norms and gates are in every rank.
SPLIT = {
    "embed_tokens": 0,
    "q_proj": 0,
    "q_b_proj": 0,
    "kv_b_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
}
SPLIT |= {"down_proj": 1, "lm_head": 0, "head": 0}


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_ranks_divide_tensors_as_deepseek_does(q_lora_rank):
    config = parse_config(config_values(q_lora_rank=q_lora_rank, num_nextn_predict_layers=1))
    for spec in (*tensor_table(config), *mtp_table(config)):
        assert spec.split_dim == SPLIT.get(spec.name.split(".")[-2]), spec


# As published: the size, the attention and the positions of each dense model of the family.
LLAMA_ROPE = Llama3Rope(8.0, 1.0, 4.0, 8192)
PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": ("1.78", GqaShape(12, 2, 128, True, False), None),
    "DeepSeek-R1-Distill-Qwen-7B": ("7.62", GqaShape(28, 4, 128, True, False), None),
    "DeepSeek-R1-Distill-Qwen-14B": ("14.77", GqaShape(40, 8, 128, True, False), None),
    "DeepSeek-R1-Distill-Qwen-32B": ("32.76", GqaShape(40, 8, 128, True, False), None),
    "DeepSeek-R1-Distill-Llama-8B": ("8.03", GqaShape(32, 8, 128, False, False), LLAMA_ROPE),
    "DeepSeek-R1-Distill-Llama-70B": ("70.55", GqaShape(64, 8, 128, False, False), LLAMA_ROPE),
    "DeepSeek-R1-0528-Qwen3-8B": (
        "8.19",
        GqaShape(32, 8, 128, False, True),
        Yarn(4.0, 32768, 32.0, 1.0, 0.0, 0.0, True, None, 0.8782488562869419),
    ),
}


def published_values(name):
    """config.json of a distilled model, from what its family shares and what its size changes."""
    hidden, inner, layers, heads, key_heads, vocab, theta, eps = SIZES[name]
    values = {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 131072,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if "Llama" in name:
        scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
        own = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "rope_scaling": scaling}
    elif "Qwen3" in name:
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        scaling |= {"attn_factor": 0.8782488562869419}
        own = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "rope_scaling": scaling}
    else:
        own = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    return values | own


# hidden, intermediate, layers, heads, key heads, vocabulary, theta, epsilon
SIZES = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151936, 10000, 1e-6),
    "DeepSeek-R1-Distill-Qwen-7B": (3584, 18944, 28, 28, 4, 152064, 10000, 1e-6),
    "DeepSeek-R1-Distill-Qwen-14B": (5120, 13824, 48, 40, 8, 152064, 1000000.0, 1e-5),
    "DeepSeek-R1-Distill-Qwen-32B": (5120, 27648, 64, 40, 8, 152064, 1000000.0, 1e-5),
    "DeepSeek-R1-Distill-Llama-8B": (4096, 14336, 32, 32, 8, 128256, 500000.0, 1e-5),
    "DeepSeek-R1-Distill-Llama-70B": (8192, 28672, 80, 64, 8, 128256, 500000.0, 1e-5),
    "DeepSeek-R1-0528-Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, 1000000, 1e-6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_dense_models_as_published(name):
    config = parse_config(published_values(name))
    size, attention, scaling = PUBLISHED[name]
    assert f"{sum(math.prod(spec.shape) for spec in tensor_table(config)) / 1e9:.2f}" == size
    assert config.attention == attention
    assert config.rope.scaling == scaling
    assert config.rope.dim == 128
    assert config.moe is None
    assert not config.moe_layers
    assert mtp_table(config) == []


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["plain", "llama3", "yarn"])
def test_what_transformers_writes_of_dense_models_means_the_same(tmp_path, architecture, scaling):
    import transformers

    values = dense_values(architecture, rope_scaling=scaling, head_dim=16, tie_word_embeddings=True)
    config_class = getattr(transformers, architecture).config_class
    config_class(**values).save_pretrained(tmp_path)
    assert load_config(tmp_path) == parse_config(values)


def test_a_window_that_is_off_is_accepted():
    off = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21}
    plain = parse_config(dense_values("Qwen2ForCausalLM"))
    assert parse_config(dense_values("Qwen2ForCausalLM", **off)) == plain
    null = {"sliding_window": None, "layer_types": ["full_attention"] * 3, "num_key_value_heads": 2}
    assert parse_config(dense_values("Qwen2ForCausalLM", **null)) == plain


def test_a_llama_may_leave_out_what_follows_from_the_rest():
    values = dense_values(num_key_value_heads=None, head_dim=None)
    assert parse_config(values).attention == GqaShape(4, 4, 12, False, False)


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64 in use"),
        ("Llama", {"sliding_window": 64}, "sliding_window 64 in use"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention' in use"),
        ("Llama", {"attention_bias": True}, "attention_bias True (only False)"),
        ("Llama", {"mlp_bias": True}, "mlp_bias True (only False)"),
        ("Qwen3", {"attention_bias": True}, "attention_bias True (only False)"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' (only 'silu')"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("Llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("Llama", {"rope_scaling": {"rope_type": "longrope"}}, "supported: default, llama3, yarn"),
    ],
)
def test_other_variants_of_dense_models_are_named(architecture, changes, words):
    with pytest.raises(UnsupportedModel) as error:
        parse_config(dense_values(f"{architecture}ForCausalLM", **changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        (
            "Llama",
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        ("Llama", {"num_key_value_heads": 0}, "num_key_value_heads must be positive, it is 0"),
        ("Llama", {"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ("Llama", {"num_attention_heads": 0}, "num_attention_heads 0"),
        ("Llama", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 exceeds 10000"),
        ("Llama", {"max_position_embeddings": 2**60}, "exceeds 16777216"),
        ("Llama", {"head_dim": 7}, "head_dim must be even, it is 7"),
        ("Qwen3", {"head_dim": None}, "the key head_dim is missing"),
        ("Qwen2", {"eos_token_id": None}, "the key eos_token_id is missing"),
        ("Llama", {"rope_theta": 1}, "rope_theta must be finite and exceed 1, it is 1.0"),
        ("Llama", {"rope_theta": float("inf")}, "rope_theta must be finite"),
        ("Llama", {"rope_scaling": LLAMA3 | {"factor": 0}}, "factor must be positive and finite, it is 0.0"),
        ("Llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "must exceed low_freq_factor 1.0"),
        ("Llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor is missing"),
        (
            "Qwen3",
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "must be positive, it is 0",
        ),
        ("Qwen3", {"rope_scaling": YARN | {"attn_factor": float("nan")}}, "attn_factor must be positive"),
    ],
)
def test_contradictions_of_dense_models_name_their_key(architecture, changes, words):
    with pytest.raises(ModelConfigError) as error:
        parse_config(dense_values(f"{architecture}ForCausalLM", **changes))
    assert words in str(error.value)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_dense_tensors_are_those_of_transformers(architecture, tied):
    import transformers

    values = dense_values(architecture, tie_word_embeddings=tied)
    oracle = getattr(transformers, architecture)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in oracle(oracle.config_class(**values)).state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    table = tensor_table(parse_config(values))
    assert {spec.name: spec.shape for spec in table} == expected
    for spec in table:
        row = spec.name.split(".")[-2]
        assert spec.split_dim == (SPLIT | {"k_proj": 0, "v_proj": 0}).get(row), spec


@pytest.mark.parametrize(
    "index", [None, "", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 3}}']
)
def test_whether_a_tied_head_is_stored_as_well(tmp_path, index):
    """What cannot be read lists nothing here, and is told when the checkpoint is opened."""
    (tmp_path / "config.json").write_text(json.dumps(dense_values(tie_word_embeddings=True)))
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    assert load_config(tmp_path).tie_word_embeddings is not (index is not None and "lm_head" in index)
