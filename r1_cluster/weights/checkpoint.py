"""Checkpoints on disk: safetensors files, checked by their headers, read by slices."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from kernels.int_weight import dequantize_groups, group_scaled
from kernels.ops import for_device
from r1_cluster.weights.headers import INDEX, SINGLE, Entry, read_header
from r1_cluster.weights.integers import from_words, stored_shapes
from r1_cluster.weights.reading import FilesReader, Identity, identity
from r1_cluster.weights.tensors import (
    INT_SCALE_SUFFIX,
    INT_SHAPE_SUFFIX,
    PACKED_SUFFIX,
    SCALE_SUFFIX,
    SUFFIXES,
    IntFormat,
    Slices,
    TensorSpec,
    layer_of,
    listed_name,
)

_FLOATS = ("F32", "F16", "BF16")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
_DTYPES |= {"I32": torch.int32, "I64": torch.int64}
_INT_DTYPES = {PACKED_SUFFIX: ("I32",), INT_SCALE_SUFFIX: _FLOATS, INT_SHAPE_SUFFIX: ("I64", "I32")}
_CONTIGUOUS = torch.contiguous_format
_MAX_FAULTS_SHOWN = 20


class CheckpointError(ValueError):
    """A checkpoint cannot be used; `faults` has one sentence each, the message all of them. `files` are those
    that its index lists, as far as that could be read."""

    def __init__(self, path: Path, faults: Iterable[str], files: frozenset[str] = frozenset()) -> None:
        self.faults = list(faults)
        self.files = files
        shown = self.faults[:_MAX_FAULTS_SHOWN]
        if len(self.faults) > len(shown):
            shown.append(f"and {len(self.faults) - len(shown)} more")
        what = f"{len(self.faults)} fault" + "s" * (len(self.faults) > 1)
        super().__init__(f"the checkpoint {path} has {what}: " + "; ".join(shown))


def weight_map(folder: Path) -> dict[str, str] | None:
    """The index's tensor → file as it is written; None where there is no index. Raises CheckpointError."""
    file = folder / INDEX
    if not file.exists():
        return None
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(shard) for name, shard in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(folder, [f"{INDEX} has no readable weight_map ({error!r})"]) from error
    if not entries:
        raise CheckpointError(folder, [f"{INDEX} lists no tensors; download it again"])
    return entries


def files_of(index: Mapping[str, str], needed: Set[str] | None) -> set[str]:
    """The files of an index that hold `needed` tensors (as the table names them; None: all), in whatever form
    they are stored."""
    if needed is None:
        return set(index.values())
    return {file for name, file in index.items() if name in needed or listed_name(name) in needed}


def tensors_here(folder: Path) -> set[str] | None:
    """What the index lists in files that are there, as the table names it, with all that belongs to it
    (scales may lie in another file); None where no file is missing, or where there is no index. Raises
    CheckpointError."""
    index = weight_map(folder) or {}
    missing = {file for file in set(index.values()) if not (folder / file).exists()}
    if not missing:
        return None
    lacking = {listed_name(name) for name, file in index.items() if file in missing}
    return {listed_name(name) for name in index} - lacking


class Checkpoint:
    """A folder of safetensors files: headers are checked when it is opened, data is read when asked for."""

    def __init__(
        self,
        path: str | Path,
        table: Iterable[TensorSpec] | None = None,
        fp8_block: tuple[int, int] | None = None,
        int_format: IntFormat | None = None,
        *,
        needed: Set[str] | None = None,
        module: Iterable[TensorSpec] = (),
    ) -> None:
        """Checks the files against the index in both directions and, given a table, the tensors against it.

        `fp8_block` is the (rows, columns) that share one scale where weights are FP8, `int_format` how they
        are stored where they are integers. Of `needed` tensors (as the table names them; None: all) only the
        files are opened, and others need not be there. The tensors of `module` are needed if any of them is
        there: the MTP module's may well be left out. Raises CheckpointError with all that is wrong.
        """
        self.path = Path(path)
        self.fp8_block = fp8_block or (128, 128)
        self._int_format = int_format
        self.int_group = None if int_format is None else int_format.group_size
        self._reader = FilesReader(self.path)
        self._identities: dict[str, Identity] = {}
        self._entries: dict[str, Entry] = {}
        self._int_shapes: dict[str, tuple[int, ...]] = {}
        faults: list[str] = []
        index = self._read_index(faults)
        found: dict[str, dict[str, Entry]] = {}
        for file in sorted(files_of(index, needed)) if index is not None else [SINGLE]:
            with contextlib.suppress(OSError):  # which reading its header tells
                self._identities[file] = identity((self.path / file).stat())
            found[file] = read_header(self.path / file, file, faults)
        self.files = frozenset(found)
        self._merge(index, found, faults)
        specs = {spec.name: spec for spec in table or ()}
        module = [*module]
        if any(spec.name in self._entries for spec in module):
            specs |= {spec.name: spec for spec in module}
        self._shapes = {name: spec.shape for name, spec in specs.items()}
        if table is not None:
            faults += self._faults_against(specs, index or {}, specs.keys() if needed is None else needed)
        if faults:
            raise CheckpointError(self.path, faults, self.files)

    def _read_index(self, faults: list[str]) -> dict[str, str] | None:
        """The index's tensor → file; None if there is just one file. Paths are held to the folder."""
        if not self.path.is_dir():
            raise CheckpointError(
                self.path, ["there is no such folder; name one with config.json and safetensors"]
            )
        entries = weight_map(self.path)
        if entries is None:
            if not (self.path / SINGLE).exists():
                raise CheckpointError(
                    self.path, [f"neither {INDEX} nor {SINGLE} is there; download it again"]
                )
            if not self._is_inside(SINGLE):
                raise CheckpointError(
                    self.path, [f"{SINGLE} is a link out of the folder: move the file into it"]
                )
            return None
        root = self.path.resolve()
        inside = {shard for shard in entries.values() if self._is_inside(shard)}
        for shard in sorted(set(entries.values()) - inside):
            faults.append(
                f"{INDEX} names the file {shard!r}, which is outside of {root}: move it into the folder"
            )
        return {name: shard for name, shard in entries.items() if shard in inside}

    def _is_inside(self, file: str) -> bool:
        """Whether a file, its links followed, is in the folder; or in the cache that the folder is a snapshot
        of, which Hugging Face lays out as NAME/snapshots/REVISION with links to NAME/blobs."""
        root, target = self.path.resolve(), (self.path / file).resolve()
        allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
        return any(folder in target.parents for folder in allowed)

    def _merge(
        self, index: Mapping[str, str] | None, found: Mapping[str, dict[str, Entry]], faults: list[str]
    ) -> None:
        copies = Counter(name for entries in found.values() for name in entries)
        for name, count in copies.items():
            if count > 1:
                files = ", ".join(file for file, entries in found.items() if name in entries)
                faults.append(f"tensor {name} is in {count} files ({files}), expected in one")
        for file, entries in found.items():
            for name, entry in entries.items():
                if index is not None and name not in index:
                    faults.append(
                        f"{file} holds tensor {name}, which {INDEX} does not list; repair the index"
                    )
                self._entries[name] = entry
        for name, file in (index or {}).items():
            if found.get(file) and name not in found[file]:
                actual = self._entries.get(name)
                where = f"it is in {actual.file}" if actual else "no file holds it"
                faults.append(f"{INDEX} lists tensor {name} in {file}, {where}; download {file} again")

    def _faults_against(
        self, table: Mapping[str, TensorSpec], index: Mapping[str, str], needed: Set[str]
    ) -> list[str]:
        faults = []
        for name in (name for name in table if name in needed):
            shape = table[name].shape
            entry = self._entries.get(name)
            packed = self._entries.get(name + PACKED_SUFFIX)
            if packed is not None and entry is not None:
                where = f"{entry.file} and, in integers, in {packed.file}"
                faults.append(f"tensor {name} is there twice, in {where}: delete one")
                continue
            if packed is not None:
                faults += self._int_faults(name, shape)
                continue
            if entry is None:
                if name not in index:  # else its file has a fault, which has been told
                    faults.append(f"tensor {name} is missing, expected with shape {list(shape)}")
                continue
            if entry.shape != shape:
                faults.append(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, "
                    f"config.json expects {list(shape)}"
                )
            elif entry.dtype == "F8_E4M3" and len(shape) == 2:
                faults += self._scale_faults(name, entry, index)
            elif entry.dtype not in _FLOATS:
                allowed = ", ".join((*_FLOATS, "F8_E4M3 for matrices"))
                faults.append(f"{entry.file}: tensor {name} is of dtype {entry.dtype}, expected {allowed}")
        # Layers past the model's last are modules that predict further tokens, which nobody opens here.
        last = max((spec.layer or 0 for spec in table.values()), default=0)
        for name, entry in self._entries.items():
            is_mtp = (layer_of(name) or 0) > last
            if not is_mtp and name not in table and not self._belongs(name, table, index):
                faults.append(f"{entry.file}: tensor {name} has no place in the model of config.json")
        return faults

    def _belongs(self, name: str, table: Mapping[str, TensorSpec], index: Mapping[str, str]) -> bool:
        """Whether a tensor that the table does not list is part of one that it lists, and that is there, or
        in a file that has a fault."""
        listed = listed_name(name)
        part_of = listed if name.endswith(SCALE_SUFFIX) else listed + PACKED_SUFFIX
        return listed in table and (part_of in self._entries or part_of in index)

    def _scale_faults(self, name: str, entry: Entry, index: Mapping[str, str]) -> list[str]:
        blocks = tuple(-(-size // block) for size, block in zip(entry.shape, self.fp8_block))
        scale = self._entries.get(name + SCALE_SUFFIX)
        if scale is None:
            if name + SCALE_SUFFIX in index:
                return []
            return [f"{entry.file}: tensor {name} is FP8, but {name}{SCALE_SUFFIX} is missing"]
        if scale.shape != blocks or scale.dtype not in _FLOATS:
            return [
                f"{scale.file}: tensor {name}{SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}, "
                f"expected one float per {self.fp8_block[0]}×{self.fp8_block[1]} block, {list(blocks)}"
            ]
        return []

    @property
    def entries(self) -> Mapping[str, Entry]:
        """All tensors as the files' headers describe them, by name."""
        return self._entries

    def _int_faults(self, name: str, shape: tuple[int, ...]) -> list[str]:
        how = self._int_format
        if how is None:
            said = "config.json's quantization_config says nothing of that"
            return [f"tensor {name} is stored in integers, and {said}"]
        if len(shape) != 2:
            return [f"tensor {name} is stored in integers, which only matrices may be"]
        faults = []
        for suffix, expected in stored_shapes(shape, how).items():
            entry, dtypes = self._entries.get(name + suffix), _INT_DTYPES[suffix]
            if entry is None:
                faults.append(f"tensor {name} is stored in integers, but {name}{suffix} is missing")
            elif entry.shape != expected or entry.dtype not in dtypes:
                faults.append(
                    f"{entry.file}: tensor {name}{suffix} is {entry.dtype} {list(entry.shape)}, expected "
                    f"{' or '.join(dtypes)} {list(expected)} for {how.bits} bits of {list(shape)}"
                )
        return faults

    def expect(self, names: Iterable[str]) -> None:
        """Says which tensors will be asked for, in which order, so that they are brought from disk ahead."""
        stored = (self._entries.get(name + suffix) for name in names for suffix in (*SUFFIXES, ""))
        self._reader.expect((entry.file, entry.offset, entry.num_bytes) for entry in stored if entry)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that the checkpoint does not hold."""
        return [name for name in names if name not in self._entries and self.int_bits(name) is None]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header, or from where integers have it. Raises CheckpointError."""
        return self._entry(name).shape if self.int_bits(name) is None else self._int_shape(name)

    def get(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        slices: Slices | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Reads one tensor, or a slice of it, from disk, and nothing else; converts to `dtype`.

        FP8 and integer matrices are multiplied by their scales. Slices are one per dimension, of step 1.
        `out` is filled straight from disk where it has the dtype of the file and lies on the host. Raises
        CheckpointError where the tensor is missing, the file has changed, or a scale is not positive and
        finite.
        """
        if out is None:
            return _alone(self._get(name, dtype, device, slices, None))
        found = self._get(name, dtype, device, slices, out)
        return out if found is out else out.copy_(found)

    def _get(
        self, name: str, dtype: torch.dtype, device: torch.device, slices: Slices | None, out: Tensor | None
    ) -> Tensor:
        if self.int_bits(name) is not None:
            rows, columns = slices or (slice(None), slice(None))
            stored = group_scaled(*self.get_int(name, (rows, slice(None))), 8, torch.device("cpu"))
            whole = dequantize_groups(stored.values, stored.scale, stored.width, dtype)
            return whole[:, columns].to(device)
        entry = self._entry(name)
        if entry.dtype == "F8_E4M3":
            return self._get_fp8(name, entry, dtype, slices).to(device)
        straight = out if out is not None and _DTYPES[entry.dtype] == dtype and out.is_cpu else None
        return self._read(name, entry, slices, straight).to(device=device, dtype=dtype)

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is stored in FP8, with block scales beside it. Raises CheckpointError."""
        return self.int_bits(name) is None and self._entry(name).dtype == "F8_E4M3"

    def int_bits(self, name: str) -> int | None:
        """See `TensorSource.int_bits`."""
        stored = name not in self._entries and name + PACKED_SUFFIX in self._entries
        return self._int_format.bits if stored and self._int_format is not None else None

    def get_int(self, name: str, slices: Slices | None = None) -> tuple[Tensor, Tensor]:
        """See `TensorSource.get_int`. Raises CheckpointError as `get`."""
        how, (_, width) = self._int_format, self._int_shape(name)
        assert how is not None
        rows, columns = slices or (slice(None), slice(None))
        words, scale = (
            self._read(name + suffix, self._entry(name + suffix), (rows, slice(None)))
            for suffix in (PACKED_SUFFIX, INT_SCALE_SUFFIX)
        )
        scale = self._sound(name + INT_SCALE_SUFFIX, scale.float())
        if how.group_size is not None:
            first, last, _ = columns.indices(width)
            scale = scale[:, first // how.group_size : -(-last // how.group_size)]
        return from_words(words, how.bits, width)[:, columns], scale

    def _int_shape(self, name: str) -> tuple[int, ...]:
        """As it is stored, checked against the words and scales, and the table if that lists it."""
        if name in self._int_shapes:
            return self._int_shapes[name]
        entry = self._entry(name + INT_SHAPE_SUFFIX)
        shape = tuple(self._read(name + INT_SHAPE_SUFFIX, entry, None).tolist())
        expected = self._shapes.get(name, shape)
        if len(shape) != 2 or min(shape) < 1 or shape != expected or self._int_faults(name, shape):
            fault = f"{entry.file}: {name}{INT_SHAPE_SUFFIX} says {list(shape)}, which does not fit the rest"
            raise CheckpointError(self.path, [fault])
        self._int_shapes[name] = shape
        return shape

    def get_scaled(
        self, name: str, slices: Slices | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `TensorSource.get_scaled`. Raises CheckpointError as `get`."""
        entry = self._entry(name)
        scale = self._scales(name, entry)
        if slices is not None:
            bounds = [part.indices(size)[:2] for part, size in zip(slices, entry.shape)]
            blocks = [slice(first // b, -(-last // b)) for (first, last), b in zip(bounds, self.fp8_block)]
            scale = scale[blocks[0], blocks[1]]
        return self._read(name, entry, slices, out), scale

    def _scales(self, name: str, entry: Entry) -> Tensor:
        if len(entry.shape) != 2:
            raise CheckpointError(
                self.path, [f"{entry.file}: tensor {name} is FP8, which only matrices may be"]
            )
        scale_name = name + SCALE_SUFFIX
        return self._sound(scale_name, self._read(scale_name, self._entry(scale_name), None).float())

    def _sound(self, name: str, scale: Tensor) -> Tensor:
        if not bool(((scale > 0) & scale.isfinite()).all()):
            file = self._entry(name).file
            raise CheckpointError(
                self.path, [f"{file}: tensor {name} has scales that are not positive and finite"]
            )
        return scale

    def _get_fp8(self, name: str, entry: Entry, dtype: torch.dtype, slices: Slices | None) -> Tensor:
        scale = self._scales(name, entry)
        wanted = slices or (slice(None), slice(None))
        bounds = [part.indices(size)[:2] for part, size in zip(wanted, entry.shape)]
        # Whole blocks are read, so that the scales fit, and then cut.
        first = [start // block * block for (start, _), block in zip(bounds, self.fp8_block)]
        weight = self._read(name, entry, tuple(slice(f, stop) for f, (_, stop) in zip(first, bounds)))
        blocks = tuple(slice(f // b, -(-stop // b)) for f, (_, stop), b in zip(first, bounds, self.fp8_block))
        out = for_device(torch.device("cpu")).dequantize(weight, scale[blocks], self.fp8_block, dtype)
        return out[tuple(slice(start - f, None) for f, (start, _) in zip(first, bounds))]

    def _read(self, name: str, entry: Entry, slices: Slices | None, out: Tensor | None = None) -> Tensor:
        """Rows are read as they lie in the file, none but those that are asked for; columns are cut then.
        Into `out`, which is returned, if given."""
        rows = slices[0].indices(entry.shape[0])[:2] if slices else (0, *entry.shape)[:2]
        num_rows = max(rows[1] - rows[0], 0) if entry.shape else 1
        sizes = (num_rows, *entry.shape[1:]) if entry.shape else ()
        straight = out is not None and out.shape == sizes
        tensor = out if straight else torch.empty(sizes, dtype=_DTYPES[entry.dtype])
        assert tensor is not None
        row_bytes = entry.num_bytes // max(entry.shape[0], 1) if entry.shape else entry.num_bytes
        try:
            if self._reader.identity(entry.file) != self._identities[entry.file]:
                raise CheckpointError(self.path, [f"{entry.file}: tensor {name} changed since it was opened"])
            into = tensor.view(-1).view(torch.uint8).numpy().data
            self._reader.read_into(entry.file, entry.offset + rows[0] * row_bytes, into)
        except (OSError, EOFError) as error:
            fault = f"{entry.file}: tensor {name} cannot be read ({error or 'the file ends before it does'})"
            raise CheckpointError(self.path, [fault]) from error
        if straight:
            return tensor
        if slices:
            tensor = tensor[(slice(None), *slices[1:])].contiguous()
        return tensor if out is None else out.copy_(tensor)

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(self.path, [f"tensor {name} is missing; the model needs it"])
        return entry

    def close(self) -> None:
        """Lets go of the files. Tensors that were read remain."""
        self._reader.close()

    @property
    def num_read(self) -> int:
        """Bytes of data that have been read."""
        return self._reader.num_bytes

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _alone(part: Tensor) -> Tensor:
    """A part of a tensor without the rest, which a view of it would keep in memory."""
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone(memory_format=_CONTIGUOUS)
