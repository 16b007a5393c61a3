"""How the workers of one node load side by side: in which order they are ready, and what they read from disk.

    python -m benchmarks.loading_node /scratch/loading > benchmarks/results/loading_node.md

Makes a checkpoint of R1's real shapes but for the number of layers and experts, its tensors in the published
order, by type and name; and of it, by `weights convert --for`, one with a file for each worker. Workers of
a layout load their parts, each in a process of its own, with nothing in the page cache when the first begins:
all at once, or one after the other, stages first. Each figure is the median of several rounds, in which all
ways take turns. The folder is removed.
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
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cast import make
from benchmarks.loading import forget
from r1_cluster.config import LayoutConfig
from r1_cluster.engine.parts import load_parts, part_tensors, worker_tensors
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.planning.layout import build_layout
from r1_cluster.weights.checkpoint import Checkpoint
from r1_cluster.weights.per_worker import convert_for_workers

LAYOUT = LayoutConfig(kind="disaggregated", stages=2, expert_shards=2, redundant_experts=1)
ALONE = ["experts-0"]
COPIES = ["experts-0", "experts-0-copy-1"]


class Loaded(NamedTuple):
    """A worker: seconds from when the first was told to load until it had, and the bytes of its tensors, and
    those that the kernel brought from disk for it."""

    seconds: float
    num_bytes: int
    from_disk: int


def disk_bytes() -> int:
    """What the kernel has brought from disks for this process."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("read_bytes:") + 1])


def load_when_told(folder: Path, name: str) -> None:
    """A worker's process: waits for a line, loads, and says when it had, and how much it read."""
    config = load_config(folder)
    worker = next(worker for worker in build_layout(LAYOUT, config).workers if worker.name == name)
    shard = Shard(torch.device("cpu"), torch.bfloat16, deterministic=False)
    print("here", flush=True)
    sys.stdin.readline()
    before = disk_bytes()
    with Checkpoint(folder, tensor_table(config), config.fp8_block) as checkpoint:
        checkpoint.expect(part_tensors(config, worker))
        load_parts(config, Loader(checkpoint, shard), worker)
        print(time.monotonic(), checkpoint.num_read, disk_bytes() - before, flush=True)


def load(folder: Path, names: list[str], *, in_turn: bool = False) -> dict[str, Loaded]:
    """The workers called `names`, at once or one after the other, from a cold cache."""
    command = [sys.executable, "-m", "benchmarks.loading_node", str(folder), "--worker"]
    pipe = subprocess.PIPE
    with ExitStack() as stack:
        workers = [
            stack.enter_context(subprocess.Popen([*command, name], text=True, stdin=pipe, stdout=pipe))
            for name in names
        ]
        for worker in workers:
            _answer(worker)
        forget(folder)
        began, answers = time.monotonic(), []
        if in_turn:
            for worker in workers:
                _tell(worker)
                answers.append(_answer(worker))
        else:
            for worker in workers:
                _tell(worker)
            answers = [_answer(worker) for worker in workers]
    found = {}
    for name, answer in zip(names, answers):
        ready, num_bytes, from_disk = answer.split()
        found[name] = Loaded(float(ready) - began, int(num_bytes), int(from_disk))
    return found


def _tell(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def _answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    if not (line := worker.stdout.readline()):
        raise SystemExit(f"{worker.args} ended")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.worker is not None:
        load_when_told(folder, arguments.worker)
        return
    published, own = folder / "published", folder / "own"
    try:
        make(published, 2, arguments.experts)
        config = load_config(published)
        layout = build_layout(LAYOUT, config)
        parts = worker_tensors(config, layout)
        table = tensor_table(config)
        convert_for_workers(published, own, table, parts, fp8_block=config.fp8_block, int_format=None)
        every = [*parts]
        ways: dict[str, Callable[[], dict[str, Loaded]]] = {
            "one shard alone, published files": lambda: load(published, ALONE),
            "one shard alone, its own file": lambda: load(own, ALONE),
            "a shard and its copy, published files": lambda: load(published, COPIES),
            "all workers at once, published files": lambda: load(published, every),
            "all workers at once, their own files": lambda: load(own, every),
            "one after the other, published files": lambda: load(published, every, in_turn=True),
            "one after the other, their own files": lambda: load(own, every, in_turn=True),
        }
        rounds: dict[str, list[dict[str, Loaded]]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way, measure in ways.items():
                rounds[way].append(measure())
                print(way, rounds[way][-1], file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    print("# Loading, several workers on one node\n")
    print(
        f"`python -m benchmarks.loading_node FOLDER --experts {arguments.experts}`, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}: medians of {arguments.rounds} "
        f"rounds; workers: {', '.join(every)}.\n"
    )
    print("| way | first worker ready, s | all ready, s | tensors, GB | from disk, GB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, found in rounds.items():
        first = statistics.median(next(iter(each.values())).seconds for each in found)
        last = statistics.median(max(one.seconds for one in each.values()) for each in found)
        read = sum(one.num_bytes for one in found[0].values()) / 1e9
        disk = statistics.median(sum(one.from_disk for one in each.values()) for each in found) / 1e9
        print(f"| {way} | {first:.1f} | {last:.1f} | {read:.2f} | {disk:.2f} |")


if __name__ == "__main__":
    main()
