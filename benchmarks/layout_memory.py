"""What published models take of devices' memory in each layout: the tables of docs/layouts.md.

    python -m benchmarks.layout_memory [--write]    # --write: into the page, between its two marks

Weights are weighed as a worker loads them, over tensors without data; workspace is what a worker asks its
device for before it starts; what is left is for KV. No GPU and no checkpoint is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r1_cluster.config import LayoutConfig
from r1_cluster.engine.parts import weight_bytes
from r1_cluster.models.config import ModelConfig
from r1_cluster.models.family import parse_config
from r1_cluster.models.presets import presets
from r1_cluster.planning.layout import Layout, WorkerSpec, build_layout
from r1_cluster.planning.memory import Room, room
from r1_cluster.weights.tensors import INT8

PAGE = Path(__file__).parents[1] / "docs/layouts.md"
BEGIN, END = "<!-- python -m benchmarks.layout_memory --write -->\n", "<!-- end -->\n"
SHARE = 0.9
"""Of a device's memory that a worker may have; the rest is for driver, libraries and allocator."""
MAX_NUM_SEQS, MAX_BATCH_TOKENS, MAX_CONTEXT_LEN = 256, 4096, 65536
"""The engine's settings; the tokens of a step are divided among data ranks."""
R1, LLAMA = "DeepSeek-R1", "DeepSeek-R1-Distill-Llama-70B"


Keys = dict[str, int | str]
"""What a service file says below `layout`."""


@dataclass(frozen=True)
class Machines:
    """So many devices of `gb` · 10⁹ bytes, and the layouts of a model for them, as in a service file. `int8`:
    in INT8 as `weights quantize` makes it, else as it is published."""

    model: str
    count: int
    device: str
    gb: float
    layouts: tuple[Keys, ...]
    int8: bool = False


def _apart(**keys: int) -> Keys:
    return {"kind": "disaggregated", **keys}


def _parallel(data_parallel: int, **keys: int) -> Keys:
    return {"kind": "expert-parallel", "data_parallel": data_parallel, **keys}


_SHOWN_H100 = 81559 * 2**20 / 10**9
"""What the driver shows of an H100, in MiB: more than the 80 GB of its data sheet."""
MACHINES = (
    Machines(
        R1,
        16,
        "H200",
        141,
        (
            {"tensor_parallel": 16},
            _parallel(16),
            _parallel(16, redundant_experts=1),
            _apart(stages=2, expert_shards=12),
        ),
    ),
    Machines(R1, 8, "H200", 141, ({"tensor_parallel": 8}, _parallel(8), _apart(stages=1, expert_shards=6))),
    Machines(R1, 8, "MI300X", 192, ({"tensor_parallel": 8}, _parallel(8), _apart(stages=2, expert_shards=4))),
    Machines(
        LLAMA,
        4,
        "H100",
        80,
        ({"tensor_parallel": 4}, _apart(stages=2, tensor_parallel=2), _apart(stages=4)),
    ),
    Machines(LLAMA, 2, "H100", 80, ({"tensor_parallel": 2}, _apart(stages=2))),
    Machines(LLAMA, 2, "H100", _SHOWN_H100, ({"tensor_parallel": 2},)),
    Machines(LLAMA, 2, "H100", 80, ({"tensor_parallel": 2},), int8=True),
)


def config_of(machines: Machines) -> ModelConfig:
    """The model's, with weights in what they are stored in there."""
    config = parse_config(presets()[machines.model])
    return replace(config, fp8_block=None, int_format=INT8) if machines.int8 else config


def groups(layout: Layout) -> list[list[WorkerSpec]]:
    """Workers that hold as much as each other, but for what cannot be divided evenly: the last of a group
    has the most of that."""
    found: dict[object, list[WorkerSpec]] = {}
    for worker in layout.workers:
        found.setdefault((worker.roles, worker.stage, worker.router), []).append(worker)
    return [*found.values()]


def data_ranks(layout: Layout) -> int:
    """How many workers, or groups of them, have requests and KV of their own."""
    return sum(w.stage is not None and w.stage[0] == 0 and w.rank == 0 for w in layout.workers)


def rooms(config: ModelConfig, layout: Layout, gb: float) -> list[tuple[str, Room, Room]]:
    """Of each group: who is in it, and the room of a worker whose KV is in BF16 and in FP8."""
    found = []
    for workers in groups(layout):
        worker = workers[-1]
        weights = weight_bytes(config, worker)
        plain, fp8 = (
            room(
                config,
                layout,
                worker,
                weights=weights,
                device_bytes=int(SHARE * gb * 10**9),
                max_num_seqs=MAX_NUM_SEQS,
                max_batch_tokens=MAX_BATCH_TOKENS // data_ranks(layout),
                max_context_len=MAX_CONTEXT_LEN,
                fp8_cache=fp8_cache,
            )
            for fp8_cache in (False, True)
        )
        who = f"`{worker.name}`" if len(workers) == 1 else f"{len(workers)} like `{worker.name}`"
        found.append((who, plain, fp8))
    return found


def table(machines: Machines) -> list[str]:
    """A heading, and a line for each group of workers of each layout."""
    form = "INT8" if machines.int8 else "FP8" if config_of(machines).fp8_block else "BF16"
    lines = [
        f"### {machines.model.removeprefix('DeepSeek-R1-Distill-')} in {form} on "
        f"{machines.count} × {machines.device}, {machines.gb:.4g} GB each",
        "",
        "| `layout` | tokens of KV | in FP8 | workers | weights, GB | workspace, GB | left, GB "
        "| KV, bytes a token |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    config = config_of(machines)
    for keys in machines.layouts:
        layout = build_layout(LayoutConfig.model_validate(keys), config)
        assert len(layout.workers) == machines.count
        said = f"`{{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}`"
        found = rooms(config, layout, machines.gb)
        cells = " | ".join([said, *(_tokens(layout, [one[i] for one in found]) for i in (1, 2))])
        for who, plain, _ in found:
            taken = " | ".join(f"{size / 10**9:.1f}" for size in (plain.weights, plain.workspace, plain.rest))
            lines.append(
                f"| {cells} | {who} | {taken} | {f'{plain.token_bytes:,}' if plain.token_bytes else ''} |"
            )
            cells = " | | "
    return lines


def _tokens(layout: Layout, of_workers: Sequence[Room]) -> str:
    """What the whole layout can keep."""
    if min(one.rest for one in of_workers) < 0:
        return "does not fit"
    return f"{data_ranks(layout) * min(one.tokens for one in of_workers if one.token_bytes):,}"


def tables() -> str:
    """All of them."""
    return "\n".join(line for machines in MACHINES for line in [*table(machines), ""])


def with_tables(page: str, found: str) -> str:
    """A page with these tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{found}{END}{rest.partition(END)[2]}"


def main() -> None:
    """Prints the tables, or writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write", action="store_true", help="into docs/layouts.md")
    if not parser.parse_args().write:
        print(tables(), end="")
        return
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(page, tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
