"""How fast `r1-cluster weights cast` is, and how much memory it takes.

    python -m benchmarks.cast /scratch/cast > benchmarks/results/cast.md

Makes a checkpoint of R1's real shapes but for the number of layers and experts (its embedding and head, of
129280×7168, are the largest tensors that any of the family has), casts it to BF16 and back, and removes it.
Peak memory is the command's whole process, as the kernel has counted it. Beside it: a plain copy of the same
files, made durable as well, and the cast as DeepSeek's fp8_cast_bf16.py goes about it, whole files at a time,
its kernel in plain torch; what both wrote is held against each other, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from r1_cluster.models.family import parse_config, tensor_table
from r1_cluster.models.presets import presets
from r1_cluster.weights.headers import INDEX
from r1_cluster.weights.inventory import FP8, Stored, as_published
from r1_cluster.weights.stream import lay_out, new_file, write_whole

_PIECE = 16 << 20


def make(folder: Path, layers: int, experts: int) -> None:
    """A checkpoint of random but finite numbers, a file for each 4 GB or so."""
    values = dict(presets()["DeepSeek-R1"]) | {
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    }
    config = parse_config(values)
    shards: list[list[Stored]] = [[]]
    for tensor in as_published(tensor_table(config), config.dtype, config.fp8_block):
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + tensor.num_bytes > 4 << 30:
            shards.append([])
        shards[-1].append(tensor)
    folder.mkdir(parents=True)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        planned = lay_out((tensor, tensor.name) for tensor in sorted(shard))  # by name, as published
        with new_file(folder / name, planned) as write:
            for placed in planned.tensors.values():
                piece = _numbers(placed.stored.dtype)
                for start in range(0, placed.stored.num_bytes, len(piece)):
                    write(piece[: placed.stored.num_bytes - start], placed.offset + start)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    write_whole(
        folder / INDEX,
        json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
    )
    write_whole(folder / "config.json", json.dumps(values).encode())


def _numbers(dtype: str) -> memoryview:
    rng = np.random.default_rng(0)
    if dtype == FP8:
        numbers = (
            rng.integers(0, 0x7F, _PIECE, dtype=np.uint8) | rng.integers(0, 2, _PIECE, dtype=np.uint8) << 7
        )
        return memoryview(numbers)
    floats = rng.random(_PIECE // 4, dtype=np.float32) * 0.02 + 1e-5
    return memoryview(floats if dtype == "F32" else (floats.view(np.uint32) >> 16).astype(np.uint16)).cast(
        "B"
    )


def weigh(folder: Path) -> int:
    """Bytes of its weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def whole_files(source: Path, target: Path) -> None:
    """FP8 to BF16 as DeepSeek-V3 inference/fp8_cast_bf16.py has it: a file is loaded whole, and kept while
    the next is read, for scales may lie in another one; its kernel, weight_dequant, in plain torch."""
    target.mkdir()
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    loaded: dict[str, dict[str, torch.Tensor]] = {}

    def file(name: str) -> dict[str, torch.Tensor]:
        if name not in loaded:
            loaded[name] = load_file(source / name)
        return loaded[name]

    for name in sorted(set(weight_map.values())):
        found = {}
        for tensor, weight in file(name).items():
            if tensor.endswith("_scale_inv"):
                continue
            found[tensor] = weight
            if weight.element_size() == 1:
                scale = file(weight_map[f"{tensor}_scale_inv"])[f"{tensor}_scale_inv"]
                rows, columns = weight.shape
                spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
                found[tensor] = (weight.float() * spread).bfloat16()
        save_file(found, target / name)
        sync(target / name)
        while len(loaded) > 2:
            del loaded[next(iter(loaded))]


def same_bits(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit, in files of the same names."""
    for path in one.glob("*.safetensors"):
        with safe_open(path, "pt") as a, safe_open(other / path.name, "pt") as b:
            names = set(a.keys())
            if names != set(b.keys()):
                return False
            pairs = ((a.get_tensor(name), b.get_tensor(name)) for name in names)
            if not all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs):
                return False
    return True


def run(*arguments: str | Path) -> tuple[float, int]:
    """Runs a module with its arguments: seconds, and the peak of its memory in bytes."""
    started = time.monotonic()
    command = [sys.executable, "-m", *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return time.monotonic() - started, usage.ru_maxrss << 10


def copy(source: Path, target: Path) -> float:
    """Copies files as `cp` would, and waits until they are on the disk."""
    started = time.monotonic()
    target.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        sync(target / path.name)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="made anew, needs some 20 GB, and is removed at the end")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument(
        "--whole-files", type=Path, metavar="SRC", help="only cast SRC to FOLDER, file by file"
    )
    options = parser.parse_args()
    folder: Path = options.folder
    if options.whole_files is not None:
        whole_files(options.whole_files, folder)
        return
    folder.mkdir(parents=True)
    weights = ("r1_cluster.cli.main", "weights")
    load = os.getloadavg()[0]
    try:
        make(folder / "fp8", options.layers, options.experts)
        source = weigh(folder / "fp8")
        largest = max(path.stat().st_size for path in (folder / "fp8").glob("*.safetensors"))
        rows = [("a plain copy", source, source, copy(folder / "fp8", folder / "copy"), None)]
        shutil.rmtree(folder / "copy")
        rows.append(("verify", source, 0, *run(*weights, "verify", folder / "fp8")))
        seconds, peak = run(*weights, "cast", folder / "fp8", folder / "bf16")
        middle = weigh(folder / "bf16")
        rows.append(("FP8 → BF16", source, middle, seconds, peak))
        whole = run("benchmarks.cast", folder / "whole", "--whole-files", folder / "fp8")
        rows.append(("the same, whole files in plain torch", source, middle, *whole))
        shutil.rmtree(folder / "fp8")
        seconds, peak = run(*weights, "cast", folder / "bf16", folder / "again")
        rows.append(("BF16 → FP8", middle, weigh(folder / "again"), seconds, peak))
        shutil.rmtree(folder / "again")
        seconds, peak = run(*weights, "quantize", folder / "bf16", folder / "int4", "--to", "int4")
        rows.append(("BF16 → INT4", middle, weigh(folder / "int4"), seconds, peak))
        # Last: what this process holds while it starts another, Linux counts as that one's peak.
        if not same_bits(folder / "bf16", folder / "whole"):
            raise SystemExit("the cast and the published formula differ")
    finally:
        shutil.rmtree(folder)
    print("# What a cast takes\n")
    print(
        f"`python -m benchmarks.cast FOLDER --layers {options.layers} --experts {options.experts}` on ",
        end="",
    )
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{os.cpu_count()} cores ({platform.machine()}), torch threads: {threads}.")
    print(
        "R1's shapes; the largest tensor, 129280×7168, has 1.85 GB in BF16, the largest file "
        f"{largest / 1e9:.1f} GB. FP8 → BF16 gave the same bits both ways."
    )
    if load > 0.5:
        print(
            f"\n**Other work ran beside it** (load {load:.1f} when it began): these times are no rates to "
            "compare. Peak memory does not depend on that."
        )
    print()
    print("| what | read | written | time | read and written | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for what, read, written, seconds, peak in rows:
        memory = "" if peak is None else f"{peak / 2**20:.0f} MiB"
        rate = f"{(read + written) / seconds / 1e6:.0f} MB/s"
        print(
            f"| {what} | {read / 1e9:.2f} GB | {written / 1e9:.2f} GB | {seconds:.1f} s | {rate} | {memory} |"
        )


if __name__ == "__main__":
    main()
