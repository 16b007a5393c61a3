#!/usr/bin/env python3
"""What readiness for failures costs while nothing fails: CPU time per token, with all of it and with none.

    python benchmarks/recovery_overhead.py --rounds 8 --write benchmarks/results/recovery-overhead.md

Two services of the same file run side by side, one with everything switched off from outside (see
`tests/faults/hooks/without_recovery.py`). Each round loads the one, then the other; counted is the CPU time
of the service's own processes (ingress, engine, workers), from /proc, by the tokens of the round.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools"), str(ROOT)]

from faults.arena import LAYOUTS  # noqa: E402
from faults.inflict import title  # noqa: E402
from faults.leaks import ROLES  # noqa: E402
from make_checkpoint import make_checkpoint  # noqa: E402
from running_service import Service, descendants  # noqa: E402

from benchmarks.serve import Load, measure  # noqa: E402

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# A worker must outlive the heartbeats that it does not get.
ENGINE = {"lease_s": 3600.0}


def cpu_s(service: Service) -> float:
    """CPU time so far of the service's own processes, user and system."""
    total = 0
    for pid in descendants(service.process.pid):
        if title(pid) in ROLES:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


def per_token_ms(service: Service, concurrency: int, num_output_tokens: int) -> float:
    """CPU time per token of one round."""
    load = Load(service.url, "tiny", "chat", 64, num_output_tokens, 0, 300.0)
    before = cpu_s(service)
    (level,) = asyncio.run(measure(load, [concurrency], 1, 4, seed=0))
    failed = [sample.error for sample in level.samples if sample.error is not None]
    assert not failed, failed[0]
    tokens = sum(sample.num_output_tokens for sample in level.samples)
    return 1e3 * (cpu_s(service) - before) / tokens


def run(layout: str, rounds: int, concurrency: int, num_output_tokens: int) -> dict[str, list[float]]:
    """CPU time per token of every round: `with` and `without`."""
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    checkpoint = make_checkpoint(folder / "checkpoint", size="nano", seed=3, max_position_embeddings=2048)
    hooks = {"PYTHONPATH": str(ROOT / "tests" / "faults" / "hooks"), "R1_HOOKS": "without_recovery"}
    services = {}
    try:
        for name, environment in {"with": {}, "without": hooks}.items():
            (folder / name).mkdir()
            services[name] = Service(
                folder / name, f"overhead-{name}", checkpoint, LAYOUTS[layout], environment, engine=ENGINE
            ).wait_ready()
        figures: dict[str, list[float]] = {name: [] for name in services}
        for number in range(rounds + 1):
            for name, service in services.items():
                figure = per_token_ms(service, concurrency, num_output_tokens)
                if number:  # the first warms up
                    figures[name].append(figure)
                    print(f"{layout} round {number} {name}: {figure:.4f} ms", flush=True)
    finally:
        for service in services.values():
            service.interrupt()
    return figures


def row(layout: str, figures: dict[str, list[float]]) -> str:
    """One line of the table; the ratio is the median of the rounds' own ratios."""
    with_ms, without_ms = (statistics.median(figures[name]) for name in ("with", "without"))
    ratios = [a / b for a, b in zip(figures["with"], figures["without"])]
    return (
        f"| {layout} | {without_ms:.3f} | {with_ms:.3f} | {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}) | {len(ratios)} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["colocated", "disaggregated"])
    parser.add_argument("--write", type=Path, help="write the table here")
    options = parser.parse_args()
    lines = [
        "| layout | ms of CPU per token, all switched off | as shipped | ratio, median (range) | rounds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for layout in options.layouts:
        lines.append(row(layout, run(layout, options.rounds, options.concurrency, options.output_tokens)))
    print("\n".join(lines))
    if options.write is not None:
        intro = (
            "# What readiness for failures costs while nothing fails\n\n"
            f"`python benchmarks/recovery_overhead.py --rounds {options.rounds}`: two services side by side, "
            f"loaded in turn, {options.concurrency} streams of {options.output_tokens} tokens; CPU time of "
            "ingress, engine and workers. Goal: at most 1.05.\n\n"
        )
        options.write.write_text(intro + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
