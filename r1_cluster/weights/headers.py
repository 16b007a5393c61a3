"""Headers of safetensors files: what a file holds, and where.

The format: 8 bytes little-endian header length, JSON header, data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4}
ITEM_BYTES |= {"I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8}
"""Bytes of one number, by the format's name of its type."""

_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """A tensor as its file's header describes it. Its data begins `offset` bytes into the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path, file: str, faults: list[str]) -> dict[str, Entry]:
    """The entries of one file; what is wrong with it goes to `faults`, and nothing of it is used then.

    The format: 8 bytes little-endian header length, JSON header, data (github.com/huggingface/safetensors).
    """
    again = f"download {file} again"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                faults.append(
                    f"{file} is cut off: its header should take {length} of its {size} bytes; {again}"
                )
                return {}
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        faults.append(f"{file} is listed in {INDEX}, but not there; {again}")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{file} has no readable header ({error}); {again}")
        return {}
    entries: dict[str, Entry] = {}
    places: list[tuple[int, int, str]] = []
    try:
        for name, value in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
            start, stop = (int(n) for n in value["data_offsets"])
            if dtype not in ITEM_BYTES:
                faults.append(f"{file}: tensor {name} is of dtype {dtype}, which is unknown; {again}")
                continue
            num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
            if min(shape, default=0) < 0 or start < 0 or stop - start != num_bytes:
                faults.append(
                    f"{file}: tensor {name} ({dtype} {list(shape)}) needs {num_bytes} bytes, "
                    f"its header gives it {stop - start}; {again}"
                )
            entries[name] = Entry(file, dtype, shape, 8 + length + start)
            places.append((start, stop, name))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        faults.append(f"{file} has a malformed header ({error!r}); {again}")
        return {}
    if not any(fault.startswith(f"{file}: ") for fault in faults):
        faults += [f"{fault}; {again}" for fault in _layout_faults(file, places, size - 8 - length)]
    return entries


def _layout_faults(file: str, places: list[tuple[int, int, str]], num_bytes: int) -> Iterator[str]:
    """Tensors must fill a file's `num_bytes` of data without gap or overlap, as the format demands."""
    places = sorted(places)
    for (_, stop, name), (start, _, following) in pairwise(places):
        if start < stop:
            yield f"{file}: tensors {name} and {following} overlap"
        elif start > stop:
            yield f"{file}: {start - stop} bytes between tensors {name} and {following} belong to none"
    end = max((stop for _, stop, _ in places), default=0)
    if end != num_bytes:
        yield f"{file} has {num_bytes} bytes of data, its header expects {end}: it is cut off or broken"


def lists(folder: Path, name: str) -> bool:
    """Whether a checkpoint's index, or the header of its only file, lists a tensor. False where neither can
    be read: whoever opens the checkpoint is told."""
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return isinstance(weight_map, dict) and name in weight_map
    except FileNotFoundError:
        return name in read_header(folder / SINGLE, SINGLE, [])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_headers(folder: Path) -> tuple[dict[str, Entry], list[str]]:
    """All tensors of a folder's safetensors files, whatever its index says, and what is wrong with them."""
    faults: list[str] = []
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        entries |= read_header(path, path.name, faults)
    return entries, faults
