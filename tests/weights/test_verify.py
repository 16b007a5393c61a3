"""`verify`: a sound checkpoint passes, and every defect of one is found and told with the file and the tensor."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from r1_files import write_files, write_r1

from r1_cluster.models.family import load_config, mtp_table, tensor_table
from r1_cluster.weights.headers import INDEX
from r1_cluster.weights.verify import verify

ONE, TWO, THREE = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
WEIGHT = "model.layers.0.mlp.down_proj.weight"
SCALE = WEIGHT + "_scale_inv"
MTP = "model.layers.3.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return folder, *write_r1(folder)


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published[0], tmp_path / "model")


def check(folder, data=True):
    config = load_config(folder)
    seen = []
    progress = (lambda done, total: seen.append((done, total))) if data else None
    report = verify(folder, tensor_table(config), mtp_table(config), config.fp8_block, progress=progress)
    if data and not report.faults:
        assert seen[-1] == (report.num_bytes, report.num_bytes)
        assert seen == sorted(seen)
    return report


def only_fault(folder, *words, data=False):
    (fault,) = check(folder, data).faults
    for word in words:
        assert word in fault
    return fault


@pytest.fixture
def rewrite(published, folder):
    """Writes the folder's tensors anew, changed; `None` takes one away."""

    def write(**changes):
        tensors = {**published[2], **changes.pop("changes", {}), **changes}
        return write_files(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})

    return write


def test_a_sound_checkpoint_passes(folder, published):
    report = check(folder)
    assert report.faults == []
    assert (report.files, report.tensors, report.hashed) == (3, len(published[2]), 0)
    assert "hashes were not compared" in report.notes[0]


def test_without_its_prediction_module_it_is_sound_too(folder, published):
    write_files(
        folder, {name: t for name, t in published[2].items() if not name.startswith("model.layers.3.")}
    )
    report = check(folder, data=False)
    assert report.faults == []
    assert report.notes == ["The MTP module is not there; only speculation needs it."]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [MTP, "model.layers.3.eh_proj.weight", "model.layers.3.shared_head.norm.weight"]
)
def test_tensors_of_the_prediction_module_are_missing_or_of_another_shape(folder, rewrite, published, name):
    shape = published[2][name].shape
    rewrite(changes={name: None, name + "_scale_inv": None})
    only_fault(folder, f"tensor {name} is missing, expected with shape {list(shape)}")
    rewrite(changes={name: torch.ones(7, dtype=torch.bfloat16), name + "_scale_inv": None})
    only_fault(folder, f"tensor {name} has shape [7], config.json expects {list(shape)}")


def test_the_index_and_the_files_disagree(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = ONE
    listed = index["weight_map"].pop(WEIGHT)
    (folder / INDEX).write_text(json.dumps(index))
    first, second = check(folder, data=False).faults
    assert first == f"{listed} holds tensor {WEIGHT}, which {INDEX} does not list; repair the index"
    assert second.startswith(f"{INDEX} lists tensor ghost in {ONE}, no file holds it")


def test_a_shard_is_missing(folder):
    (folder / TWO).unlink()
    only_fault(folder, f"{TWO} is listed in {INDEX}, but not there; download {TWO} again", data=True)


def test_a_shard_is_doubled(folder):
    shutil.copy(folder / TWO, folder / "model-00002-of-00003 (1).safetensors")
    only_fault(folder, "model-00002-of-00003 (1).safetensors with its", "no index lists it", "remove it")


def test_shards_are_swapped(folder):
    (folder / ONE).rename(folder / "x")
    (folder / TWO).rename(folder / ONE)
    (folder / "x").rename(folder / TWO)
    faults = "\n".join(check(folder, data=False).faults)
    assert f"{INDEX} lists tensor {WEIGHT} in" in faults
    assert f"it is in {ONE}" in faults
    assert f"it is in {TWO}" in faults
    assert "is missing, expected" not in faults


def test_another_layers_shard_by_its_hash(folder):
    """Same names, same shapes, other numbers: nothing but the hash tells."""
    keep_metadata(folder)
    assert check(folder).hashed == 3
    data = bytearray((folder / TWO).read_bytes())
    data[-1] ^= 1
    (folder / TWO).write_bytes(data)
    only_fault(folder, f"{TWO} has sha256 hash", "the hub's is", f"download {TWO} again", data=True)


def keep_metadata(folder):
    """As huggingface_hub does for `local_dir`."""
    metadata = folder / ".cache" / "huggingface" / "download"
    metadata.mkdir(parents=True)
    for path in folder.glob("*.safetensors"):
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        (metadata / f"{path.name}.metadata").write_text(f"{'0' * 40}\n{etag}\n1700000000.0\n")


@pytest.mark.parametrize("content", [b"", b"one line", b"\xff\xfe", b"a\nno hash\nb\n"])
def test_metadata_that_says_nothing(folder, content):
    keep_metadata(folder)
    (folder / f".cache/huggingface/download/{TWO}.metadata").write_bytes(content)
    report = check(folder)
    assert (report.faults, report.hashed) == ([], 2)
    assert "1 of 3 files" in report.notes[0]


def test_links_into_the_hubs_cache(folder, tmp_path):
    """snapshots/REVISION/FILE → blobs/ETAG, which is git's hash for a file that is not of LFS."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    blobs.mkdir()
    shutil.copytree(folder, snapshot)
    for path in sorted(snapshot.iterdir()):
        data = path.read_bytes()
        large = path.name in (ONE, TWO)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data)
        name = (hashlib.sha256(data) if large else git).hexdigest()
        path.rename(blobs / name)
        path.symlink_to(f"../../blobs/{name}")
    report = check(snapshot)
    assert (report.faults, report.hashed) == ([], 3)
    target = (snapshot / THREE).resolve()
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    only_fault(snapshot, f"{THREE} has git hash", data=True)


@pytest.mark.parametrize(
    ("cut", "words"), [(4, "is cut off: its header"), (100, "is cut off: its header"), (-5, "it is cut off")]
)
def test_a_header_or_body_is_cut(folder, cut, words):
    data = (folder / TWO).read_bytes()
    (folder / TWO).write_bytes(data[:cut])
    only_fault(folder, TWO, words, f"download {TWO} again", data=True)


def test_a_header_of_absurd_length(folder):
    (folder / TWO).write_bytes((2**63).to_bytes(8, "little") + b"{}")
    only_fault(folder, f"{TWO} is cut off: its header should take {2**63}", data=True)


def test_a_wrong_shape_or_type(folder, rewrite):
    rewrite(changes={"model.norm.weight": torch.ones(299)})
    only_fault(folder, "tensor model.norm.weight has shape [299], config.json expects [300]")
    rewrite(changes={"lm_head.weight": torch.ones(96, 300, dtype=torch.int32)})
    only_fault(folder, "tensor lm_head.weight is of dtype I32, expected F32, F16, BF16")
    rewrite(changes={"model.layers.1.surprise": torch.ones(3)})
    only_fault(folder, "tensor model.layers.1.surprise has no place in the model of config.json")


def test_weights_and_config_are_of_different_formats(folder, rewrite, published):
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    only_fault(folder, "config.json has no quantization_config, but", "tensors are FP8")


def test_weights_are_not_in_fp8_as_config_says(folder, published):
    write_files(
        folder,
        {n: t.bfloat16() for n, t in published[2].items() if not n.endswith("_scale_inv")},
    )
    only_fault(folder, "quantization_config says that weights are FP8, but no tensor is")


def test_a_scale_of_a_weight_that_is_not_fp8(folder, rewrite):
    rewrite(changes={WEIGHT: torch.ones(300, 200, dtype=torch.bfloat16)})
    only_fault(folder, f"tensor {SCALE} has the scales of a tensor that is BF16, expected FP8")


def test_scales_are_missing_or_too_few(folder, rewrite):
    rewrite(changes={SCALE: None})
    only_fault(folder, f"tensor {WEIGHT} is FP8, but {SCALE} is missing")
    rewrite(changes={SCALE: torch.ones(2, 2)})
    only_fault(folder, f"tensor {SCALE} is F32 [2, 2], expected one float per 128×128 block, [3, 2]")


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_are_not_positive_and_finite(folder, rewrite, published, value, dtype):
    scale = torch.ones(3, 2, dtype=dtype)
    scale[2, 1] = value
    file = rewrite(changes={SCALE: scale})[SCALE]
    only_fault(
        folder,
        f"{file}: tensor {SCALE} has 1 scales that are not positive and finite, the first at [2, 1]",
        data=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [WEIGHT, "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(folder, rewrite, published, name, value):
    tensor = published[2][name].clone()
    if tensor.dtype == torch.float8_e4m3fn:
        value = float("nan")  # it has no infinity
    tensor.view(-1)[-2:] = torch.full((2,), value).to(tensor.dtype)
    file = rewrite(changes={name: tensor})[name]
    at = [size - 1 for size in tensor.shape[:-1]] + [tensor.shape[-1] - 2]
    words = f"{file}: tensor {name} has 2 values that are NaN or infinite, the first at {at}; download"
    assert check(folder, data=False).faults == []
    only_fault(folder, words, data=True)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/hostname", "link.safetensors"])
def test_the_index_leads_out_of_the_folder(folder, target):
    shutil.copy(folder / THREE, folder.parent / "outside.safetensors")
    os.symlink("../outside.safetensors", folder / "link.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {n: target if f == THREE else f for n, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    faults = check(folder, data=False).faults
    assert any(f"names the file '{target}', which is outside of" in fault for fault in faults)


def test_a_file_is_replaced_while_it_is_read(folder):
    config = load_config(folder)

    def progress(done, total):
        if not (folder / "seen").exists():
            (folder / "seen").touch()
            shutil.copy(folder / ONE, folder / "copy")
            (folder / "copy").replace(folder / ONE)

    report = verify(folder, tensor_table(config), mtp_table(config), config.fp8_block, progress=progress)
    assert report.faults == [f"{ONE} was replaced while it was read; let the download end, and verify again"]


def test_everything_at_once_is_one_report(folder, rewrite, published):
    scale = torch.ones(3, 2)
    scale[0, 0] = 0
    norm = published[2]["model.norm.weight"].clone()
    norm[5] = float("nan")
    rewrite(changes={SCALE: scale, "model.norm.weight": norm, MTP: None, MTP + "_scale_inv": None})
    (folder / "extra.safetensors").write_bytes((folder / ONE).read_bytes())
    faults = "\n".join(check(folder).faults)
    assert "extra.safetensors with its" in faults
    assert f"tensor {MTP} is missing" in faults
    assert f"tensor {SCALE} has 1 scales" in faults
    assert "tensor model.norm.weight has 1 values that are NaN or infinite, the first at [5]" in faults
