"""Quantizing checkpoints: what is written, how far it is off, and what a run that is ended leaves behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import FP8_SHAPE, config_values, quantize, random_tensors, to_fp8, write_checkpoint

from r1_cluster.models.family import load_config, mtp_table, parse_config, tensor_table
from r1_cluster.weights import quantize as quantize_module
from r1_cluster.weights.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointError
from r1_cluster.weights.quantize import QuantizeError, is_quantized, quantize_checkpoint
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
    quantize_checkpoint(
        source,
        tmp_path / "target",
        tensor_table(config),
        INT8,
        mtp=mtp_table(config),
        on_tensor=lambda error, done, total: told.append((error.name, done, total)),
    )
    size = json.loads((tmp_path / "target" / INDEX).read_text())["metadata"]["total_size"]
    assert {total for _, _, total in told} == {size}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] <= size


def test_some_rows_at_a_time_give_the_same(source, tmp_path, monkeypatch):
    whole = quantize(source, tmp_path / "whole", INT4)
    monkeypatch.setattr(quantize_module, "_ROWS_BYTES", 1)
    parts = quantize(source, tmp_path / "parts", INT4)
    assert [error.name for error in parts] == [error.name for error in whole]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(tmp_path, value):
    config = write_checkpoint(tmp_path / "source", config_values())
    tensors = load_file(tmp_path / "source" / SINGLE)
    tensors[WEIGHT][2, 3] = value
    save_file(tensors, tmp_path / "source" / SINGLE)
    with pytest.raises(QuantizeError, match=f"tensor {WEIGHT} .* holds NaN or infinity"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "target", tensor_table(config), INT8)
    assert not (tmp_path / "target").exists()


def test_a_source_that_is_not_sound_is_refused(source, tmp_path):
    (source / "model-1.safetensors").write_bytes((source / "model-1.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off or broken"):
        quantize(source, tmp_path / "target", INT8)
    assert not list(tmp_path.glob("target*"))


def test_what_is_quantized_already_is_refused(source, tmp_path):
    quantize(source, tmp_path / "int8", INT8)
    with pytest.raises(CheckpointError, match="is stored in integers"):
        quantize(tmp_path / "int8", tmp_path / "int4", INT4)


def test_a_target_that_exists_is_refused(source, tmp_path):
    (tmp_path / "target").mkdir()
    for target in (tmp_path / "target", source):
        with pytest.raises(QuantizeError, match="exists already"):
            quantize(source, target, INT8)


def test_a_disk_without_room_is_refused_with_numbers(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QuantizeError, match=r"has 0\.00 GiB free, 0\.00 GiB are needed"):
        quantize(source, tmp_path / "target", INT8)
    assert not list(tmp_path.glob("target*"))


def test_a_disk_that_fills_all_the_same_leaves_nothing_that_looks_whole(source, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QuantizeError, match=r"No space left on device; .*target was not made"):
        quantize(source, tmp_path / "target", INT8)
    monkeypatch.undo()
    assert not (tmp_path / "target").exists()
    assert not (tmp_path / "target.unfinished/config.json").exists()
    quantize(source, tmp_path / "target", INT8)
    opened(tmp_path / "target").close()
    assert not list(tmp_path.glob("*.unfinished"))


SCRIPT = """
import sys, time
from pathlib import Path
from small_model import quantize
from r1_cluster.weights import quantize as module
from r1_cluster.weights.tensors import INT8
write = module._write_quantized
def slowly(*args):
    time.sleep(0.02)
    return write(*args)
module._write_quantized = slowly
print("ready", flush=True)
quantize(Path(sys.argv[1]), Path(sys.argv[2]), INT8)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after_files", [0, 2])
def test_a_killed_run_starts_over_and_never_looks_whole(source, tmp_path, after_files):
    target, tests = tmp_path / "target", Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), str(tests.parent / "tools")])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, source, target],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    unfinished = tmp_path / "target.unfinished"
    end = time.monotonic() + 60
    while len(list(unfinished.glob("*.safetensors"))) < after_files or not unfinished.exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    assert not (unfinished / "config.json").exists()
    with pytest.raises(CheckpointError):
        Checkpoint(unfinished)
    quantize(source, target, INT8)
    quantize(source, tmp_path / "undisturbed", INT8)
    for file in (tmp_path / "undisturbed").iterdir():
        assert file.read_bytes() == (target / file.name).read_bytes()
    assert not unfinished.exists()
