"""Casts a checkpoint from FP8 blocks to BF16 and back.

config.json and the index come last, so that a folder whose cast was killed never looks like a checkpoint.
What is done is kept in a file of state: a second run goes on from there if neither the source nor what is
asked for has changed, else it starts over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from r1_cluster.weights.blocks import BLOCK, dequantize, quantize
from r1_cluster.weights.checkpoint import Checkpoint, CheckpointError
from r1_cluster.weights.headers import INDEX, Entry
from r1_cluster.weights.inventory import FP8, Stored, blocks, may_be_fp8
from r1_cluster.weights.stream import (
    CHUNK_ITEMS,
    PARTIAL,
    Placed,
    Planned,
    Reader,
    Write,
    copy_whole,
    lay_out,
    locked,
    new_file,
    raw,
    sync_folder,
    write_whole,
)
from r1_cluster.weights.tensors import SCALE_SUFFIX, TensorSpec

To = Literal["bf16", "fp8"]
Progress = Callable[[int, int], None]
"""Is told how many bytes are written, and of how many."""

STATE = ".cast.json"
CONFIG = "config.json"
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
"""config.json's quantization_config in DeepSeek's FP8 checkpoints."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", PARTIAL)


class CastError(ValueError):
    """The cast cannot begin or go on; the message says what to do. What was finished is kept."""


@dataclass(frozen=True)
class Outcome:
    """How many files of weights there are now, how many of them an earlier run had finished, and the bytes
    of all."""

    files: int
    kept: int
    num_bytes: int


def cast(
    source: Path,
    target: Path,
    to: To,
    table: Iterable[TensorSpec],
    *,
    fp8_block: tuple[int, int] | None,
    progress: Progress | None = None,
) -> Outcome:
    """Casts the checkpoint in `source`, whose tensors `table` lists, to one in `target`.

    To "bf16" all that is FP8 is multiplied by its scales, one per `fp8_block`; to "fp8" the matrices that
    DeepSeek stores so are quantized; the rest stays as it is. Goes on where an earlier run has ended. Raises
    CheckpointError for what is wrong with the source, CastError for the target and a full disk.
    """
    if to == "fp8" and fp8_block is not None:
        raise CastError(f"{source} is FP8 already; there is nothing to cast")
    job = _Cast(source, target, to, [*table], fp8_block or BLOCK)
    with _os_errors_told(target):
        job.make_target()
        with locked(target):
            return job.run(progress)


class _Cast:
    """One cast: what is there, and what is to be written."""

    def __init__(
        self, source: Path, target: Path, to: To, table: list[TensorSpec], block: tuple[int, int]
    ) -> None:
        self.source, self.target, self.to, self.block = source, target, to, block
        self.identities = _identities(source)
        with Checkpoint(source, table, block) as checkpoint:
            self.entries = checkpoint.entries
            files = sorted(checkpoint.files)
        self.quantized = {spec.name for spec in table if to == "fp8" and may_be_fp8(spec)}
        # A file that holds nothing but scales has nothing left.
        self.plan = {file: plan for file in files if (plan := self._planned(file)).tensors}
        if not any(self._changes(placed) for plan in self.plan.values() for placed in plan.tensors.values()):
            raise CastError(f"{source} has no tensor that a cast to {to.upper()} would change")
        self.config = (source / CONFIG).read_bytes()
        self.index = (source / INDEX).read_bytes() if (source / INDEX).exists() else None
        self.beside = _files_beside(source)
        self.fingerprint = self._fingerprint()

    def make_target(self) -> None:
        """Makes the folder."""
        here, there = self.source.resolve(), self.target.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise CastError(f"{there} and {here} are one folder, or one is in the other; name another target")
        self.target.mkdir(parents=True, exist_ok=True)

    def run(self, progress: Progress | None) -> Outcome:
        """Writes what is not there yet."""
        done = self._begin()
        left = {file: plan for file, plan in self.plan.items() if file not in done}
        needed = sum(plan.num_bytes for plan in left.values())
        free = shutil.disk_usage(self.target).free
        if needed > free:
            raise CastError(
                f"{self.target} has {free / 1e9:.1f} GB free, and the cast needs {needed / 1e9:.1f} GB more; "
                "make room, or name a folder on another disk"
            )
        kept, written = len(done), 0
        total = needed - sum(len(plan.header) for plan in left.values())

        def counted(write: Write) -> Write:
            def write_and_tell(data: memoryview, offset: int) -> None:
                nonlocal written
                write(data, offset)
                written += len(data)
                if progress is not None:
                    progress(written, total)

            return write_and_tell

        for file, plan in left.items():
            with Reader(self.source, self.entries) as reader, new_file(self.target / file, plan) as write:
                self._write_tensors(reader, plan, counted(write))
                if _identities(self.source) != self.identities:
                    raise CastError(
                        f"{self.source} was changed while it was read; let that end, and begin again"
                    )
            done.append(file)
            self._save_state(done)
        self._finish()
        return Outcome(len(self.plan), kept, sum(plan.num_bytes for plan in self.plan.values()))

    def _planned(self, file: str) -> Planned:
        tensors: list[tuple[Stored, str]] = []
        for name, entry in self.entries.items():
            if entry.file != file or (self.to == "bf16" and self._is_scale(name)):
                continue
            dtype = entry.dtype
            if self.to == "bf16" and dtype == FP8:
                self._require_scale(name, entry)
                dtype = "BF16"
            elif name in self.quantized:
                dtype = FP8
            tensors.append((Stored(name, dtype, entry.shape, None), name))
            if dtype == FP8 != entry.dtype:
                scales = Stored(name + SCALE_SUFFIX, "F32", blocks(entry.shape, BLOCK), None)
                tensors.append((scales, name))
        return lay_out(tensors)

    def _is_scale(self, name: str) -> bool:
        weight = self.entries.get(name.removesuffix(SCALE_SUFFIX))
        return name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype == FP8

    def _require_scale(self, name: str, entry: Entry) -> None:
        """Tensors that the table does not list were not held against anything yet."""
        scale = self.entries.get(name + SCALE_SUFFIX)
        if len(entry.shape) != 2 or scale is None or scale.shape != blocks(entry.shape, self.block):
            fault = f"{entry.file}: tensor {name} is FP8, but has no {name}{SCALE_SUFFIX} of the right shape"
            raise CheckpointError(self.source, [fault])

    def _changes(self, placed: Placed) -> bool:
        return placed.stored.dtype != self.entries[placed.source].dtype

    def _fingerprint(self) -> str:
        """Differs where a file of the source is another one now, or where something else is asked for."""
        digest = hashlib.sha256(repr((sorted(self.identities.items()), self.to, self.block)).encode())
        digest.update(self.config + b"\0" + (self.index or b""))
        for file, plan in self.plan.items():
            digest.update(file.encode() + b"\0" + plan.header)
        return digest.hexdigest()

    def _begin(self) -> list[str]:
        """Which files an earlier run has finished. Removes what else it has left."""
        (self.target / (STATE + PARTIAL)).unlink(missing_ok=True)
        former = _read_state(self.target)
        if former is None:
            if any(self.target.iterdir()):
                raise CastError(
                    f"{self.target} is not empty, and holds no cast that could go on; name another folder"
                )
            self._save_state([])
            return []
        writes, is_same = former["writes"], former["fingerprint"] == self.fingerprint
        # While anything is to be done, nothing may look complete.
        doomed = [CONFIG, INDEX, *(name + PARTIAL for name in writes)]
        for name in [*doomed, *([] if is_same else writes)]:
            (self.target / name).unlink(missing_ok=True)
        sync_folder(self.target)
        finished = former["done"] if is_same else []
        done = [file for file in self.plan if file in finished and self._is_whole(file)]
        self._save_state(done)
        return done

    def _is_whole(self, file: str) -> bool:
        path, plan = self.target / file, self.plan[file]
        if not path.is_file() or path.stat().st_size != plan.num_bytes:
            return False
        with path.open("rb") as opened:
            return opened.read(len(plan.header)) == plan.header

    def _save_state(self, done: list[str]) -> None:
        writes = [*self.plan, *(path.name for path in self.beside), INDEX, CONFIG]
        state = {"fingerprint": self.fingerprint, "writes": writes, "done": done}
        write_whole(self.target / STATE, _json(state))

    def _write_tensors(self, reader: Reader, plan: Planned, write: Write) -> None:
        for placed in plan.tensors.values():
            stored, name = placed.stored, placed.source
            if stored.name != name or not stored.num_bytes:
                continue  # scales are written with what they scale
            if not self._changes(placed):
                for start in range(0, stored.num_bytes, CHUNK_ITEMS):
                    write(memoryview(reader.read(name, start, CHUNK_ITEMS)), placed.offset + start)
            elif stored.dtype == FP8:
                self._quantize(reader, placed, plan.tensors[name + SCALE_SUFFIX], write)
            else:
                self._dequantize(reader, placed, write)

    def _dequantize(self, reader: Reader, placed: Placed, write: Write) -> None:
        num_columns = placed.stored.shape[1]
        scale = reader.scales(placed.source)
        block_rows = self.block[0]
        for first, weight in reader.rows(placed.source, block_rows):
            of_rows = scale[first // block_rows : -(-(first + len(weight)) // block_rows)]
            values = dequantize(weight, of_rows, self.block)
            write(raw(values), placed.offset + first * num_columns * values.itemsize)

    def _quantize(self, reader: Reader, placed: Placed, scales: Placed, write: Write) -> None:
        name, num_columns = placed.source, placed.stored.shape[1]
        for first, weight in reader.rows(name, BLOCK[0]):
            try:
                values, scale = quantize(weight)
            except ValueError as error:
                fault = f"{self.entries[name].file}: tensor {name} {error}"
                raise CheckpointError(self.source, [fault]) from None
            write(raw(values), placed.offset + first * num_columns)
            write(raw(scale), scales.offset + first // BLOCK[0] * scale.shape[1] * scale.itemsize)

    def _finish(self) -> None:
        """What makes a checkpoint of the folder: the tokenizer and the like, the index, last config.json."""
        for path in self.beside:
            copy_whole(path, self.target / path.name)
        placed = {name: (file, t) for file, plan in self.plan.items() for name, t in plan.tensors.items()}
        if self.index is not None:
            metadata = json.loads(self.index).get("metadata")
            size = sum(tensor.stored.num_bytes for _, tensor in placed.values())
            metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
            weight_map = {name: file for name, (file, _) in placed.items()}
            write_whole(self.target / INDEX, _json({"metadata": metadata, "weight_map": weight_map}))
        config = json.loads(self.config)
        config.pop("quantization_config", None)
        if self.to == "fp8":
            config["quantization_config"] = FP8_CONFIG
        write_whole(self.target / CONFIG, _json(config))
        (self.target / STATE).unlink()
        sync_folder(self.target)


def _identities(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when somebody writes one of a folder's files of weights, or replaces it."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with suppress(OSError):  # a broken link, of which the checkpoint's own check says more
            status = path.stat()
            found[str(path.relative_to(folder))] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _files_beside(source: Path) -> list[Path]:
    """Tokenizer, template and whatever else lies beside the weights."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (INDEX, CONFIG)
        and path.suffix not in _WEIGHTS
    ]


def _read_state(target: Path) -> dict[str, Any] | None:
    """None where there is none. Raises CastError for one that no cast has written."""
    file = target / STATE
    try:
        state: dict[str, Any] = json.loads(file.read_bytes())
        names = [PurePath(name) for name in (*state["writes"], *state["done"])]
        if not isinstance(state["fingerprint"], str) or any(
            n.is_absolute() or ".." in n.parts for n in names
        ):
            raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CastError(f"{file} is damaged; remove {target}, and begin again") from None
    return state


@contextmanager
def _os_errors_told(target: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise CastError(f"another cast writes to {target}; let it end") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            raise CastError(
                f"there is no room left for {target} ({why}); what was finished is kept: make room, and the "
                "same command goes on from there"
            ) from error
        raise CastError(f"{error.filename or target}: {why}") from error


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
