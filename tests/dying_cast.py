"""Casts, conversions and quantizations that are killed, each in a process of its own, forked from one that has imported torch and runs no threads.

As a program: reads one JSON line for each cast, and answers with the exit code as subprocess has it.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from r1_cluster.cli.quantize import FORMATS
from r1_cluster.config import LayoutConfig
from r1_cluster.engine.parts import worker_tensors
from r1_cluster.models.deepseek_names import inference_name
from r1_cluster.models.family import load_config, mtp_table, tensor_table
from r1_cluster.planning.layout import build_layout
from r1_cluster.weights.cast import cast
from r1_cluster.weights.convert import convert
from r1_cluster.weights.per_worker import convert_for_workers
from r1_cluster.weights.quantize import quantize_checkpoint
from r1_cluster.weights.rewrite import RewriteError

# What a cast does to the disk; a kill may come before each call, which is after the one before.
CALLS = ("open", "pwrite", "posix_fallocate", "fsync", "rename", "unlink", "mkdir")
NO_ROOM = 7


def run(source, target, to="bf16", ranks=None, layout=None, **options):
    """A cast to `to`, or a quantization to it; or, for a number of ranks or a layout, a conversion."""
    config = load_config(source)
    options["fp8_block"] = config.fp8_block
    source, target, table = Path(source), Path(target), tensor_table(config)
    if ranks is not None:
        return convert(source, target, table, ranks, rename=inference_name, **options)
    options["module"] = mtp_table(config)
    if layout is not None:
        workers = worker_tensors(config, build_layout(LayoutConfig(**layout), config))
        options["int_format"] = config.int_format
        return convert_for_workers(source, target, table, workers, **options)
    if to in FORMATS:
        return quantize_checkpoint(source, target, table, FORMATS[to], **options)[0]
    return cast(source, target, to, table, **options)


class DyingCasts:
    """The other side of this file's program."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )

    def cast(self, source, target, **how):
        """`at`: killed at this one of its `calls`; `largest`: no file may grow beyond; `to`, `ranks`, `layout`:
        what it is, see `run`. → its exit code"""
        self._server.stdin.write(json.dumps({"source": str(source), "target": str(target), **how}) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self):
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


def _cast(source, target, at=0, calls=CALLS, largest=None, **what):
    count = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in calls:
        setattr(os, name, counted(getattr(os, name)))
    if largest is not None:  # the kernel refuses what is more, as for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        run(source, target, **what)
    except RewriteError as error:
        words = (
            "there is no room left for",
            "what was finished is kept: make room, and the same command goes on",
        )
        return NO_ROOM if all(part in str(error) for part in words) else 1
    return 0


def main():
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _cast(**json.loads(line))
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
