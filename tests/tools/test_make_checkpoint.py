import hashlib
import json
import math

import pytest
import torch
from dying_cast import run
from make_checkpoint import MIN_VOCAB, build_config, main, make_checkpoint
from safetensors import safe_open

from r1_cluster.cli.main import main as weights_main

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "vocab_size": MIN_VOCAB + 8,
}


def read_tensors(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 — safe_open is no mapping
                assert name not in tensors
                tensors[name] = opened.get_tensor(name)
    return tensors


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"q_lora_rank": None},
        {"rope_scaling": None},
        {"first_k_dense_replace": 0},
        {"torch_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_transformers_loads_all_but_the_mtp_module(tmp_path, overrides):
    folder = make_checkpoint(tmp_path, **(TINY | overrides))
    from transformers import DeepseekV3ForCausalLM

    model, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert {name.rsplit("layers.", 1)[1].split(".")[0] for name in info["unexpected_keys"]} == {"2"}
    ids = torch.arange(3, 40)[None]
    logits = model(ids).logits
    assert logits.isfinite().all()
    assert 0.3 < logits.float().std() < 3  # large enough that a wrong layer shows


DENSE = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": MIN_VOCAB + 8}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")],
)
def test_transformers_loads_dense_checkpoints(tmp_path, model_type, name, tied):
    dtype = "bfloat16" if tied else "float32"
    folder = make_checkpoint(
        tmp_path, model_type=model_type, tie_word_embeddings=tied, torch_dtype=dtype, **DENSE
    )
    assert ("lm_head.weight" in read_tensors(folder)) is not tied
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert str(model.dtype) == f"torch.{dtype}"
    logits = model(torch.arange(3, 40)[None]).logits
    assert logits.isfinite().all()
    # Large enough that a wrong layer shows: a tied head is an embedding, whose numbers are larger.
    assert 0.3 < logits.float().std() < (3 * DENSE["hidden_size"] ** 0.5 if tied else 3)


def test_mtp_module_is_stored_as_r1_stores_it(tmp_path):
    tensors = read_tensors(make_checkpoint(tmp_path, **TINY))
    names = {name.removeprefix("model.layers.2.") for name in tensors if name.startswith("model.layers.2.")}
    own = {"embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"}
    assert {f"{name}.weight" for name in own} <= names
    assert {name.removeprefix("model.layers.1.") for name in tensors if "layers.1." in name} == names - {
        f"{name}.weight" for name in own
    }
    assert tensors["model.layers.2.eh_proj.weight"].shape == (32, 64)


def test_shards_keep_to_their_limit_and_agree_with_the_index(tmp_path):
    one = read_tensors(make_checkpoint(tmp_path / "one", seed=3, **TINY))
    folder = make_checkpoint(tmp_path / "many", seed=3, max_shard_bytes=20_000, **TINY)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
        assert {name for name, where in index["weight_map"].items() if where == file.name} == names
        assert len(names) == 1 or file.stat().st_size < 20_000 + 10_000
    many = read_tensors(folder)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in many.values())
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)


def test_same_seed_same_files_other_seed_other_weights(tmp_path):
    first = digest(make_checkpoint(tmp_path / "a", seed=1, **TINY))
    assert first == digest(make_checkpoint(tmp_path / "b", seed=1, **TINY))
    other = digest(make_checkpoint(tmp_path / "c", seed=2, **TINY))
    assert {name for name in first if first[name] != other[name]} == {"model-00001-of-00001.safetensors"}


def test_bfloat16_is_float32_rounded_and_the_gate_bias_stays_float32(tmp_path):
    full = read_tensors(make_checkpoint(tmp_path / "full", **TINY))
    half = read_tensors(make_checkpoint(tmp_path / "half", torch_dtype="bfloat16", **TINY))
    for name, tensor in full.items():
        bias = name.endswith("e_score_correction_bias")
        assert half[name].dtype == (torch.float32 if bias else torch.bfloat16)
        assert torch.equal(half[name], tensor if bias else tensor.bfloat16())


def test_tokenizer_has_r1s_special_tokens(tmp_path):
    folder = make_checkpoint(tmp_path, **TINY)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]) == [0, 1]
    assert len(tokenizer) <= TINY["vocab_size"]
    added = {
        t["content"]: t["special"]
        for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    assert added["</think>"] is False
    assert added["<｜end▁of▁sentence｜>"] is True
    text = "Grüße, 世界 🙂 1234567!\n\tend"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert max(len(piece) for piece in tokenizer.tokenize("1234567")) <= 3


def test_a_replaced_checkpoint_leaves_no_old_shard(tmp_path):
    make_checkpoint(tmp_path, max_shard_bytes=20_000, **TINY)
    make_checkpoint(tmp_path, **TINY)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert main([str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_sizes_keep_r1s_geometry_where_they_say_so():
    assert build_config("nano")["vocab_size"] == 512
    for size in ("nano576", "small"):
        config = build_config(size)
        assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 576


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hiden_size": 4}, "hiden_size"),
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"n_routed_experts": 6}, "not a multiple"),
        ({"num_experts_per_tok": 9}, "topk_group"),
        ({"qk_rope_head_dim": 7}, "must be even"),
        ({"hidden_size": "big"}, "must be of type int"),
    ],
)
def test_dimensions_that_do_not_fit_are_named(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        make_checkpoint(tmp_path / "none", **overrides)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_type": "mistral"}, "no model_type 'mistral'; there are: deepseek_v3, llama, qwen2, qwen3"),
        ({"model_type": "llama", "size": "nano576"}, "no size 'nano576' of llama; there are: nano, small"),
        ({"model_type": "llama", "n_routed_experts": 4}, "no such key in config.json: n_routed_experts"),
        ({"model_type": "qwen2", "num_attention_heads": 3}, "not a multiple"),
        ({"model_type": "qwen3", "num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    ],
)
def test_what_a_dense_model_cannot_be_is_named(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        make_checkpoint(tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()


def test_command_line_sets_keys(tmp_path, capsys):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]
    assert (
        main([str(tmp_path), *sets, "--set=rope_scaling=null", "--dtype=bfloat16", "--max-shard-bytes=9000"])
        == 0
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == "bfloat16"
    assert config["num_key_value_heads"] == 2
    assert math.prod([config["hidden_size"], config["num_hidden_layers"]]) == 64
    assert "MiB" in capsys.readouterr().out


def test_command_line_makes_a_dense_model(tmp_path, capsys):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in (DENSE | {"num_key_value_heads": 1}).items()]
    assert main([str(tmp_path), "--model-type=qwen2", *sets, "--set=tie_word_embeddings=true"]) == 0
    tensors = read_tensors(tmp_path)
    assert tensors["model.layers.1.self_attn.k_proj.bias"].shape == (16,)
    assert tensors["model.layers.1.self_attn.q_proj.weight"].shape == (64, 64)
    assert main([str(tmp_path), "--model-type=llama", "--size=nano576"]) == 1
    assert "no size 'nano576' of llama" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
@pytest.mark.parametrize(
    ("model_type", "shape"),
    [("deepseek_v3", TINY | {"hidden_size": 150}), ("llama", DENSE), ("qwen2", DENSE), ("qwen3", DENSE)],
)
def test_few_bits_are_those_of_cast_and_quantize(tmp_path, model_type, shape, dtype):
    options = {"model_type": model_type, "torch_dtype": "float32", "max_shard_bytes": 100_000, **shape}
    floats = make_checkpoint(tmp_path / "float32", seed=3, **options)
    made = make_checkpoint(tmp_path / dtype, seed=3, dtype=dtype, **options)
    run(floats, tmp_path / "rewritten", dtype)
    tensors, expected = read_tensors(made), read_tensors(tmp_path / "rewritten")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made, tmp_path / "rewritten")]
    assert configs[0] == configs[1]


def test_what_is_not_quantized_is_bfloat16(tmp_path):
    found = {str(t.dtype) for t in read_tensors(make_checkpoint(tmp_path, dtype="fp8", **TINY)).values()}
    assert found == {"torch.float8_e4m3fn", "torch.bfloat16", "torch.float32"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert weights_main(["weights", "verify", str(tmp_path)]) == 0
    with pytest.raises(ValueError, match="no dtype 'fp4'; there are: float32, bfloat16, fp8, int8, int4"):
        make_checkpoint(tmp_path, dtype="fp4")
