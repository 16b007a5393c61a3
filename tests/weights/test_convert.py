"""`convert`: tensor by tensor what DeepSeek's convert.py writes."""

import json
import re
import signal

import pytest
import torch
from dying_cast import DyingCasts, run
from r1_files import write_r1
from safetensors.torch import load_file

from r1_cluster.cli.main import main

# Each rank's part of all that is split is a whole number of blocks for two ranks.
EVEN = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
# Of each kind of tensor, as published: its name there, and which dimension ranks share.
PUBLISHED = [
    (r"model\.embed_tokens\.weight", r"embed.weight", 0),
    (r"model\.norm\.weight", r"norm.weight", None),
    (r"lm_head\.weight", r"head.weight", 0),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"layers.\1.attn_norm.weight", None),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"layers.\1.ffn_norm.weight", None),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.(.*)", r"layers.\1.attn.wq.\2", 0),
    (r"model\.layers\.(\d+)\.self_attn\.q_a_proj\.(.*)", r"layers.\1.attn.wq_a.\2", None),
    (r"model\.layers\.(\d+)\.self_attn\.q_a_layernorm\.weight", r"layers.\1.attn.q_norm.weight", None),
    (r"model\.layers\.(\d+)\.self_attn\.q_b_proj\.(.*)", r"layers.\1.attn.wq_b.\2", 0),
    (r"model\.layers\.(\d+)\.self_attn\.kv_a_proj_with_mqa\.(.*)", r"layers.\1.attn.wkv_a.\2", None),
    (r"model\.layers\.(\d+)\.self_attn\.kv_a_layernorm\.weight", r"layers.\1.attn.kv_norm.weight", None),
    (r"model\.layers\.(\d+)\.self_attn\.kv_b_proj\.(.*)", r"layers.\1.attn.wkv_b.\2", 0),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.(.*)", r"layers.\1.attn.wo.\2", 1),
    (r"model\.layers\.(\d+)\.mlp\.gate\.weight", r"layers.\1.ffn.gate.weight", None),
    (r"model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias", r"layers.\1.ffn.gate.bias", None),
    (r"model\.layers\.(\d+)\.mlp\.(shared_experts\.)?gate_proj\.(.*)", r"layers.\1.ffn.\2w1.\3", 0),
    (r"model\.layers\.(\d+)\.mlp\.(shared_experts\.)?down_proj\.(.*)", r"layers.\1.ffn.\2w2.\3", 1),
    (r"model\.layers\.(\d+)\.mlp\.(shared_experts\.)?up_proj\.(.*)", r"layers.\1.ffn.\2w3.\3", 0),
    (
        r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.gate_proj\.(.*)",
        r"layers.\1.ffn.experts.\2.w1.\3",
        "expert",
    ),
    (
        r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.down_proj\.(.*)",
        r"layers.\1.ffn.experts.\2.w2.\3",
        "expert",
    ),
    (
        r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.up_proj\.(.*)",
        r"layers.\1.ffn.experts.\2.w3.\3",
        "expert",
    ),
]


def published(tensors, num_layers, num_experts, ranks):
    """The files that convert.py writes, as dicts."""
    files = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{num_layers}."):
            continue
        ((match, to, dim),) = [
            (m, to, dim) for pattern, to, dim in PUBLISHED if (m := re.fullmatch(pattern, name))
        ]
        new = match.expand(to).replace("weight_scale_inv", "scale")
        for rank, file in enumerate(files):
            if dim == "expert":
                if int(match[2]) // (num_experts // ranks) == rank:
                    file[new] = tensor
            else:
                file[new] = tensor if dim is None else tensor.chunk(ranks, dim)[rank]
    return files


def convert(source, target, ranks, experts=4):
    flags = {"hf-ckpt-path": source, "save-path": target, "n-experts": experts, "model-parallel": ranks}
    return main(["weights", "convert", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fp8", "ranks", "shape"),
    [
        (True, 1, {}),
        (True, 2, EVEN),
        (False, 1, {}),
        (False, 2, {}),
        (False, 4, EVEN | {"q_lora_rank": None}),
    ],
)
def test_tensor_by_tensor_as_published(tmp_path, capsys, fp8, ranks, shape):
    config, tensors = write_r1(tmp_path / "hf", fp8=fp8, **shape)
    assert convert(tmp_path / "hf", tmp_path / "out", ranks) == 0
    expected = published(tensors, config.num_hidden_layers, 4, ranks)
    names = [f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "tokenizer.json"])
    for name, want in zip(names, expected):
        found = load_file(tmp_path / "out" / name)
        assert found.keys() == want.keys()
        for key, tensor in want.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)), key


def test_what_ranks_cannot_share(tmp_path, capsys):
    write_r1(tmp_path / "hf")

    def refused(words, **how):
        assert convert(tmp_path / "hf", tmp_path / "out", **how) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    refused("3 ranks cannot share 4 experts", ranks=3)
    refused("2 ranks cannot share dimension 0 of tensor model.layers.0.self_attn.q_b_proj.weight", ranks=2)
    refused("--n-experts is 256, config.json has 4", ranks=2, experts=256)
    values = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(values | {"architectures": ["GPT2LMHeadModel"]}))
    refused("GPT2LMHeadModel is not supported", ranks=1)


@pytest.mark.slow
def test_killed_it_goes_on_rank_by_rank(tmp_path):
    write_r1(tmp_path / "hf", **EVEN)
    run(tmp_path / "hf", tmp_path / "whole", ranks=2)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    casts, kept = DyingCasts(), []
    for at in (2, 20, 100, 200):
        target = tmp_path / str(at)
        assert casts.cast(tmp_path / "hf", target, ranks=2, at=at) == -signal.SIGKILL
        for path in target.glob("*.safetensors"):  # a rank's file is whole, or not there
            assert path.read_bytes() == expected[path.name]
        kept.append(run(tmp_path / "hf", target, ranks=2).kept)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == expected
    casts.close()
    assert kept == sorted(kept)
    assert kept[0] == 0 < kept[-1]
