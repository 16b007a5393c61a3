"""A folder with some of a checkpoint's files: whoever needs no others loads from it, everybody else is told."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import (
    FAMILY,
    fit_for,
    write_checkpoint,
    write_stored,
)

from r1_cluster.config import LayoutConfig
from r1_cluster.engine.boot import WorkerBoot
from r1_cluster.engine.parts import load_parts, worker_tensors
from r1_cluster.engine.worker import Worker
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.planning.layout import build_layout
from r1_cluster.weights.checkpoint import Checkpoint, CheckpointError, files_of, tensors_here, weight_map
from r1_cluster.weights.headers import INDEX
from r1_cluster.weights.tensors import INT4, INT8, listed_name

DENSE = {"kind": "disaggregated", "stages": 2}
SHARDS = DENSE | {"expert_shards": 3}


def spread(folder):
    """Rewrites a checkpoint with every stored tensor in a file of its own."""
    (single,) = folder.glob("*.safetensors")
    tensors = load_file(single)
    single.unlink()
    files = {name: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors, 1)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def part_of(folder, target, files):
    """A folder with what a download of these files leaves."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors" or path.name in files:
            shutil.copy(path, target)
    return target


class Files(Checkpoint):
    """A checkpoint that notes from which files it reads."""

    def _read(self, name, entry, *where):
        self.read = {*getattr(self, "read", ()), entry.file}
        return super()._read(name, entry, *where)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float", "fp8", INT8, INT4], ids=str)
@pytest.mark.parametrize("model", FAMILY)
def test_a_worker_reads_from_all_of_its_files_and_no_other(tmp_path, model, stored):
    folder = write_stored(tmp_path, fit_for(stored, model), stored)
    spread(folder)
    config = load_config(folder)
    table = tensor_table(config)
    layout = build_layout(LayoutConfig(**(SHARDS if model == "deepseek" else DENSE)), config)
    told = worker_tensors(config, layout)
    for worker in layout.workers:
        needed = {*told[worker.name]}
        files = files_of(weight_map(folder), needed)
        part = part_of(folder, tmp_path / worker.name, files)
        with Files(part, table, config.fp8_block, config.int_format, needed=needed) as checkpoint:
            assert checkpoint.files == files
            loader = Loader(checkpoint, Shard(torch.device("cpu"), torch.float32, True))
            load_parts(config, loader, worker)
        assert checkpoint.read == files
        assert tensors_here(part) == {
            listed_name(name) for name, file in weight_map(folder).items() if file in files
        }
        with pytest.raises(CheckpointError, match=f"is listed in {INDEX}, but not there; download"):
            Checkpoint(part, table, config.fp8_block, config.int_format)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread") / "model"
    write_checkpoint(folder, FAMILY["deepseek"])
    spread(folder)
    return folder


def needed_by(folder, *names):
    config = load_config(folder)
    told = worker_tensors(config, build_layout(LayoutConfig(**SHARDS), config))
    return {tensor for name in names for tensor in told[name]}


def worker(folder, name):
    layout = build_layout(LayoutConfig(**SHARDS), load_config(folder))
    boot = WorkerBoot(
        name=name,
        incarnation="first",
        workers=layout.workers,
        checkpoint=str(folder),
        dtype="float32",
        device="cpu",
        deterministic=True,
        threads=1,
        page_size=8,
        num_pages=4,
        lease_s=5.0,
        step_timeout_s=2.0,
        host="127.0.0.1",
        link_ports=(21000, 23999),
        secret=b"a secret for tests only",
    )
    return Worker(boot)


@pytest.mark.slow
def test_a_worker_starts_on_its_own_files(checkpoint, tmp_path):
    for name in ("stage-1", "router-1", "experts-2"):
        files = files_of(weight_map(checkpoint), needed_by(checkpoint, name))
        whole, part = worker(checkpoint, name), worker(part_of(checkpoint, tmp_path / name, files), name)
        assert part.loaded
        assert part.read_bytes == whole.read_bytes > 0
        whole.close()
        part.close()


@pytest.mark.slow
def test_a_worker_is_told_all_files_that_it_lacks(checkpoint, tmp_path):
    files = files_of(weight_map(checkpoint), needed_by(checkpoint, "stage-1"))
    lost = sorted(files)[:2]
    part = part_of(checkpoint, tmp_path / "part", files - {*lost})
    with pytest.raises(CheckpointError) as caught:
        worker(part, "stage-1")
    assert caught.value.faults == [
        f"{f} is listed in {INDEX}, but not there; download {f} again" for f in lost
    ]
    with pytest.raises(CheckpointError, match=f"is listed in {INDEX}, but not there"):
        worker(part, "experts-0")


def test_files_that_are_opened_are_checked_as_ever(checkpoint, tmp_path):
    config = load_config(checkpoint)
    needed = {"model.norm.weight", "lm_head.weight"}
    norm, head = (weight_map(checkpoint)[name] for name in sorted(needed, reverse=True))
    part = part_of(checkpoint, tmp_path / "part", {norm, head})
    assert tensors_here(part) == needed
    assert tensors_here(checkpoint) is None
    index = weight_map(part) | {"lm_head.weight_scale_inv": "missing.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    for file in (norm, head):
        shutil.copy(part / file, tmp_path)
    assert tensors_here(tmp_path) == {"model.norm.weight"}
    Checkpoint(part, tensor_table(config), needed=needed).close()
    (part / head).write_bytes((part / head).read_bytes()[:-1])
    save_file({"model.norm.weight": torch.ones(3), "surprise": torch.ones(1)}, part / norm)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(part, tensor_table(config), needed=needed)
    words = (
        "it is cut off or broken",
        "holds tensor surprise, which",
        "has shape [3]",
        "surprise has no place",
    )
    for word in words:
        assert sum(word in fault for fault in caught.value.faults) == 1
    index = json.loads((part / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (part / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight is missing, expected with shape"):
        Checkpoint(part, tensor_table(config), needed={"lm_head.weight"})
