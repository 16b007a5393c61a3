"""`r1-cluster weights`: what a person sees of it."""

import pytest

from r1_cluster.cli.main import main
from r1_cluster.config import ASSETS
from r1_cluster.models.family import ARCHITECTURES


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
