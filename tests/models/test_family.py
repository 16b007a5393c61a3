"""Configurations are read as they are published, or refused: one sentence says what cannot be run. Tensors are those
that are published."""

import json
import math
from pathlib import Path

import pytest
from small_model import YARN, config_values

from r1_cluster.models.config import ModelConfigError, UnsupportedModel
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
        parse_config({"architectures": ["Qwen2ForCausalLM"]})
    assert str(error.value) == "Qwen2ForCausalLM is not supported; supported: DeepseekV3ForCausalLM"


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
