"""`quantize` as a command: what it prints, and what it refuses in one sentence."""

import re

import pytest
from small_model import config_values, write_checkpoint

from r1_cluster.cli import quantize as command
from r1_cluster.cli.quantize import FORMATS, quantize
from r1_cluster.models.family import load_config
from r1_cluster.weights.tensors import INT4, INT8


@pytest.mark.parametrize(
    ("how", "expected", "least", "most"), [("int8", INT8, 0.2, 1), ("int4", INT4, 5, 15)]
)
def test_errors_are_told_by_part(tmp_path, capsys, how, expected, least, most):
    write_checkpoint(tmp_path / "source", config_values())
    assert quantize(tmp_path / "source", tmp_path / "target", how) == 0
    assert how in FORMATS
    assert load_config(tmp_path / "target").int_format == expected
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (\w+) \| (\d+) \|", out, re.MULTILINE))
    assert rows == {"attention": "12", "mlp": "3", "shared_experts": "6", "experts": "48"}
    errors = [float(x) for x in re.findall(r"\| (\d+\.\d+)% \|", out)]
    assert len(errors) == 4
    assert all(least < error < most for error in errors)
    assert f"of {how.upper()} in" in out


def test_progress_has_a_rate_and_what_is_left(tmp_path, capsys, monkeypatch):
    write_checkpoint(tmp_path / "source", config_values())
    monkeypatch.setattr(command, "_PROGRESS_S", 0.0)
    assert quantize(tmp_path / "source", tmp_path / "target", "int8") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "MB/s" in line]
    assert len(lines) == 12 + 3 + 6 + 48
    assert all(re.fullmatch(r"[\d.]+ of [\d.]+ GB, \d+ MB/s, \d+ s left", line) for line in lines)


def test_what_cannot_be_done_is_one_sentence(tmp_path, capsys):
    write_checkpoint(tmp_path / "source", config_values())
    assert quantize(tmp_path / "source", tmp_path / "source", "int8") == 1
    assert "exists already: name a folder that does not" in capsys.readouterr().err
    assert quantize(tmp_path / "absent", tmp_path / "target", "int8") == 1
    assert "a checkpoint folder needs its config.json" in capsys.readouterr().err
