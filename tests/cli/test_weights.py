"""`r1-cluster weights`: what a person sees of it."""

import pytest
import torch
from r1_files import write_r1
from safetensors.torch import load_file, save_file
from small_model import dense_values, write_checkpoint

from r1_cluster.cli.main import main
from r1_cluster.config import ASSETS
from r1_cluster.models.family import ARCHITECTURES


@pytest.mark.slow
def test_show_of_a_published_model(capsys):
    assert main(["weights", "show", "deepseek-ai/deepseek-r1"]) == 0
    out = capsys.readouterr().out
    assert "671.0B parameters, 36.6B of them active for each token (without the input embedding" in out
    (row,) = [line for line in out.splitlines() if "MTP module (layer 61)" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")][1:4] == ["1,564", "13.5B", "15.4 GB"]


def test_show_of_a_folder(capsys):
    assert main(["weights", "show", "builtin:nano_r1"]) == 0
    out = capsys.readouterr().out
    assert "1.23M parameters" in out
    (row,) = [line for line in out.splitlines() if "gates" in line]
    assert "BF16, F32" in row


def test_show_of_a_folder_whose_files_are_damaged(tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        content = (ASSETS / "nano_r1" / name).read_bytes()
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other.safetensors").write_bytes(b"\0" * 4)
    assert main(["weights", "show", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "1.23M parameters" in captured.out
    assert "other.safetensors is cut off" in captured.err
    (tmp_path / "model.safetensors").unlink()
    assert main(["weights", "show", str(tmp_path)]) == 2
    assert "has no safetensors file that can be read" in capsys.readouterr().err


def test_show_of_what_is_not_there(tmp_path, capsys):
    assert main(["weights", "show", "DeepSeek-R3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("r1-cluster: DeepSeek-R3 is neither a folder nor a published model; those are: ")
    assert "DeepSeek-R1-Distill-Llama-70B" in line
    assert main(["weights", "show", str(tmp_path)]) == 2
    assert "config.json is not there" in capsys.readouterr().err


@pytest.mark.skipif("LlamaForCausalLM" in ARCHITECTURES, reason="it is of the family now")
def test_show_of_an_architecture_that_is_not_known_yet(capsys):
    assert main(["weights", "show", "DeepSeek-R1-Distill-Llama-8B"]) == 2
    assert "LlamaForCausalLM is not supported; supported: DeepseekV3ForCausalLM" in capsys.readouterr().err


@pytest.mark.skipif("LlamaForCausalLM" not in ARCHITECTURES, reason="dense models are not read yet")
def test_show_of_a_dense_model(capsys):
    assert main(["weights", "show", "DeepSeek-R1-Distill-Llama-8B"]) == 0
    out = capsys.readouterr().out
    assert "8.03B parameters, all of them active for each token" in out
    assert "MTP" not in out


def test_verify_of_a_sound_checkpoint(capsys):
    assert main(["weights", "verify", "builtin:nano_r1"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "builtin:nano_r1 is sound: 1 file, 173 tensors, 3.4 MB."
    assert any("every number is finite and every scale positive" in line for line in rest)
    assert main(["weights", "verify", "--no-data", str(ASSETS / "nano_r1")]) == 0
    assert "The data was not read" in capsys.readouterr().out


def test_verify_of_a_damaged_checkpoint(tmp_path, capsys):
    write_r1(tmp_path)
    gone, cut = sorted(tmp_path.glob("*.safetensors"))[:2]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-3])
    assert main(["weights", "verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path} is not sound: 2 things are wrong with it.")
    for file in (gone, cut):
        assert f"download {file.name} again." in out
    (tmp_path / "config.json").write_text("{")
    assert main(["weights", "verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "3 things are wrong with it" in out
    assert "config.json cannot be read" in out


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_that_is_stored_though_it_is_tied_is_a_remark(tmp_path, capsys, differs):
    write_checkpoint(tmp_path / "a", dense_values(tie_word_embeddings=True))
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + differs
    save_file(tensors, tmp_path / "a/model.safetensors")
    words = (
        "with other numbers: it is used, as transformers 5"
        if differs
        else "with the same numbers: it is used"
    )
    assert main(["weights", "verify", str(tmp_path / "a")]) == 0
    assert f"lm_head.weight is stored, too, {words}" in capsys.readouterr().out
    # What is written of it holds the head as well, and is read in the same way.
    assert main(["weights", "quantize", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "int8"]) == 0
    assert torch.equal(
        load_file(tmp_path / "b/model.safetensors")["lm_head.weight"], tensors["lm_head.weight"]
    )
    capsys.readouterr()
    assert main(["weights", "verify", "--no-data", str(tmp_path / "b")]) == 0
    assert "lm_head.weight is stored, too: it is used." in capsys.readouterr().out


def test_verify_of_what_is_not_there(tmp_path, capsys):
    assert main(["weights", "verify", str(tmp_path / "nothing")]) == 2
    assert "is not a folder; name one with config.json and safetensors" in capsys.readouterr().err
    assert main(["weights", "verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "config.json is not there" in out
    assert "neither model.safetensors.index.json nor model.safetensors is there" in out


def test_cast_there_and_back(tmp_path, capsys):
    fp8, bf16, again = tmp_path / "fp8", tmp_path / "bf16", tmp_path / "again"
    write_r1(fp8)
    assert main(["weights", "cast", str(fp8), str(bf16)]) == 0
    assert capsys.readouterr().out.startswith(f"{bf16} is {fp8} in BF16: 3 files, ")
    assert main(["weights", "cast", "--to", "fp8", str(bf16), str(again)]) == 0
    assert capsys.readouterr().out.startswith(f"{again} is {bf16} in FP8: 3 files, ")
    assert main(["weights", "verify", str(again)]) == 0


def test_cast_with_deepseeks_flags(tmp_path, capsys):
    write_r1(tmp_path / "fp8")
    flags = ["--input-fp8-hf-path", str(tmp_path / "fp8"), "--output-bf16-hf-path", str(tmp_path / "bf16")]
    assert main(["weights", "cast", *flags]) == 0
    assert main(["weights", "verify", "--no-data", str(tmp_path / "bf16")]) == 0
    assert "quantization_config" not in (tmp_path / "bf16" / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "both SRC and DST are needed"),
        (["builtin:nano_r1"], "both SRC and DST are needed"),
        (["--input-fp8-hf-path", "builtin:nano_r1"], "both SRC and DST are needed"),
        (["a", "b", "--input-fp8-hf-path", "c"], "either in DeepSeek's way or in ours"),
        (["nowhere", "OUT"], "nowhere is not a folder"),
        (["builtin:nano_r1", "OUT", "--to", "int3"], "--to: 'int3' is neither bf16 nor fp8"),
        (["builtin:nano_r1", "OUT", "--to", "bf16"], "has no tensor that a cast to BF16 would change"),
    ],
)
def test_casts_that_cannot_begin(tmp_path, capsys, arguments, words):
    assert main(["weights", "cast", *(str(tmp_path / "out") if a == "OUT" else a for a in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()
