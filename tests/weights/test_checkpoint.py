"""Checkpoints: what is read, what is refused, and what the refusal says."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import config_values, random_tensors, write_checkpoint

from kernels.int_weight import quantize_int
from r1_cluster.models.family import parse_config, tensor_table
from r1_cluster.weights.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointError
from r1_cluster.weights.integers import quantization_config, to_words
from r1_cluster.weights.tensors import INT4, layer_of

CPU = torch.device("cpu")
CONFIG = parse_config(config_values())
MTP = "model.layers.3.eh_proj.weight"


def write_shards(folder, tensors=None):
    """Three files with an index."""
    tensors = random_tensors(CONFIG, 0) if tensors is None else tensors
    files = {}
    for i, name in enumerate(tensors):
        files.setdefault(f"model-{i % 3}.safetensors", {})[name] = tensors[name]
    for file, part in files.items():
        save_file(part, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors, weight_map


def faults(folder, config=CONFIG):
    with pytest.raises(CheckpointError) as error:
        Checkpoint(
            folder, *(() if config is None else (tensor_table(config), config.fp8_block, config.int_format))
        )
    assert all(fault in str(error.value) for fault in error.value.faults[:20])
    return error.value.faults


def test_tensors_come_as_they_were_written(tmp_path):
    tensors, _ = write_shards(tmp_path)
    with Checkpoint(tmp_path, tensor_table(CONFIG)) as checkpoint:
        for name, tensor in tensors.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(checkpoint.get(name, torch.float32, CPU), tensor)
        name = "model.layers.0.self_attn.kv_b_proj.weight"
        part = checkpoint.get(name, torch.bfloat16, CPU, (slice(3, 9), slice(2, None)))
        assert torch.equal(part, tensors[name][3:9, 2:].bfloat16())
        assert checkpoint.missing([name, "absent"]) == ["absent"]
        with pytest.raises(CheckpointError, match="tensor absent is missing"):
            checkpoint.get("absent", torch.float32, CPU)


def test_the_prediction_module_is_known_and_not_opened(tmp_path):
    write_shards(tmp_path, random_tensors(CONFIG, 0) | {MTP: torch.zeros(48, 96)})
    with Checkpoint(tmp_path, tensor_table(CONFIG)) as checkpoint:
        assert not checkpoint.missing([MTP])
    assert layer_of(MTP) == 3
    assert layer_of("lm_head.weight") is None


def test_all_faults_are_in_one_message(tmp_path):
    tensors, weight_map = write_shards(tmp_path)
    names = list(tensors)
    (tmp_path / "model-2.safetensors").unlink()
    listed = {name: file for name, file in weight_map.items() if name != names[0]} | {
        "ghost": weight_map[names[1]]
    }
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    found = faults(tmp_path)
    assert (
        f"model-2.safetensors is listed in {INDEX}, but not there; download model-2.safetensors again"
        in found
    )
    assert (
        f"model-0.safetensors holds tensor {names[0]}, which {INDEX} does not list; repair the index" in found
    )
    assert any(
        fault.startswith(f"{INDEX} lists tensor ghost in model-1.safetensors, no file") for fault in found
    )
    assert len(found) == 3


def test_shards_that_were_swapped_or_doubled(tmp_path):
    tensors, _ = write_shards(tmp_path)
    names = list(tensors)
    (tmp_path / "model-0.safetensors").write_bytes((tmp_path / "model-1.safetensors").read_bytes())
    found = "\n".join(faults(tmp_path))
    assert f"tensor {names[1]} is in 2 files (model-0.safetensors, model-1.safetensors)" in found
    assert f"{INDEX} lists tensor {names[0]} in model-0.safetensors, no file holds it" in found


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "link.safetensors"])
def test_the_index_may_not_leave_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    _, weight_map = write_shards(folder)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    os.symlink(tmp_path / "x.safetensors", folder / "link.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"a": name}}))
    assert any(f"names the file '{name}', which is outside of" in fault for fault in faults(folder))


def test_links_within_a_hugging_face_cache_are_followed(tmp_path):
    folder = tmp_path / "snapshots" / "abc"
    config = write_checkpoint(folder, config_values())
    (tmp_path / "blobs").mkdir()
    (folder / SINGLE).rename(tmp_path / "blobs" / "123")
    os.symlink("../../blobs/123", folder / SINGLE)
    Checkpoint(folder, tensor_table(config), config.fp8_block).close()


def damaged(header=None, length=None, data=b"\0" * 8):
    body = json.dumps(header).encode() if isinstance(header, dict) else header or b"{}"
    return struct.pack("<Q", len(body) if length is None else length) + body + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is cut off: its header should take 0 of its 0 bytes"),
        (b"\1\0", "is cut off"),
        (damaged(length=2**63), "is cut off: its header should take 9223372036854775808"),
        (damaged(b"{nonsense"), "has no readable header"),
        (damaged(b"[" * 50000), "has no readable header"),
        (damaged(b"[]"), "has a malformed header"),
        (damaged({"a": {"dtype": "F32"}}), "has a malformed header"),
        (damaged({"a": ENTRY | {"dtype": "F99"}}), "tensor a is of dtype F99, which is unknown"),
        (damaged({"a": ENTRY | {"shape": [3]}}), "tensor a (F32 [3]) needs 12 bytes, its header gives it 8"),
        (damaged({"a": ENTRY | {"shape": [-2]}}), "tensor a (F32 [-2])"),
        (damaged({"a": ENTRY | {"data_offsets": [8, 0]}}), "its header gives it -8"),
        (damaged({"a": ENTRY}, data=b"\0" * 7), "it is cut off or broken"),
        (damaged({"a": ENTRY}, data=b"\0" * 9), "it is cut off or broken"),
        (damaged({"a": ENTRY, "b": ENTRY}), "tensors a and b overlap"),
        (
            damaged({"a": ENTRY, "b": ENTRY | {"data_offsets": [16, 24]}}, data=b"\0" * 24),
            "8 bytes between tensors a and b belong to none",
        ),
    ],
)
def test_damaged_files(tmp_path, content, words):
    (tmp_path / SINGLE).write_bytes(content)
    (fault,) = faults(tmp_path, None)
    assert words in fault
    assert f"download {SINGLE} again" in fault


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000]
)
def test_damaged_indexes(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    (fault,) = faults(tmp_path, None)
    assert INDEX in fault


def test_nothing_there(tmp_path):
    assert "neither" in faults(tmp_path)[0]
    assert "no such folder" in faults(tmp_path / "absent")[0]


def test_tensors_are_held_against_the_config(tmp_path):
    tensors = random_tensors(CONFIG, 0)
    norm = "model.norm.weight"
    tensors[norm] = torch.ones(47)
    tensors["lm_head.weight"] = torch.ones(96, 48, dtype=torch.int32)
    tensors["model.layers.1.surprise"] = torch.ones(1)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / SINGLE)
    found = faults(tmp_path)
    assert "tensor model.embed_tokens.weight is missing, expected with shape [96, 48]" in "\n".join(found)
    assert f"{SINGLE}: tensor {norm} has shape [47], config.json expects [48]" in found
    assert any("lm_head.weight is of dtype I32, expected F32" in fault for fault in found)
    assert any("model.layers.1.surprise has no place" in fault for fault in found)
    assert len(found) == 4


def test_a_file_that_is_replaced_while_it_is_open(tmp_path):
    tensors, _ = write_shards(tmp_path)
    with Checkpoint(tmp_path, tensor_table(CONFIG)) as checkpoint:
        name = next(iter(tensors))
        save_file({name: torch.zeros(2, 2)}, tmp_path / "model-0.safetensors")
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            checkpoint.get(name, torch.float32, CPU)


class TestFp8:
    name = "model.layers.0.mlp.down_proj.weight"

    def write(self, folder, scale):
        generator = torch.Generator().manual_seed(0)
        values = config_values(
            hidden_size=300,
            intermediate_size=200,
            quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
        )
        config = parse_config(values)
        tensors = random_tensors(config, 0)
        tensors[self.name] = torch.randn(300, 200, generator=generator).to(torch.float8_e4m3fn)
        if scale is not None:
            tensors[self.name + "_scale_inv"] = scale
        save_file(tensors, folder / SINGLE)
        return config, tensors[self.name].float()

    def test_blocks_are_scaled(self, tmp_path):
        scale = torch.rand(3, 2) + 0.5
        config, weight = self.write(tmp_path, scale)
        expected = weight * scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
        with Checkpoint(tmp_path, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
            assert torch.equal(checkpoint.get(self.name, torch.float32, CPU), expected)
            for rows, columns in [(slice(130, 290), slice(5, 129)), (slice(0, 1), slice(199, None))]:
                part = checkpoint.get(self.name, torch.float32, CPU, (rows, columns))
                assert torch.equal(part, expected[rows, columns])

    @pytest.mark.parametrize(
        ("scale", "words"),
        [
            (None, "is FP8, but model.layers.0.mlp.down_proj.weight_scale_inv is missing"),
            (torch.ones(2, 2), "is F32 [2, 2], expected one float per 128×128 block, [3, 2]"),
            (torch.ones(3, 2, dtype=torch.int32), "is I32 [3, 2]"),
        ],
    )
    def test_scales_must_fit(self, tmp_path, scale, words):
        config, _ = self.write(tmp_path, scale)
        (fault,) = faults(tmp_path, config)
        assert words in fault

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_scales_must_be_positive_and_finite(self, tmp_path, value):
        scale = torch.ones(3, 2)
        scale[2, 1] = value
        config, _ = self.write(tmp_path, scale)
        with (
            Checkpoint(tmp_path, tensor_table(config), config.fp8_block, config.int_format) as checkpoint,
            pytest.raises(CheckpointError, match="not positive"),
        ):
            checkpoint.get(self.name, torch.float32, CPU)


class TestIntegers:
    name = "model.layers.0.mlp.down_proj.weight"

    def write(self, folder, **changes):
        """INT4 [48, 300] of one weight; a tensor may be replaced by its suffix, or left out by None."""
        quantization = quantization_config(INT4, [])
        config = parse_config(config_values(intermediate_size=300, quantization_config=quantization))
        tensors = random_tensors(config, 0)
        q, scale = quantize_int(tensors.pop(self.name), 4, 128)
        stored = {"packed": to_words(q, 4), "scale": scale, "shape": torch.tensor([48, 300])} | changes
        tensors |= {f"{self.name}_{suffix}": x for suffix, x in stored.items() if x is not None}
        save_file(tensors, folder / SINGLE)
        return config, q * scale.repeat_interleave(128, 1)[:, :300]

    def test_groups_are_scaled(self, tmp_path):
        config, expected = self.write(tmp_path)
        with Checkpoint(tmp_path, tensor_table(config), None, config.int_format) as checkpoint:
            assert checkpoint.shape(self.name) == (48, 300)
            assert (checkpoint.int_bits(self.name), checkpoint.is_fp8(self.name)) == (4, False)
            assert not checkpoint.missing([self.name])
            assert torch.equal(checkpoint.get(self.name, torch.float32, CPU), expected)
            part = checkpoint.get(self.name, torch.float32, CPU, (slice(5, 6), slice(100, 290)))
            assert torch.equal(part, expected[5:6, 100:290])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"packed": None}, "is missing, expected with shape [48, 300]"),
            (
                {"scale": None},
                "is stored in integers, but model.layers.0.mlp.down_proj.weight_scale is missing",
            ),
            ({"shape": None}, "weight_shape is missing"),
            (
                {"packed": torch.zeros(48, 75, dtype=torch.int32)},
                "is I32 [48, 75], expected I32 [48, 38] for 4 bits",
            ),
            ({"packed": torch.zeros(48, 38)}, "is F32 [48, 38], expected I32"),
            ({"scale": torch.ones(48, 2)}, "is F32 [48, 2], expected F32 or F16 or BF16 [48, 3]"),
            ({"scale": torch.ones(48, 3, dtype=torch.int32)}, "is I32 [48, 3]"),
            ({"shape": torch.tensor([48, 300, 1])}, "is I64 [3]"),
        ],
    )
    def test_parts_must_fit(self, tmp_path, changes, words):
        config, _ = self.write(tmp_path, **changes)
        found = faults(tmp_path, config)
        assert any(words in fault for fault in found), found

    def test_parts_that_are_doubled_or_left_over(self, tmp_path):
        config, weight = self.write(tmp_path)
        tensors = load_file(tmp_path / SINGLE)
        save_file(tensors | {self.name: weight}, tmp_path / SINGLE)
        (fault,) = faults(tmp_path, config)
        assert f"tensor {self.name} is there twice" in fault
        del tensors[self.name + "_packed"]
        save_file(tensors | {self.name: weight}, tmp_path / SINGLE)
        found = faults(tmp_path, config)
        assert len(found) == 2
        assert all("has no place in the model" in fault for fault in found)

    def test_a_config_that_says_nothing_of_them(self, tmp_path):
        self.write(tmp_path)
        (fault,) = faults(tmp_path, parse_config(config_values(intermediate_size=300)))
        assert f"tensor {self.name} is stored in integers, and config.json's" in fault

    @pytest.mark.parametrize("shape", [[48, 299], [-48, 300], [2**62, 300]])
    def test_a_shape_that_is_not_the_models(self, tmp_path, shape):
        config, _ = self.write(tmp_path, shape=torch.tensor(shape))
        with (
            Checkpoint(tmp_path, tensor_table(config), None, config.int_format) as checkpoint,
            pytest.raises(CheckpointError, match="which does not fit the rest"),
        ):
            checkpoint.get(self.name, torch.float32, CPU)

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_scales_must_be_positive_and_finite(self, tmp_path, value):
        scale = torch.ones(48, 3)
        scale[2, 1] = value
        config, _ = self.write(tmp_path, scale=scale)
        with (
            Checkpoint(tmp_path, tensor_table(config), None, config.int_format) as checkpoint,
            pytest.raises(CheckpointError, match="weight_scale has scales that are not positive"),
        ):
            checkpoint.get(self.name, torch.float32, CPU)
