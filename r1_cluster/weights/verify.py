"""Whether a checkpoint is sound: its files, its tensors and, if wanted, every number in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from r1_cluster.weights.checkpoint import Checkpoint, CheckpointError
from r1_cluster.weights.headers import ITEM_BYTES, Entry, read_header
from r1_cluster.weights.hub import Published, published
from r1_cluster.weights.inventory import FP8
from r1_cluster.weights.reading import identity
from r1_cluster.weights.stream import Reader
from r1_cluster.weights.tensors import INT_SCALE_SUFFIX, SCALE_SUFFIX, IntFormat, TensorSpec

_CHUNK_BYTES = 4 << 20
# A number is NaN or infinite where all bits of this mask are set. E4M3 has no infinity, and one NaN.
_EXPONENTS = {
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,
}

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, and of how many."""


@dataclass
class Report:
    """What was found. `faults` has a sentence for each thing that is wrong, `notes` what one should know."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    num_bytes: int = 0
    hashed: int = 0  # files whose hash was held against the hub's


def verify(
    folder: Path,
    table: Iterable[TensorSpec] | None,
    module: Iterable[TensorSpec],
    fp8_block: tuple[int, int] | None,
    *,
    int_format: IntFormat | None = None,
    progress: Progress | None = None,
) -> Report:
    """Holds the files against their index in both directions, the tensors against `table`, and those of the
    MTP `module` if the checkpoint has any of them. Without a table only files are checked.

    With `progress` all data is read: hashes are held against the hub's, and every number must be finite,
    every scale positive.
    """
    report = Report()
    paths = sorted(folder.glob("*.safetensors"))
    entries = {path.name: read_header(path, path.name, []) for path in paths}
    found = {name: entry for of_file in entries.values() for name, entry in of_file.items()}
    expected = None if table is None else [*table]
    module = [*module]
    if expected is not None and module:
        if any(spec.name in found for spec in module):
            expected += module
        else:
            report.notes.append("The MTP module is not there; only speculation needs it.")
    listed: frozenset[str] | None = None
    try:
        with Checkpoint(folder, expected, fp8_block, int_format) as checkpoint:
            listed = checkpoint.files
    except CheckpointError as error:
        report.faults += error.faults
        listed = error.files
    if listed:
        report.faults += _files_beside(listed, entries)
        if (missing := len(listed - entries.keys())) and entries:
            report.notes.append(
                f"{missing} of {len(listed)} files are not here. A node that hosts some parts of a layout "
                "alone can do without: `r1-cluster weights download` looks at what such a node needs."
            )
    if expected is not None:
        report.faults += _quantization_faults(found, expected, fp8_block)
    report.files, report.tensors = len(paths), len(found)
    report.num_bytes = sum(path.stat().st_size for path in paths)
    if progress is not None:
        _read_all(paths, report, progress)
    return report


def are_equal(folder: Path, first: str, second: str) -> bool:
    """Whether two tensors of a sound checkpoint are the same, bit for bit. Raises CheckpointError."""
    with Checkpoint(folder) as checkpoint:
        entries = checkpoint.entries
    one, other = entries[first], entries[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with Reader(folder, entries) as reader:
        return all(
            reader.read(first, start, _CHUNK_BYTES) == reader.read(second, start, _CHUNK_BYTES)
            for start in range(0, one.num_bytes, _CHUNK_BYTES)
        )


def _files_beside(listed: frozenset[str], entries: dict[str, dict[str, Entry]]) -> Iterable[str]:
    for file in sorted(entries.keys() - listed):
        count = len(entries[file])
        yield f"{file} with its {count} tensors is there, but no index lists it; nobody reads it: remove it"


def _quantization_faults(
    found: dict[str, Entry], table: list[TensorSpec], fp8_block: tuple[int, int] | None
) -> Iterable[str]:
    """What an engine would take for another format than it is."""
    stored = Counter(found[spec.name].dtype for spec in table if spec.name in found)
    remedy = "take config.json and the files from the same revision"
    if fp8_block is None and stored[FP8]:
        yield f"config.json has no quantization_config, but {stored[FP8]} tensors are FP8; {remedy}"
    if fp8_block is not None and stored and not stored[FP8]:
        yield f"config.json's quantization_config says that weights are FP8, but no tensor is; {remedy}"
    for spec in table:
        if spec.name + SCALE_SUFFIX in found and spec.name in found and found[spec.name].dtype != FP8:
            entry = found[spec.name + SCALE_SUFFIX]
            yield (
                f"{entry.file}: tensor {spec.name}{SCALE_SUFFIX} has the scales of a tensor that is "
                f"{found[spec.name].dtype}, expected FP8; take both from the same revision"
            )


def _read_all(paths: list[Path], report: Report, progress: Progress) -> None:
    done = 0

    def more(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, report.num_bytes)

    for path in paths:
        want = published(path)
        report.hashed += want is not None
        try:
            report.faults += _read_file(path, want, more)
        except OSError as error:
            report.faults.append(f"{path.name} cannot be read ({error.strerror}); download {path.name} again")
    if report.hashed < len(paths):
        report.notes.append(
            f"The hub's metadata is missing for {len(paths) - report.hashed} of {len(paths)} files, so their "
            "hashes were not compared: there, a number that is wrong but finite goes unseen."
        )


def _read_file(path: Path, want: Published | None, more: Callable[[int], None]) -> Iterable[str]:
    faults: list[str] = []
    again = f"download {path.name} again"
    before = path.stat()
    entries = sorted(read_header(path, path.name, faults).items(), key=lambda item: item[1].offset)
    is_whole = not faults  # else it was told before, and only the hash remains to be seen
    found: list[str] = []
    with path.open("rb", buffering=0) as file:
        digest = want.begin(before.st_size) if want is not None else None

        def read(num_bytes: int) -> memoryview:
            view, filled = memoryview(bytearray(num_bytes)), 0
            while filled < num_bytes and (count := file.readinto(view[filled:])):
                filled += count
            if digest is not None:
                digest.update(view[:filled])
            more(filled)
            return view[:filled]

        if is_whole:
            read(entries[0][1].offset if entries else before.st_size)
            for name, entry in entries:
                words = _tensor_fault(name, entry, read)
                if words is not None:
                    found.append(f"{path.name}: tensor {name} {words}; {again}")
        while digest is not None and read(_CHUNK_BYTES):  # a damaged file is read for its hash alone
            pass
        after = os.stat(path)
        if identity(after) != identity(before):
            return [f"{path.name} was replaced while it was read; let the download end, and verify again"]
    if want is not None and digest is not None and digest.hexdigest() != want.value:
        found.append(
            f"{path.name} has {want.kind} hash {digest.hexdigest()}, the hub's is {want.value}; {again}"
        )
    return found


def _tensor_fault(name: str, entry: Entry, read: Callable[[int], memoryview]) -> str | None:
    """Reads one tensor's data from where the file stands."""
    item = ITEM_BYTES[entry.dtype]
    is_scale = name.endswith((SCALE_SUFFIX, INT_SCALE_SUFFIX))
    bad, first, seen = 0, -1, 0
    left = entry.num_bytes
    while left:
        data = read(min(_CHUNK_BYTES, left))
        if not data:
            return "is cut off"
        left -= len(data)
        mask = _wrong(np.frombuffer(data[: len(data) // item * item], f"<i{item}"), entry.dtype, is_scale)
        if mask is not None and mask.any():
            if first < 0:
                first = seen + int(mask.argmax())
            bad += int(np.count_nonzero(mask))
        seen += len(data) // item
    if not bad:
        return None
    at = [int(i) for i in np.unravel_index(first, entry.shape or (1,))]
    what = "scales that are not positive and finite" if is_scale else "values that are NaN or infinite"
    return f"has {bad} {what}, the first at {at}"


def _wrong(bits: np.ndarray, dtype: str, is_scale: bool) -> np.ndarray | None:
    """Which numbers are wrong, from their bits as signed integers; None for integers, which never are."""
    exponent = _EXPONENTS.get(dtype)
    if exponent is None:
        return None
    mask: np.ndarray = (bits & exponent) == exponent
    # The bits of a positive number are a positive integer.
    return mask | (bits <= 0) if is_scale else mask
