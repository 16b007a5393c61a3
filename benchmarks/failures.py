"""The table of stalls, from what `pytest tests/faults -m "" --stalls FILE` measured.

python benchmarks/failures.py benchmarks/results/failures.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
TIMES = ("decode", "prefill", "recovery")
HOWS = {"kill": "SIGKILL", "stop": "SIGSTOP", "cut": "link cut", "exception": "exception in a step"}
Row = dict[str, Any]


def quantile(values: list[float], q: float) -> float:
    """The value at rank q · (n − 1), rounded."""
    return sorted(values)[round(q * (len(values) - 1))]


def seconds(values: list[float]) -> str:
    """p50 / p99, or a dash where nothing was measured."""
    return f"{quantile(values, 0.5):.2f} / {quantile(values, 0.99):.2f}" if values else "–"


def line(rows: list[Row]) -> str:
    """The table's line for one kind of death of one part."""
    noticed = [row["detection_s"] for row in rows if row["detection_s"] is not None]
    starts = [row["start_s"] for row in rows if row.get("start_s") is not None]
    longest: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        longest[row["when"]] += [max(stalls, default=0.0) for stalls in row["stalls"]]
    cells = [
        rows[0]["layout"],
        rows[0]["part"],
        HOWS[rows[0]["how"]],
        str(sum(row["streams"] for row in rows)),
        str(sum(row["lost"] for row in rows)),
        f"{max(noticed):.2f}" if noticed else "–",
        f"{max(starts):.2f}" if starts else "–",
        *(seconds(longest[when]) for when in TIMES),
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row]) -> str:
    """The page."""
    kinds: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row["layout"], row["part"], row["how"]].append(row)
    count = sum(row["streams"] for row in rows)
    head = f"""# Stalls when a part dies

{datetime.date.today()}, {os.cpu_count()} cores, no GPU, random nano checkpoint, `engine.step_timeout_s: 3`,
chunks of 64 tokens, 16 streams (greedy and seeded) at a time through HTTP: `make test-faults`.
{len(rows)} deaths under {count} streams; lost or changed: {sum(row["lost"] for row in rows)}.

*Noticed*: from the death until an engine knew of it (of an engine: until the next one had taken over),
the longest of the runs. *Start*: the new process's start and load, the longest; a dash where a spare, a
copy or the worker itself took the place. *Stall*: the longest pause of each stream after the death, p50 / p99
over the streams; all in s. In prefill it includes the wait for prompts still to be computed. *In
a recovery*: another part had been killed just before, and the stall counts from that. *guarded*: the
disaggregated layout with a spare worker and a standby engine; *copies*: with one further host of each shard.

| layout | what died | how | streams | lost | noticed | start | stall in decode | in prefill | in a recovery |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
    return head + "\n".join(line(group) for group in kinds.values()) + "\n"


def main() -> None:
    """Reads the records and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "failures.md")
    arguments = parser.parse_args()
    rows = [json.loads(text) for text in arguments.records.read_text().splitlines()]
    arguments.out.write_text(table(rows))
    print(f"{len(rows)} deaths: {arguments.out}")


if __name__ == "__main__":
    main()
