"""Quantizing checkpoints: what is written, how far it is off, and what a run that is ended leaves behind."""

import json
import shutil
import signal

import pytest
import torch
from dying_cast import DyingCasts
from safetensors.torch import load_file, save_file
from small_model import FP8_SHAPE, config_values, quantize, random_tensors, to_fp8, write_checkpoint

from r1_cluster.models.family import load_config, mtp_table, parse_config, tensor_table
from r1_cluster.weights import stream
from r1_cluster.weights.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointError
from r1_cluster.weights.quantize import is_quantized, quantize_checkpoint
from r1_cluster.weights.rewrite import RewriteError
from r1_cluster.weights.stream import PARTIAL
from r1_cluster.weights.tensors import INT4, INT8

CPU = torch.device("cpu")
FORMATS = pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
CONFIG = parse_config(config_values(hidden_size=200, num_nextn_predict_layers=1))
WEIGHT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def source(tmp_path):
    """Three files with an index, an MTP module, a tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = random_tensors(CONFIG, 0)
    tensors |= {spec.name: torch.randn(spec.shape) for spec in mtp_table(CONFIG)}
    tensors = {name: tensor if "bias" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    files = {}
    for i, name in enumerate(tensors):
        files.setdefault(f"model-{i % 3}.safetensors", {})[name] = tensors[name]
    for file, part in files.items():
        save_file(part, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    values = config_values(hidden_size=200, num_nextn_predict_layers=1)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def opened(folder):
    config = load_config(folder)
    return Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format)


@pytest.mark.slow
@FORMATS
def test_linear_layers_are_rounded_and_all_else_is_as_it_was(source, tmp_path, how):
    target = tmp_path / "target"
    errors = {error.name: error for error in quantize(source, target, how)}
    specs = {spec.name: spec for spec in (*tensor_table(CONFIG), *mtp_table(CONFIG))}
    assert set(errors) == {name for name, spec in specs.items() if is_quantized(spec)}
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not list(target.glob(f"*{PARTIAL}"))
    with opened(source) as before, opened(target) as after:
        for name, spec in specs.items():
            weight, got = (x.get(name, torch.float32, CPU) for x in (before, after))
            assert after.shape(name) == tuple(weight.shape)
            if not is_quantized(spec):
                assert torch.equal(got, weight)
                continue
            q, scale = after.get_int(name)
            step = scale.repeat_interleave(how.group_size or weight.shape[1], 1)[:, : weight.shape[1]]
            assert torch.equal(got, q * step)
            assert ((got - weight).abs() <= step * 0.500001).all()
            assert torch.equal(after.get(name, torch.float32, CPU, (slice(3, 9), slice(2, 5))), got[3:9, 2:5])
            error = errors[name]
            assert error.largest == pytest.approx(float((got - weight).abs().max()))
            assert error.relative == pytest.approx(float((got - weight).norm() / weight.norm()), rel=1e-5)
            if weight.numel() > 4000:  # errors are spread evenly over a step: its square over 12 on average
                even = float((step.square().mean() / 12 / weight.square().mean()).sqrt())
                assert error.relative == pytest.approx(even, rel=0.1)


def test_what_stays_in_floats():
    left = {spec.name for spec in tensor_table(CONFIG) if not is_quantized(spec) and len(spec.shape) == 2}
    layers = {name.split(".", 3)[3] for name in left if "layers" in name}
    assert layers == {"self_attn.kv_b_proj.weight", "mlp.gate.weight"}
    assert {name for name in left if "layers" not in name} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_files_are_those_that_compressed_tensors_describes(source, tmp_path):
    quantize(source, tmp_path / "target", INT4)
    config = json.loads((tmp_path / "target/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert {"lm_head", "model.layers.0.self_attn.kv_b_proj", "model.layers.3.eh_proj"} <= set(
        config["ignore"]
    )
    assert not [name for name in config["ignore"] if "experts" in name or "embed" in name]
    index = json.loads((tmp_path / "target" / INDEX).read_text())
    names = index["weight_map"]
    assert {WEIGHT + suffix for suffix in ("_packed", "_scale", "_shape")} <= set(names)
    tensors = load_file(tmp_path / "target" / names[WEIGHT + "_packed"])
    assert {suffix: tensors[WEIGHT + suffix].dtype for suffix in ("_packed", "_scale", "_shape")} == {
        "_packed": torch.int32,
        "_scale": torch.bfloat16,
        "_shape": torch.int64,
    }
    assert tensors[WEIGHT + "_scale"].shape == (200, 1)
    assert tensors[WEIGHT + "_shape"].tolist() == [200, 24]
    total = sum(
        x.numel() * x.itemsize
        for file in (tmp_path / "target").glob("*.safetensors")
        for x in load_file(file).values()
    )
    assert index["metadata"]["total_size"] == total


@FORMATS
def test_from_fp8(tmp_path, how):
    write_checkpoint(tmp_path / "fp8", config_values(**FP8_SHAPE))
    to_fp8(tmp_path / "fp8")
    quantize(tmp_path / "fp8", tmp_path / "int", how)
    assert load_config(tmp_path / "int").fp8_block is None
    with opened(tmp_path / "fp8") as before, opened(tmp_path / "int") as after:
        assert not [name for name in after.entries if name.endswith("_scale_inv")]
        kept = "model.layers.0.self_attn.kv_b_proj.weight"
        assert torch.equal(after.get(kept, torch.bfloat16, CPU), before.get(kept, torch.bfloat16, CPU))
        weight, got = (x.get(WEIGHT, torch.float32, CPU) for x in (before, after))
        step = after.get_int(WEIGHT)[1].repeat_interleave(how.group_size or 128, 1)
        assert ((got - weight).abs() <= step * 0.500001).all()


def test_progress_is_told_in_bytes(source, tmp_path):
    config, told = load_config(source), []
    outcome, _ = quantize_checkpoint(
        source,
        tmp_path / "target",
        tensor_table(config),
        INT8,
        fp8_block=None,
        module=mtp_table(config),
        progress=lambda *bytes_done: told.append(bytes_done),
    )
    size = json.loads((tmp_path / "target" / INDEX).read_text())["metadata"]["total_size"]
    assert told == sorted(told)
    assert told[-1] == (size, size)
    assert outcome.num_bytes == sum(f.stat().st_size for f in (tmp_path / "target").glob("*.safetensors"))


def test_some_rows_at_a_time_give_the_same(source, tmp_path, monkeypatch):
    whole = quantize(source, tmp_path / "whole", INT4)
    monkeypatch.setattr(stream, "CHUNK_ITEMS", 300)
    parts = quantize(source, tmp_path / "parts", INT4)
    assert [error.name for error in parts] == [error.name for error in whole]
    assert [error.squared_error for error in parts] == pytest.approx(
        [error.squared_error for error in whole], rel=1e-9
    )
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


# The last is BF16's largest magnitude: its row's scale is 2^121, and -128 · 2^121 is beyond float32.
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -torch.finfo(torch.bfloat16).max])
def test_what_cannot_be_rounded_is_refused(tmp_path, value):
    write_checkpoint(tmp_path / "source", config_values())
    tensors = load_file(tmp_path / "source" / SINGLE)
    tensors[WEIGHT][2, 3] = value
    save_file(tensors, tmp_path / "source" / SINGLE)
    with pytest.raises(CheckpointError, match=f"tensor {WEIGHT} has values that are NaN or infinite, or too"):
        quantize(tmp_path / "source", tmp_path / "target", INT8)
    assert not list((tmp_path / "target").glob("*.safetensors*"))
    assert not (tmp_path / "target/config.json").exists()


def test_a_source_that_is_not_sound_is_refused(source, tmp_path):
    (source / "model-1.safetensors").write_bytes((source / "model-1.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off or broken"):
        quantize(source, tmp_path / "target", INT8)
    assert not list(tmp_path.glob("target*"))


def test_what_is_quantized_already_is_refused(source, tmp_path):
    quantize(source, tmp_path / "int8", INT8)
    with pytest.raises(CheckpointError, match="is stored in integers"):
        quantize(tmp_path / "int8", tmp_path / "int4", INT4)


def test_too_little_room_is_said_with_numbers(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RewriteError, match=r"has 0\.0 GB free, and 0\.0 GB more are needed"):
        quantize(source, tmp_path / "target", INT8)
    assert not list((tmp_path / "target").glob("*.safetensors*"))


@pytest.mark.slow
def test_killed_it_goes_on_and_tells_the_errors_of_all(source, tmp_path):
    """What it leaves behind at any point is in test_cast, with that of casts. Asked for another format, it starts
    over."""
    runs = DyingCasts()
    # Killed before this rename: of a first state, then of a file and a state in turns.
    for number, how in ((4, INT8), (6, INT8), (6, INT4)):
        target, whole = tmp_path / f"killed {number} {how}", tmp_path / f"whole {number} {how}"
        code = runs.cast(source, target, to="int8", at=number, calls=["rename"])
        assert (code, len(list(target.glob("*.safetensors")))) == (-signal.SIGKILL, number // 2 - 1)
        assert quantize(source, target, how) == quantize(source, whole, how)
        for file in whole.iterdir():
            assert file.read_bytes() == (target / file.name).read_bytes()
    runs.close()
