"""`cast`: bit for bit the published formula, within bounds of memory, and whole or recognizably unfinished
whatever kills it."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from dying_cast import NO_ROOM, DyingCasts, run
from r1_files import FP8_CONFIG, quantize, r1_tensors, write_files, write_r1
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_model import config_values

from r1_cluster.models.config import ModelConfigError
from r1_cluster.models.family import load_config, mtp_table, tensor_table
from r1_cluster.weights import rewrite, stream
from r1_cluster.weights.blocks import dequantize
from r1_cluster.weights.blocks import quantize as quantize_blocks
from r1_cluster.weights.checkpoint import Checkpoint, CheckpointError
from r1_cluster.weights.headers import INDEX
from r1_cluster.weights.rewrite import STATE, RewriteError
from r1_cluster.weights.verify import verify

WEIGHT = "model.layers.0.mlp.down_proj.weight"


def tensors_of(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def published_dequantize(weight, scale, block=128):
    """weight_dequant of DeepSeek-V3 inference/kernel.py, number by number: float32 product, rounded to the
    nearest BF16, ties to even."""
    rows, columns = weight.shape
    x = weight.float().numpy()
    of_row, of_column = np.arange(rows) // block, np.arange(columns) // block
    y = x * scale.float().numpy()[of_row[:, None], of_column[None, :]]
    word = y.view(np.uint32)
    rounded = (word + (0x7FFF + ((word >> 16) & 1))) >> 16
    return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "fp8"
    write_r1(folder)
    return folder


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """What an undisturbed cast to BF16 writes."""
    folder = tmp_path_factory.mktemp("finished") / "bf16"
    run(source, folder)
    return folder


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 300), (127, 129), (128, 128), (129, 127), (300, 200), (257, 1)]
)
def test_dequantizing_is_the_published_formula_at_odd_shapes(shape):
    generator = torch.Generator().manual_seed(0)
    # All the finite bytes there are, and scales of which many products are halfway between two BF16 numbers.
    byte = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    byte[(byte & 0x7F) == 0x7F] = 0
    weight = byte.view(torch.float8_e4m3fn)
    blocks = -(-shape[0] // 128), -(-shape[1] // 128)
    for scale in (
        torch.rand(blocks, generator=generator) * 1e-3 + 1e-6,
        torch.full(blocks, 1 + 2**-8),
        torch.full(blocks, 1e-38),
        torch.full(blocks, 3.4e38 / 448),
    ):
        ours = dequantize(weight, scale, (128, 128))
        assert torch.equal(bits(ours), bits(published_dequantize(weight, scale)))


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (300, 200), (257, 1)])
def test_quantizing_is_the_published_formula_at_odd_shapes(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for ours, published in zip(quantize_blocks(weight), quantize(weight)):
        assert torch.equal(bits(ours), bits(published))


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-38, 3.3e38])
def test_quantizing_legal_but_absurd_values(value):
    weight = torch.full((130, 3), value).bfloat16()
    values, scale = quantize_blocks(weight)
    assert bool(((scale > 0) & scale.isfinite()).all())
    back = dequantize(values, scale, (128, 128)).float()
    assert bool(back.isfinite().all())
    torch.testing.assert_close(back, weight.float(), rtol=2**-4, atol=1e-40)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_fp8_cannot_hold_is_refused(tmp_path, value):
    _, tensors = write_r1(tmp_path / "bf16", fp8=False)
    tensors[WEIGHT][299, 3] = value
    write_files(tmp_path / "bf16", tensors)
    with pytest.raises(CheckpointError, match=rf"tensor {WEIGHT} has values that are NaN or infinite"):
        run(tmp_path / "bf16", tmp_path / "fp8", "fp8")
    assert not (tmp_path / "fp8" / "config.json").exists()


def test_to_bf16(source, finished):
    before, after = tensors_of(source), tensors_of(finished)
    scales = {name for name in before if name.endswith("_scale_inv")}
    assert after.keys() == before.keys() - scales
    assert len(scales) == 68
    for name, tensor in after.items():
        expected = before[name]
        if name + "_scale_inv" in scales:
            expected = published_dequantize(expected, before[name + "_scale_inv"])
        assert tensor.dtype == expected.dtype
        assert torch.equal(bits(tensor), bits(expected))
    config = json.loads((finished / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert config == {key: value for key, value in original.items() if key != "quantization_config"}
    index = json.loads((finished / INDEX).read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in after.values())}
    for name, file in index["weight_map"].items():
        with safe_open(finished / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - it is no mapping
            assert opened.metadata() == {"format": "pt"}
    assert (finished / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert not (finished / STATE).exists()
    assert sound(finished)


def sound(folder):
    config = load_config(folder)
    report = verify(
        folder, tensor_table(config), mtp_table(config), config.fp8_block, progress=lambda done, total: None
    )
    return report.faults == []


def test_back_to_fp8(finished, tmp_path):
    run(finished, tmp_path / "fp8", "fp8")
    before, after = tensors_of(finished), tensors_of(tmp_path / "fp8")
    config = load_config(finished)
    for spec in (*tensor_table(config), *mtp_table(config)):
        matrix = spec.part in ("attention", "mlp", "shared_experts", "experts")
        if matrix:
            values, scale = quantize(before[spec.name])
            assert torch.equal(bits(after.pop(spec.name)), bits(values))
            assert torch.equal(after.pop(spec.name + "_scale_inv"), scale)
        else:
            assert torch.equal(bits(after.pop(spec.name)), bits(before[spec.name]))
    assert not after
    assert json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"] == FP8_CONFIG
    assert sound(tmp_path / "fp8")


def test_a_checkpoint_of_one_file_in_float32(tmp_path):
    (tmp_path / "f32").mkdir()
    values = config_values(hidden_size=300, torch_dtype="float32")
    (tmp_path / "f32/config.json").write_text(json.dumps(values))
    config = load_config(tmp_path / "f32")
    tensors = {name: t.float() for name, t in r1_tensors(config, fp8=False).items()}
    save_file(tensors, tmp_path / "f32/model.safetensors")
    run(tmp_path / "f32", tmp_path / "fp8", "fp8")
    assert sorted(path.name for path in (tmp_path / "fp8").iterdir()) == ["config.json", "model.safetensors"]
    after = load_file(tmp_path / "fp8/model.safetensors")
    values, scale = quantize(tensors[WEIGHT])
    assert torch.equal(bits(after[WEIGHT]), bits(values))
    assert torch.equal(after[WEIGHT + "_scale_inv"], scale)
    assert torch.equal(after["model.norm.weight"], tensors["model.norm.weight"])
    assert sound(tmp_path / "fp8")
    config = load_config(tmp_path / "fp8")
    Checkpoint(tmp_path / "fp8", tensor_table(config), config.fp8_block).close()


def test_chunks_do_not_show(source, finished, tmp_path, monkeypatch):
    """Three rows of blocks at a time, or one; copies of a few bytes."""
    monkeypatch.setattr(stream, "CHUNK_ITEMS", 300)
    seen = []
    run(source, tmp_path / "bf16", progress=lambda done, total: seen.append((done, total)))
    assert contents(tmp_path / "bf16") == contents(finished)
    assert len(seen) > 1000
    assert seen == sorted(seen)
    assert seen[-1] == (sum(t.nbytes for t in tensors_of(finished).values()),) * 2


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive_and_finite(source, tmp_path, value):
    shutil.copytree(source, tmp_path / "fp8")
    tensors = tensors_of(source)
    tensors[WEIGHT + "_scale_inv"][1, 1] = value
    write_files(tmp_path / "fp8", tensors)
    with pytest.raises(
        CheckpointError, match=f"{WEIGHT}_scale_inv has scales that are not positive and finite"
    ):
        run(tmp_path / "fp8", tmp_path / "bf16")
    assert unfinished(tmp_path / "bf16")


def test_a_damaged_source_is_refused_before_anything_is_written(source, tmp_path):
    shutil.copytree(source, tmp_path / "fp8")
    next((tmp_path / "fp8").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="but not there; download"):
        run(tmp_path / "fp8", tmp_path / "bf16")
    assert not (tmp_path / "bf16").exists()


def test_targets_that_are_refused(source, finished, tmp_path):
    for target in (source, source / "inside", source.parent):
        with pytest.raises(RewriteError, match="are one folder, or one is in the other"):
            run(source, target)
    with pytest.raises(RewriteError, match="is not empty, and holds nothing that could go on"):
        run(source, finished)
    (tmp_path / "file").write_text("")
    with pytest.raises(RewriteError, match=r"File exists|Not a directory"):
        run(source, tmp_path / "file")
    with pytest.raises(RewriteError, match="has no tensor that a cast to BF16 would change"):
        run(finished, tmp_path / "x")
    with pytest.raises(RewriteError, match="is FP8 already"):
        run(source, tmp_path / "x", "fp8")


@pytest.mark.parametrize(
    "state", ["", "{", "[]", "{}", '{"fingerprint": 1, "writes": [], "done": {}}', "[" * 100_000,
              '{"fingerprint": "", "writes": ["../precious"], "done": {}}',
              '{"fingerprint": "", "writes": ["/precious"], "done": {}}',
              '{"fingerprint": "", "writes": [3], "done": {}}', '{"fingerprint": "", "writes": [], "done": []}']
)  # fmt: skip
def test_a_state_that_no_cast_has_written(source, tmp_path, state):
    (tmp_path / "precious").write_text("")
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16" / STATE).write_text(state)
    with pytest.raises(RewriteError, match="is damaged; remove"):
        run(source, tmp_path / "bf16")
    assert (tmp_path / "precious").exists()


def test_two_at_a_time(source, finished, tmp_path):
    target = tmp_path / "bf16"
    tried = []

    def progress(done, total):
        if not tried:
            tried.append(True)
            with pytest.raises(RewriteError, match="somebody else writes to"):
                run(source, target)

    run(source, target, progress=progress)
    assert tried
    assert contents(target) == contents(finished)


def test_too_little_room_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RewriteError, match=r"has 0\.0 GB free, and 0\.0 GB more are needed; make room"):
        run(source, tmp_path / "bf16")
    assert not list((tmp_path / "bf16").glob("*.safetensors*"))


def test_a_source_that_changes_while_it_is_read(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "fp8")
    last = sorted(folder.glob("*.safetensors"))[-1]

    def progress(done, total):
        if not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            shutil.copy(last, tmp_path / "copy")
            (tmp_path / "copy").replace(last)

    with pytest.raises(RewriteError, match="was changed while it was read; let that end"):
        run(folder, tmp_path / "bf16", progress=progress)
    assert unfinished(tmp_path / "bf16")
    assert not list((tmp_path / "bf16").glob("*.safetensors*"))


def unfinished(folder):
    """Nobody takes it for a checkpoint: config.json is missing, and so is the index while any weights are."""
    with pytest.raises(ModelConfigError, match=r"config\.json is not there"):
        load_config(folder)
    if not (folder / INDEX).exists():
        with pytest.raises(CheckpointError, match="neither"):
            Checkpoint(folder)
        return True
    Checkpoint(folder).close()
    return len(list(folder.glob("*.safetensors"))) == 3


@pytest.fixture(scope="module")
def casts():
    casts = DyingCasts()
    yield casts
    casts.close()


@pytest.fixture(scope="module", params=["bf16", "int4"])
def to(request):
    """A cast and a quantization."""
    return request.param


@pytest.fixture(scope="module")
def whole(source, finished, to, tmp_path_factory):
    """What it writes undisturbed."""
    if to == "bf16":
        return finished
    run(source, folder := tmp_path_factory.mktemp("whole") / to, to)
    return folder


@pytest.mark.slow
def test_killed_anywhere_it_goes_on(casts, source, whole, to, tmp_path):
    expected, kept, at, killed = contents(whole), set(), 1, 0
    while (code := casts.cast(source, target := tmp_path / str(at), at=at, to=to)) == -signal.SIGKILL:
        killed += 1
        if target.exists() and (target / "config.json").exists():
            # All that is left to do is to forget the state.
            assert contents(target).items() >= expected.items()
        elif target.exists():
            assert unfinished(target)
        inodes = {path.name: path.stat().st_ino for path in target.glob("*.safetensors")}
        outcome = run(source, target, to)
        assert contents(target) == expected
        # What was finished stays, but for a file whose end was not written down any more.
        same = [name for name, inode in inodes.items() if (target / name).stat().st_ino == inode]
        assert len(inodes) - 1 <= outcome.kept == len(same)
        kept.add(outcome.kept)
        at += 1 if at < 6 else (13 if to == "bf16" else 31)
    assert code == 0
    assert killed > 12
    assert kept == {0, 1, 2, 3}


@pytest.mark.slow
def test_killed_again_and_again(casts, source, whole, to, tmp_path):
    """Each run is given a little longer, and goes on where the one before was killed."""
    target, numbers = tmp_path / to, []
    while casts.cast(source, target, to=to, at=3 + len(numbers), calls=["rename"]) == -signal.SIGKILL:
        numbers.append(len(list(target.glob("*.safetensors"))))
        assert len(numbers) < 8
    assert numbers == sorted(numbers)
    assert numbers[-1] == 3
    assert contents(target) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "config"])
def test_killed_and_the_source_changes_it_starts_over(casts, source, to, tmp_path, change):
    folder, target = shutil.copytree(source, tmp_path / "fp8"), tmp_path / to
    assert casts.cast(folder, target, to=to, at=5, calls=["rename"]) == -signal.SIGKILL
    assert list(target.glob("*.safetensors"))
    if change == "weights":
        write_r1(folder, seed=1)
    else:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 20000}))
    assert run(folder, target, to).kept == 0
    run(folder, tmp_path / "fresh", to)
    assert contents(target) == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_finished(casts, source, whole, to, tmp_path):
    target = tmp_path / to
    first, *others = sorted(whole.glob("*.safetensors"))
    largest = first.stat().st_size
    assert any(path.stat().st_size > largest for path in others)
    assert casts.cast(source, target, to=to, largest=largest) == NO_ROOM
    assert unfinished(target)
    assert not list(target.glob("*.partial"))
    assert first.name in [path.name for path in target.glob("*.safetensors")]
    assert run(source, target, to).kept >= 1
    assert contents(target) == contents(whole)
