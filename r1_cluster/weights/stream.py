"""Files of weights, read and written in a stream: no tensor is ever whole in memory, and no file is ever
there in part."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from r1_cluster.weights.blocks import dequantize
from r1_cluster.weights.checkpoint import CheckpointError
from r1_cluster.weights.headers import ITEM_BYTES, Entry
from r1_cluster.weights.inventory import FP8, Stored
from r1_cluster.weights.reading import FilesReader
from r1_cluster.weights.tensors import SCALE_SUFFIX

CHUNK_ITEMS = 4 << 20
"""Numbers in memory at a time; several copies of them may be, in several types."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the kernel says where there is no room for more."""
PARTIAL = ".partial"
"""What the name of a file ends with while it is written."""

Write = Callable[[memoryview, int], None]
"""Writes bytes to a place in a file."""

_TORCH_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


class Placed(NamedTuple):
    """A tensor `offset` bytes into a file that is to be written, made of the tensor `source`."""

    stored: Stored
    source: str
    offset: int


class Planned(NamedTuple):
    """A file that is to be written."""

    header: bytes
    tensors: dict[str, Placed]
    num_bytes: int


def lay_out(tensors: Iterable[tuple[Stored, str]], *, as_given: bool = False) -> Planned:
    """A file of these tensors, each made of the one that is named with it.

    Readers map files and want each tensor aligned to its type: the widest types come first, as the format's
    own writer has it. `as_given` keeps the order of all tensors that any other may follow, whose bytes are a
    multiple of the widest type's; those that are left come last.
    """
    widest = max(ITEM_BYTES.values())

    def place(pair: tuple[Stored, str]) -> int:
        keeps_order = as_given and pair[0].num_bytes % widest == 0
        return 0 if keeps_order else 1 + widest - ITEM_BYTES[pair[0].dtype]

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    placed: list[tuple[Stored, str, int]] = []
    end = 0
    for stored, source in sorted(tensors, key=place):
        start, end = end, end + stored.num_bytes
        header[stored.name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [start, end],
        }
        placed.append((stored, source, start))
    packed = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    packed += b" " * (-len(packed) % 8)  # the format aligns the data to 8 bytes
    packed = len(packed).to_bytes(8, "little") + packed
    found = {stored.name: Placed(stored, source, len(packed) + start) for stored, source, start in placed}
    return Planned(packed, found, len(packed) + end)


class Reader:
    """Reads parts of a checkpoint's tensors. (Memory maps would count as memory of ours.) All methods raise
    CheckpointError."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.folder = folder
        self.entries = entries
        self._files = FilesReader(folder)

    def read(self, name: str, start: int, num_bytes: int) -> bytearray:
        """At most `num_bytes` of a tensor's data, from byte `start` on."""
        entry = self.entries[name]
        data = bytearray(min(num_bytes, entry.num_bytes - start))
        try:
            self._files.read_into(entry.file, entry.offset + start, memoryview(data))
        except EOFError:
            raise CheckpointError(self.folder, [f"{entry.file} is cut off in tensor {name}"]) from None
        except OSError as error:
            fault = f"{entry.file}: tensor {name} cannot be read ({error.strerror})"
            raise CheckpointError(self.folder, [fault]) from error
        return data

    def rows(self, name: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """A matrix some rows at a time, a multiple of `multiple`: the first's number, and they themselves."""
        entry = self.entries[name]
        num_rows, num_columns = entry.shape
        step = max(1, CHUNK_ITEMS // num_columns // multiple) * multiple
        row_bytes = num_columns * ITEM_BYTES[entry.dtype]
        for first in range(0, num_rows, step):
            data = self.read(name, first * row_bytes, step * row_bytes)
            yield first, torch.frombuffer(data, dtype=_TORCH_TYPES[entry.dtype]).view(-1, num_columns)

    def floats(self, name: str, block: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """A matrix's rows as `rows` has them, in `dtype`; FP8 times its scales, one per `block`."""
        if self.entries[name].dtype != FP8:
            for first, weight in self.rows(name):
                yield first, weight.to(dtype)
            return
        scale, block_rows = self._scales(name), block[0]
        for first, weight in self.rows(name, block_rows):
            of_rows = scale[first // block_rows : -(-(first + len(weight)) // block_rows)]
            yield first, dequantize(weight, of_rows, block, dtype)

    def _scales(self, name: str) -> Tensor:
        """The float32 scales of an FP8 matrix, which must be positive and finite."""
        entry = self.entries[name + SCALE_SUFFIX]
        data = self.read(name + SCALE_SUFFIX, 0, entry.num_bytes)
        scale = torch.frombuffer(data, dtype=_TORCH_TYPES[entry.dtype]).float().view(entry.shape)
        if not bool(((scale > 0) & scale.isfinite()).all()):
            fault = f"{entry.file}: tensor {name}{SCALE_SUFFIX} has scales that are not positive and finite"
            raise CheckpointError(self.folder, [fault])
        return scale

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, as files have them."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def copy(reader: Reader, placed: Placed, write: Write, begin: int = 0) -> None:
    """Writes a tensor's bytes as its source has them, from its byte `begin` on. Raises CheckpointError."""
    for done in range(0, placed.stored.num_bytes, CHUNK_ITEMS):
        size = min(CHUNK_ITEMS, placed.stored.num_bytes - done)
        write(memoryview(reader.read(placed.source, begin + done, size)), placed.offset + done)


@contextmanager
def new_file(path: Path, planned: Planned) -> Iterator[Write]:
    """Gives what writes a file's tensors. The file appears whole at the end of the `with` block, or not at
    all. Raises OSError, for a full disk before anything is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.posix_fallocate(file, 0, planned.num_bytes)
        _write(file, memoryview(planned.header), 0)
        yield lambda data, offset: _write(file, data, offset)
        os.fsync(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    _appear(partial, path)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file, which is there with all of its content or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(data)
    sync(partial)
    _appear(partial, path)


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file, which is there with all of its content or not at all."""
    partial = target.with_name(target.name + PARTIAL)
    shutil.copyfile(source, partial)
    sync(partial)
    _appear(partial, target)


def sync(path: Path) -> None:
    """Makes a file's content durable, or which files a folder has."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps others who lock the folder out of it. Raises BlockingIOError where somebody keeps us out."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _appear(partial: Path, path: Path) -> None:
    partial.rename(path)
    sync(path.parent)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
