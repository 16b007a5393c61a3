"""A checkpoint rewritten into another folder, file by file: what is common to all that do so.

What is done is kept in a file of state: a second run goes on from there if neither the source nor what is
asked for has changed, else it starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from r1_cluster.weights.blocks import BLOCK
from r1_cluster.weights.checkpoint import Checkpoint, CheckpointError
from r1_cluster.weights.headers import INDEX, Entry
from r1_cluster.weights.inventory import FP8, Stored, blocks
from r1_cluster.weights.reading import identity
from r1_cluster.weights.stream import (
    FULL,
    PARTIAL,
    Placed,
    Planned,
    Reader,
    Write,
    copy,
    copy_whole,
    lay_out,
    locked,
    new_file,
    raw,
    sync,
    write_whole,
)
from r1_cluster.weights.tensors import SCALE_SUFFIX, IntFormat, TensorSpec

Progress = Callable[[int, int], None]
"""Is told how many bytes are written, and of how many."""

STATE = ".unfinished.json"
"""Is there until all is done."""

CONFIG = "config.json"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", PARTIAL)


class RewriteError(ValueError):
    """It cannot begin or go on; the message says what to do. What was finished is kept."""


@dataclass(frozen=True)
class Outcome:
    """How many files of weights there are now, how many of them an earlier run had finished, and the bytes
    of all."""

    files: int
    kept: int
    num_bytes: int


@dataclass(frozen=True)
class Files:
    """A checkpoint whose headers have been checked: its tensors by name, its files' names, what changes when
    somebody writes or replaces one of them, and the (rows, columns) that share one scale where it is FP8."""

    folder: Path
    entries: Mapping[str, Entry]
    names: list[str]
    identities: Mapping[str, tuple[int, int, int]]
    block: tuple[int, int]

    @classmethod
    def of(
        cls,
        folder: Path,
        table: Iterable[TensorSpec],
        fp8_block: tuple[int, int] | None,
        int_format: IntFormat | None = None,
        *,
        module: Iterable[TensorSpec] = (),
    ) -> Files:
        """See `Checkpoint`. Raises CheckpointError with all that is wrong."""
        before = identities(folder)
        with Checkpoint(folder, table, fp8_block, int_format, module=module) as checkpoint:
            return cls(folder, checkpoint.entries, sorted(checkpoint.files), before, fp8_block or BLOCK)


class Rewrite(ABC):
    """One rewriting of a checkpoint's `files` into `target`.

    `plan` says which files of weights it gets; of those `beside` the weights it gets copies. What makes a
    checkpoint of a folder, `last`, is written by `finish` and is not there before. `done` has the files that
    are finished, with what `write_tensors` said of each.
    """

    plan: Mapping[str, Planned]
    beside: list[Path]
    last: tuple[str, ...] = ()

    def __init__(self, files: Files, target: Path) -> None:
        self.source, self.target = files.folder, target
        self.entries, self.identities, self.block = files.entries, files.identities, files.block
        self.done: dict[str, Any] = {}

    @abstractmethod
    def write_tensors(self, reader: Reader, file: str, write: Write) -> object:
        """Writes the tensors of one file of the plan. What it returns, which JSON must hold, is kept with the
        state, also for a run that goes on from there. Raises CheckpointError."""

    @abstractmethod
    def asked(self) -> bytes:
        """What else than files and headers the result depends on."""

    @abstractmethod
    def finish(self) -> None:
        """Writes `last`."""

    def run(self, progress: Progress | None) -> Outcome:
        """Writes what is not there yet. Raises CheckpointError for the source, RewriteError for the
        target."""
        here, there = self.source.resolve(), self.target.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise RewriteError(
                f"{there} and {here} are one folder, or one is in the other; name another target"
            )
        with _os_errors_told(self.target):
            self.target.mkdir(parents=True, exist_ok=True)
            with locked(self.target):
                return self._run(progress)

    def _run(self, progress: Progress | None) -> Outcome:
        fingerprint = self._fingerprint()
        self.done = self._begin(fingerprint)
        left = {file: plan for file, plan in self.plan.items() if file not in self.done}
        needed = sum(plan.num_bytes for plan in left.values())
        free = shutil.disk_usage(self.target).free
        if needed > free:
            raise RewriteError(
                f"{self.target} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB more are needed; "
                "make room, or name a folder on another disk"
            )
        kept, written = len(self.done), 0
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
                said = self.write_tensors(reader, file, counted(write))
                if identities(self.source) != self.identities:
                    what = f"{self.source} was changed while it was read"
                    raise RewriteError(f"{what}; let that end, and begin again")
            self.done[file] = said
            self._save_state(fingerprint, self.done)
        for path in self.beside:
            copy_whole(path, self.target / path.name)
        self.finish()
        (self.target / STATE).unlink()
        sync(self.target)
        return Outcome(len(self.plan), kept, sum(plan.num_bytes for plan in self.plan.values()))

    def _fingerprint(self) -> str:
        """Differs where a file of the source is another one now, or where something else is asked for."""
        digest = hashlib.sha256(repr(sorted(self.identities.items())).encode() + self.asked())
        for file, plan in self.plan.items():
            digest.update(file.encode() + b"\0" + plan.header)
        return digest.hexdigest()

    def _begin(self, fingerprint: str) -> dict[str, Any]:
        """The files that an earlier run has finished, as in `done`. Removes what else it has left."""
        (self.target / (STATE + PARTIAL)).unlink(missing_ok=True)
        former = _read_state(self.target)
        if former is None:
            if any(self.target.iterdir()):
                raise RewriteError(
                    f"{self.target} is not empty, and holds nothing that could go on; name another folder"
                )
            self._save_state(fingerprint, {})
            return {}
        writes, is_same = former["writes"], former["fingerprint"] == fingerprint
        # While anything is to be done, nothing may look complete.
        doomed = [*self.last, *(name + PARTIAL for name in writes)]
        for name in [*doomed, *([] if is_same else writes)]:
            (self.target / name).unlink(missing_ok=True)
        sync(self.target)
        finished = former["done"] if is_same else {}
        done = {file: finished[file] for file in self.plan if file in finished and self._is_whole(file)}
        self._save_state(fingerprint, done)
        return done

    def _is_whole(self, file: str) -> bool:
        path, plan = self.target / file, self.plan[file]
        if not path.is_file() or path.stat().st_size != plan.num_bytes:
            return False
        with path.open("rb") as opened:
            return opened.read(len(plan.header)) == plan.header

    def _save_state(self, fingerprint: str, done: dict[str, Any]) -> None:
        writes = [*self.last, *self.plan, *(path.name for path in self.beside)]
        state = {"fingerprint": fingerprint, "writes": writes, "done": done}
        write_whole(self.target / STATE, to_json(state))


class CheckpointRewrite(Rewrite):
    """A rewriting that makes a checkpoint again: with the source's files of weights, one for one, an index if
    there was one, and whatever else lies beside them. The index and then config.json come last."""

    last = (CONFIG, INDEX)

    def __init__(self, files: Files, target: Path) -> None:
        super().__init__(files, target)
        self.config = (self.source / CONFIG).read_bytes()
        self.index = (self.source / INDEX).read_bytes() if (self.source / INDEX).exists() else None
        self.beside = files_beside(self.source)
        tensors: dict[str, list[tuple[Stored, str]]] = {file: [] for file in files.names}
        for name, entry in self.entries.items():
            tensors[entry.file] += [(stored, name) for stored in self.becomes(name, entry)]
        # A file that holds nothing but scales may have nothing left.
        self.plan = {file: lay_out(found) for file, found in tensors.items() if found}

    @abstractmethod
    def becomes(self, name: str, entry: Entry) -> list[Stored]:
        """What a tensor of the source is stored as. Is asked while the rewriting is made."""

    @abstractmethod
    def quantization_config(self) -> dict[str, object] | None:
        """What config.json says of it."""

    def without_fp8(self, name: str, entry: Entry) -> list[Stored]:
        """What a tensor becomes where none is to be FP8. Raises CheckpointError for FP8 without scales: those
        that the table does not list were not held against anything yet."""
        weight = self.entries.get(name.removesuffix(SCALE_SUFFIX))
        if name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype == FP8:
            return []
        if entry.dtype != FP8:
            return [Stored(name, entry.dtype, entry.shape, None)]
        scale = self.entries.get(name + SCALE_SUFFIX)
        if len(entry.shape) != 2 or scale is None or scale.shape != blocks(entry.shape, self.block):
            fault = f"{entry.file}: tensor {name} is FP8, but has no {name}{SCALE_SUFFIX} of the right shape"
            raise CheckpointError(self.source, [fault])
        return [Stored(name, "BF16", entry.shape, None)]

    def write_without_fp8(self, reader: Reader, placed: Placed, write: Write) -> None:
        """Writes a tensor as `without_fp8` has it stored. Raises CheckpointError."""
        if placed.stored.dtype == self.entries[placed.source].dtype:
            copy(reader, placed, write)
            return
        row_bytes = 2 * placed.stored.shape[1]
        for first, values in reader.floats(placed.source, self.block, torch.bfloat16):
            write(raw(values), placed.offset + first * row_bytes)

    def asked(self) -> bytes:
        what = repr((type(self).__name__, self.block, self.quantization_config()))
        return what.encode() + self.config + b"\0" + (self.index or b"")

    def finish(self) -> None:
        if self.index is not None:
            write_index(self.target, self.plan, self.index)
        config = json.loads(self.config)
        config.pop("quantization_config", None)
        if (how := self.quantization_config()) is not None:
            config["quantization_config"] = how
        write_whole(self.target / CONFIG, to_json(config))


def write_index(target: Path, plan: Mapping[str, Planned], former: bytes) -> None:
    """Writes the index of a checkpoint's files, with the other metadata that its source's index has."""
    metadata = json.loads(former).get("metadata")
    size = sum(placed.stored.num_bytes for planned in plan.values() for placed in planned.tensors.values())
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    weight_map = {name: file for file, planned in plan.items() for name in planned.tensors}
    write_whole(target / INDEX, to_json({"metadata": metadata, "weight_map": weight_map}))


def files_beside(source: Path) -> list[Path]:
    """Tokenizer, template and whatever else lies beside the weights."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (INDEX, CONFIG)
        and path.suffix not in _WEIGHTS
    ]


def identities(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when somebody writes one of a folder's files of weights, or replaces it."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with suppress(OSError):  # a broken link, of which the checkpoint's own check says more
            # Without the device, whose number may be another one when a rewriting goes on.
            found[str(path.relative_to(folder))] = identity(path.stat())[1:]
    return found


def _read_state(target: Path) -> dict[str, Any] | None:
    """None where there is none. Raises RewriteError for one that no rewriting has written."""
    file = target / STATE
    try:
        state: dict[str, Any] = json.loads(file.read_bytes())
        names = [PurePath(name) for name in state["writes"]]
        is_sound = isinstance(state["fingerprint"], str) and isinstance(state["done"], dict)
        if not is_sound or any(n.is_absolute() or ".." in n.parts for n in names):
            raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RewriteError(f"{file} is damaged; remove {target}, and begin again") from None
    return state


@contextmanager
def _os_errors_told(target: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise RewriteError(f"somebody else writes to {target}; let it end") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in FULL:
            raise RewriteError(
                f"there is no room left for {target} ({why}); what was finished is kept: make room, and the "
                "same command goes on from there"
            ) from error
        raise RewriteError(f"{error.filename or target}: {why}") from error


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
