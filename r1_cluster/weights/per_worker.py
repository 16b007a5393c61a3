"""Rewrites a checkpoint's files for a layout: one for each worker, in the order in which it loads.

What comes of it is a checkpoint like any other. A worker of that layout finds all of its tensors in one file,
one behind the other; every other reader finds them by the index.

A tensor that several workers load lies in the file of the first of them. Those that no worker loads (an MTP
module's) have a file of their own. The format wants a file without gaps, and readers want each tensor aligned
to its type; so the few whose bytes are no multiple of 8, of which the published models have none, lie at the
end of their file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from r1_cluster.weights.headers import INDEX
from r1_cluster.weights.inventory import Stored
from r1_cluster.weights.rewrite import CONFIG, Files, Outcome, Progress, Rewrite, files_beside, write_index
from r1_cluster.weights.stream import Reader, Write, copy, lay_out, write_whole
from r1_cluster.weights.tensors import SUFFIXES, IntFormat, TensorSpec

UNUSED = "mtp.safetensors"
"""Holds what no worker loads."""


def convert_for_workers(
    source: Path,
    target: Path,
    table: Iterable[TensorSpec],
    workers: Mapping[str, Iterable[str]],
    *,
    fp8_block: tuple[int, int] | None,
    int_format: IntFormat | None,
    module: Iterable[TensorSpec] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Writes WORKER.safetensors for each of `workers`, of the tensors that it loads, in their order, and an
    index; copies whatever else lies beside the weights. All types stay as they are.

    Names are those of `table`, and of `module`, the MTP module's, which need not be there: an FP8 tensor's
    scales, and the three that an integer tensor is stored as, go with it. Goes on where an earlier run ended.
    Raises CheckpointError for what is wrong with the source, RewriteError for the target and a full disk.
    """
    files = Files.of(source, table, fp8_block, int_format, module=module)
    return _PerWorker(files, target, workers).run(progress)


class _PerWorker(Rewrite):
    last = (CONFIG, INDEX)

    def __init__(self, files: Files, target: Path, workers: Mapping[str, Iterable[str]]) -> None:
        super().__init__(files, target)
        self.config = (self.source / CONFIG).read_bytes()
        self.index = (self.source / INDEX).read_bytes() if (self.source / INDEX).exists() else b"{}"
        self.beside = files_beside(self.source)
        left = dict(self.entries)
        contents = {}
        for worker, names in workers.items():
            stored_as = [name + suffix for name in names for suffix in (*SUFFIXES, "")]
            contents[f"{worker}.safetensors"] = {name: left.pop(name) for name in stored_as if name in left}
        contents[UNUSED] = left
        self.plan = {
            file: lay_out(
                ((Stored(name, entry.dtype, entry.shape, None), name) for name, entry in entries.items()),
                as_given=True,
            )
            for file, entries in contents.items()
            if entries
        }

    def asked(self) -> bytes:
        return b"per worker" + self.config + b"\0" + self.index

    def write_tensors(self, reader: Reader, file: str, write: Write) -> None:
        for placed in self.plan[file].tensors.values():
            copy(reader, placed, write)

    def finish(self) -> None:
        write_index(self.target, self.plan, self.index)
        write_whole(self.target / CONFIG, self.config)
