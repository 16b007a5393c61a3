"""How fast a worker loads, beside what the disk gives.

    python -m benchmarks.loading /scratch/loading > benchmarks/results/loading.md

Makes a checkpoint of R1's real shapes but for the number of layers and experts, and reads it, each time with
nothing of it in the page cache: by dd, by our reader tensor by tensor, into the modules of a worker that has
all roles (FP8 stays FP8), and by others' readers: safetensors, and fastsafetensors where it can be imported.
Each figure is the median of several rounds, in which all take turns. The folder is removed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cast import make
from r1_cluster.config import LayoutConfig
from r1_cluster.engine.parts import load_parts, part_tensors
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.planning.layout import build_layout
from r1_cluster.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")


def with_dd(folder: Path) -> None:
    """Every file, 16 MiB at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=16M", "status=none"], check=True)


def with_reader(folder: Path) -> None:
    """Every tensor as it is stored, in the order of the table, none of them kept."""
    config = load_config(folder)
    table = tensor_table(config)
    with Checkpoint(folder, table, config.fp8_block) as checkpoint:
        for spec in table:
            if checkpoint.is_fp8(spec.name):
                checkpoint.get_scaled(spec.name)
            else:
                checkpoint.get(spec.name, torch.bfloat16, CPU)


def into_modules(folder: Path) -> None:
    """As a worker does it that is stage, router and experts."""
    config = load_config(folder)
    with Checkpoint(folder, tensor_table(config), config.fp8_block) as checkpoint:
        (worker,) = build_layout(LayoutConfig(), config).workers
        checkpoint.expect(part_tensors(config, worker))
        load_parts(config, Loader(checkpoint, Shard(CPU, torch.bfloat16, deterministic=False)), worker)


def with_safetensors(folder: Path) -> None:
    """Every tensor, each copied out of the map."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 — it is no mapping
                opened.get_tensor(name).clone()


def with_fastsafetensors(folder: Path) -> None:
    """Every tensor of a file after the other."""
    from fastsafetensors import fastsafe_open

    for file in sorted(folder.glob("*.safetensors")):
        with fastsafe_open([str(file)], device="cpu", nogds=True) as opened:
            for name in opened.keys():  # noqa: SIM118
                opened.get_tensor(name)


WAYS: dict[str, Callable[[Path], None]] = {
    "dd": with_dd,
    "our reader": with_reader,
    "a worker's modules": into_modules,
    "safetensors": with_safetensors,
    "fastsafetensors": with_fastsafetensors,
}


def forget(folder: Path) -> None:
    """Drops the files from the page cache; what is not on disk yet stays, so it is brought there first."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, way: str) -> float | None:
    """Seconds in a process of its own, from when it has imported all; None where it cannot run."""
    forget(folder)
    command = [sys.executable, "-m", "benchmarks.loading", str(folder), "--one", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{way}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        began = time.monotonic()
        WAYS[arguments.one](arguments.folder)
        print(time.monotonic() - began)
        return
    make(arguments.folder, arguments.layers, arguments.experts)
    try:
        num_bytes = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
        took: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for way in WAYS:
                if (seconds := measure(arguments.folder, way)) is not None:
                    took.setdefault(way, []).append(seconds)
    finally:
        shutil.rmtree(arguments.folder)
    medians = {way: statistics.median(seconds) for way, seconds in took.items()}
    print("# Loading\n")
    print(
        f"`python -m benchmarks.loading FOLDER --layers {arguments.layers} --experts {arguments.experts}`, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, "
        f"Python {platform.python_version()}: {num_bytes / 1e9:.1f} GB of R1's shapes in FP8, cold cache, "
        f"medians of {arguments.rounds} rounds.\n"
    )
    print("| way | s | GB/s | of dd |\n| --- | ---: | ---: | ---: |")
    for way, seconds in medians.items():
        print(f"| {way} | {seconds:.1f} | {num_bytes / 1e9 / seconds:.2f} | {medians['dd'] / seconds:.0%} |")


if __name__ == "__main__":
    main()
