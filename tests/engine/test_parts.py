"""Which tensors a worker loads, and in which order: as told from config.json alone, and as it does."""

import os
from types import ModuleType

import pytest
import torch
from small_model import (
    FAMILY,
    fit_for,
    write_stored,
)

from kernels import cpu
from kernels.ops import BlockScaled
from r1_cluster.config import LayoutConfig
from r1_cluster.engine.boot import WorkerBoot
from r1_cluster.engine.parts import load_parts, weight_bytes, worker_tensors
from r1_cluster.engine.worker import Worker
from r1_cluster.models.family import EMBEDDING, load_config, parse_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.presets import presets
from r1_cluster.planning.layout import build_layout
from r1_cluster.weights.checkpoint import Checkpoint
from r1_cluster.weights.reading import FilesReader
from r1_cluster.weights.tensors import INT4, INT8

LAYOUTS = {
    "colocated": {"kind": "colocated"},
    "stages": {"kind": "disaggregated", "stages": 2},
    "shards": {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "redundant_experts": 1},
}
CASES = [
    (model, layout) for model in FAMILY for layout in LAYOUTS if model == "deepseek" or layout != "shards"
]


def laid_out(layout, config):
    return build_layout(LayoutConfig(**LAYOUTS[layout]), config)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_tensor_has_a_worker_that_loads_it(model, layout):
    config = parse_config(FAMILY[model])
    found = worker_tensors(config, laid_out(layout, config))
    assert [*found] == [worker.name for worker in laid_out(layout, config).workers]
    assert {name for names in found.values() for name in names} == {
        spec.name for spec in tensor_table(config)
    }
    owners = {}
    for worker, names in found.items():
        assert len(set(names)) == len(names)
        for name in names:
            owners.setdefault(name, []).append(worker)
    shared = {name: workers for name, workers in owners.items() if len(workers) > 1}
    if layout == "shards":
        assert shared == {
            name: [f"experts-{i}", f"experts-{i}-copy-1"] for i in range(3) for name in found[f"experts-{i}"]
        }
    elif layout == "stages" and model == "qwen2":
        assert shared == {EMBEDDING: ["stage-0", "stage-1"]}
    else:
        assert not shared


class Noting(Checkpoint):
    """A checkpoint that notes what it is asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = {}

    def get(self, name, *arguments):
        self.asked[name] = None
        return super().get(name, *arguments)

    def get_scaled(self, name, *arguments):
        self.asked[name] = None
        return super().get_scaled(name, *arguments)

    def get_int(self, name, *arguments):
        self.asked[name] = None
        return super().get_int(name, *arguments)


@pytest.mark.parametrize("stored", ["float", "fp8", INT8, INT4], ids=str)
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_worker_asks_for_what_was_told_in_that_order(tmp_path, model, layout, stored):
    folder = write_stored(tmp_path, fit_for(stored, model), stored)
    config = load_config(folder)
    told = worker_tensors(config, laid_out(layout, config))
    for worker in laid_out(layout, config).workers:
        with Noting(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
            loader = Loader(checkpoint, Shard(torch.device("cpu"), torch.float32, True))
            load_parts(config, loader, worker)
        assert [*checkpoint.asked] == told[worker.name]


@pytest.mark.parametrize("form", ["fp8", INT8], ids=str)
def test_the_kernel_is_told_ahead_of_all_that_a_worker_reads_and_of_nothing_else(tmp_path, monkeypatch, form):
    folder = write_stored(tmp_path, fit_for(form, "deepseek"), form)
    config = load_config(folder)
    told, read, read_into = [], [], FilesReader.read_into

    def noting(self, file, offset, into):
        read.append((offset, len(into)))
        read_into(self, file, offset, into)

    monkeypatch.setattr(FilesReader, "read_into", noting)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, size, advice: told.append((offset, size)))
    layout = laid_out("shards", config)
    for name in ("stage-1", "router-1", "experts-1-copy-1"):
        told.clear(), read.clear()
        boot = WorkerBoot(
            name=name,
            incarnation="first",
            workers=layout.workers,
            checkpoint=str(folder),
            dtype="float32",
            device="cpu",
            deterministic=True,
            threads=1,
            page_size=16,
            num_pages=2,
            lease_s=1.0,
            step_timeout_s=1.0,
            host="127.0.0.1",
            link_ports=(21000, 23999),
            secret=b"a secret for tests only",
        )
        worker = Worker(boot)
        worker.close()
        assert sorted(told) == sorted(read)
        assert sum(size for _, size in read) == worker.read_bytes > 0


@pytest.mark.slow
def test_of_r1_itself_without_a_checkpoint():
    config = parse_config(presets()["DeepSeek-R1"])
    layout = {"kind": "disaggregated", "stages": 2, "expert_shards": 16}
    found = worker_tensors(config, build_layout(LayoutConfig(**layout), config))
    assert [len(found[name]) for name in ("stage-0", "router-0", "experts-0")] == [
        1 + 30 * 9 + 3 * 3,
        27 * 5,
        58 * 16 * 3,
    ]


RANKED = [
    {},
    {"tensor_parallel": 2},
    {"tensor_parallel": 4},
    {"kind": "disaggregated", "stages": 2, "tensor_parallel": 2},
]
# Heads of which two ranks have whole blocks of FP8 and groups of INT4, and four ranks parts of those.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def storages(thing, seen):
    """{address: bytes} of what tensors below an object keep."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if id(thing) in seen or isinstance(thing, ModuleType):
        return {}
    seen.add(id(thing))
    below = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    found = {}
    for part in (*below, *getattr(thing, "__dict__", {}).values()):
        found |= storages(part, seen)
    return found


@pytest.mark.parametrize("stored", ["float", "fp8", INT8, INT4], ids=str)
@pytest.mark.parametrize("model", FAMILY)
def test_weights_take_what_was_told_without_them(tmp_path, monkeypatch, model, stored):
    """As on a GPU, where FP8 keeps a scale for each block."""
    monkeypatch.setattr(cpu, "block_scaled", lambda values, scale, *_: BlockScaled(values, scale.clone()))
    folder = write_stored(tmp_path, fit_for(stored, model) | HEADS, stored)
    config, table = load_config(folder), tensor_table(load_config(folder))
    layouts = [build_layout(LayoutConfig(**layout), config) for layout in RANKED]
    for worker in (worker for layout in layouts for worker in layout.workers):
        shard = Shard(torch.device("cpu"), torch.bfloat16, False, rank=worker.rank, ranks=worker.ranks)
        with Checkpoint(folder, table, config.fp8_block, config.int_format) as checkpoint:
            parts = load_parts(config, Loader.of(checkpoint, shard, table), worker)
        assert weight_bytes(config, worker) == sum(storages(parts, set()).values())
