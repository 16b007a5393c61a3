"""`quantize` as a command: what it prints, and what it refuses in one sentence."""

import re

import pytest
from small_model import config_values, write_checkpoint

from r1_cluster.cli.main import main
from r1_cluster.cli.quantize import FORMATS
from r1_cluster.models.family import load_config
from r1_cluster.weights.headers import read_headers
from r1_cluster.weights.tensors import INT4, INT8, INT_SCALE_SUFFIX


@pytest.mark.parametrize(
    ("how", "expected", "least", "most"), [("int8", INT8, 0.2, 1), ("int4", INT4, 5, 15)]
)
def test_errors_are_told_by_part(tmp_path, capsys, how, expected, least, most):
    write_checkpoint(tmp_path / "source", config_values())
    paths = str(tmp_path / "source"), str(tmp_path / "target")
    assert main(["weights", "quantize", *paths, "--to", how]) == 0
    assert load_config(tmp_path / "target").int_format == FORMATS[how] == expected
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (\w+) \| (\d+) \|", out, re.MULTILINE))
    assert rows == {"attention": "12", "mlp": "3", "shared_experts": "6", "experts": "48"}
    errors = [float(x) for x in re.findall(r"\| (\d+\.\d+)% \|", out)]
    assert len(errors) == 4
    assert all(least < error < most for error in errors)
    assert f"{paths[1]} is {paths[0]} in {how.upper()}: 1 file, " in out


def test_the_command_and_what_others_make_of_its_checkpoint(tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    write_checkpoint(source, config_values())
    assert main(["weights", "quantize", str(source), str(target), "--to", "int4"]) == 0
    assert "in INT4: 1 file" in capsys.readouterr().out
    assert main(["weights", "verify", str(target)]) == 0
    assert "is sound" in capsys.readouterr().out
    sentences = []
    for folder in (source, target):
        assert main(["weights", "show", str(folder)]) == 0
        sentences.append(capsys.readouterr().out.splitlines()[-1])
    assert sentences[0] == sentences[1]
    for command in (["cast"], ["quantize", "--to", "int8"]):
        assert main(["weights", *command, str(target), str(tmp_path / "other")]) == 2
        assert "is in INT4: take the checkpoint that it was made from" in capsys.readouterr().err
    file = target / "model.safetensors"
    data = bytearray(file.read_bytes())
    scales = next(e for n, e in read_headers(target)[0].items() if n.endswith(INT_SCALE_SUFFIX))
    data[scales.offset : scales.offset + scales.num_bytes] = bytes(scales.num_bytes)
    file.write_bytes(data)
    assert main(["weights", "verify", str(target)]) == 1
    assert "scales that are not positive" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_done_is_one_sentence(tmp_path, capsys):
    write_checkpoint(tmp_path / "source", config_values())
    for arguments, words in (
        (["source", "source", "--to", "int8"], "are one folder, or one is in the other"),
        (["source", "target", "--to", "int2"], "'int2' is neither int8 nor int4"),
        (["target", "target", "--to", "int8"], "target"),
    ):
        paths = [str(tmp_path / name) for name in arguments[:2]]
        assert main(["weights", "quantize", *paths, *arguments[2:]]) == 2
        assert words in capsys.readouterr().err
