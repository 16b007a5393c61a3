"""Tokens a second of the engine's whole loop in each layout, on two cores, without Ray and HTTP.

    PYTHONPATH=. python -m benchmarks.layouts [--rounds 5] [--report FILE]    # 10 minutes on two cores

Two models: the embedded nano R1, and a random one of the size `small` of tools/make_checkpoint.py. Every
engine and every worker is a process of its own; all are there from the start, and take turns in every round,
so that what else the machine does hits all ways alike. What was measured while others took more than a tenth
of the cores is measured again. A worker computes with one thread on the core that it is given; engines, and
whatever is given none, run on either.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.engine import CHECKPOINT, PROMPT_TOKENS, requests
from benchmarks.processes import LocalEngine, Settings
from r1_cluster.config import LayoutConfig

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

from make_checkpoint import make_checkpoint  # noqa: E402

REPORT = Path(__file__).parent / "results/layouts.md"
COLOCATED, TWO_COLOCATED, STAGES = "colocated", "two colocated engines", "two stages"
RANKS, DISAGGREGATED, PARALLEL = "two ranks", "disaggregated", "expert-parallel"
STREAMS = (1, 8, 32)
QUIET = 0.1
"""The share of all cores that other processes may take during a measurement."""
TRIES = 4
"""After so many the quietest one counts."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
Cores = Mapping[str, int]
"""By a worker's name, the core that it runs on."""


WAYS: dict[str, tuple[tuple[LayoutConfig, Cores], ...]] = {
    COLOCATED: ((LayoutConfig(), {"stage-0": 0}),),
    TWO_COLOCATED: ((LayoutConfig(), {"stage-0": 0}), (LayoutConfig(), {"stage-0": 1})),
    STAGES: (
        (
            LayoutConfig(kind="disaggregated", stages=2),
            {"stage-0": 0, "router-0": 0, "stage-1": 1, "router-1": 1},
        ),
    ),
    RANKS: ((LayoutConfig(tensor_parallel=2), {"stage-0-rank-0": 0, "stage-0-rank-1": 1}),),
    PARALLEL: ((LayoutConfig(kind="expert-parallel", data_parallel=2), {"dp-0": 0, "dp-1": 1}),),
    DISAGGREGATED: ((LayoutConfig(kind="disaggregated"), {"stage-0": 0, "router-0": 1, "experts-0": 1}),),
}
"""Engines that work at the same time, each over a layout of its own."""


class Goal(NamedTuple):
    """One way's tokens a second over another one's."""

    way: str
    over: str
    model: str
    streams: int
    least: float


GOALS = (
    Goal(RANKS, COLOCATED, "small", 1, 1.2),
    *(Goal(PARALLEL, TWO_COLOCATED, model, 32, 0.8) for model in ("nano R1", "small")),
    *(Goal(DISAGGREGATED, COLOCATED, "nano R1", streams, 0.5) for streams in (8, 32)),
)


@dataclass
class Model:
    """`num_tokens`: how many each stream gets, by the number of streams. `rates`: by way and number of
    streams, tokens a second of every round. `others`: the share of all cores that other processes had in
    each of these measurements."""

    name: str
    checkpoint: Path
    num_tokens: Mapping[int, int]
    rates: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)


class Hosted:
    """An engine in a process of its own. To be closed."""

    def __init__(self, settings: Settings, layout: LayoutConfig, cores: Cores) -> None:
        context = multiprocessing.get_context("spawn")
        self.pids: list[int] = []
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=host, args=(settings, layout, cores, theirs))
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Waits until it has started; `pids` are its processes then."""
        self.pids = self._pipe.recv()

    def ask(self, streams: int, num_tokens: int) -> None:
        """Has it answer so many requests at the same time."""
        self._pipe.send((streams, num_tokens))

    def times(self) -> list[float]:
        """When tokens came of what was asked last, by the machine's monotonic clock."""
        found: list[float] = self._pipe.recv()
        return found

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def host(settings: Settings, layout: LayoutConfig, cores: Cores, parent: Connection) -> None:
    """The process of an engine."""
    with LocalEngine(settings, layout) as engine:
        pids = {name: process.pid or 0 for name, process in engine.processes.items()}
        for name, core in cores.items():
            os.sched_setaffinity(pids[name], {core})
        parent.send([os.getpid(), *pids.values()])
        while (asked := parent.recv()) is not None:
            _, times = engine.run(requests(*asked))
            parent.send(times)


def settings_of(model: Model) -> Settings:
    """What an engine is started with."""
    longest = PROMPT_TOKENS + max(model.num_tokens.values())
    return Settings(
        checkpoint=str(model.checkpoint),
        device="cpu",
        dtype="float32",
        transport="sockets",
        num_pages=max(STREAMS) * -(-longest // 16) + 16,
        max_num_seqs=max(STREAMS),
        max_context_len=longest,
        step_timeout_s=60.0,
    )


def rate(engines: Sequence[Hosted], streams: int, num_tokens: int) -> float:
    """Tokens a second of engines that share so many streams, from the first token to the last."""
    shares = [streams // len(engines) + (i < streams % len(engines)) for i in range(len(engines))]
    asked = [(engine, share) for engine, share in zip(engines, shares) if share]
    for engine, share in asked:
        engine.ask(share, num_tokens)
    times = [engine.times() for engine, _ in asked]
    seconds = max(own[-1] for own in times) - min(own[0] for own in times)
    return streams * (num_tokens - 1) / seconds


def busy_s(pids: Sequence[int] | None = None) -> float:
    """CPU time so far of these processes, or of all there are, the machine's own work included."""
    if pids is None:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / TICKS_PER_S  # without idle and iowait
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
    return sum(int(own[11]) + int(own[12]) for own in fields) / TICKS_PER_S


def quiet_rate(
    engines: Sequence[Hosted], streams: int, num_tokens: int, pids: Sequence[int]
) -> tuple[float, float]:
    """(the rate, the share of all cores that others than `pids` had meanwhile)."""
    tries: list[tuple[float, float]] = []
    while len(tries) < TRIES:
        began, others = time.monotonic(), busy_s() - busy_s(pids)
        found = rate(engines, streams, num_tokens)
        others = busy_s() - busy_s(pids) - others
        share = max(others, 0.0) / (time.monotonic() - began) / (os.cpu_count() or 1)
        tries.append((share, found))
        if share <= QUIET:
            break
        time.sleep(1.0)
    share, found = min(tries)
    return found, share


def measure(model: Model, rounds: int) -> None:
    """Fills the model's rates."""
    with ExitStack() as stack:
        started: dict[str, list[Hosted]] = {}
        for name, way in WAYS.items():
            for layout, cores in way:
                engine = Hosted(settings_of(model), layout, cores)
                stack.callback(engine.close)
                started.setdefault(name, []).append(engine)
        for engines in started.values():
            for engine in engines:
                engine.ready()
                engine.ask(max(STREAMS), 4)  # whatever is done once, is done
                engine.times()
        pids = [os.getpid(), *(pid for own in started.values() for engine in own for pid in engine.pids)]
        for number in range(rounds):
            for streams in STREAMS:
                for name, engines in started.items():
                    found, others = quiet_rate(engines, streams, model.num_tokens[streams], pids)
                    model.rates.setdefault((name, streams), []).append(found)
                    model.others.append(others)
            at = ", ".join(f"{name} {model.rates[name, max(STREAMS)][-1]:.0f}" for name in started)
            print(f"{model.name}, round {number}: {at} tokens/s at {max(STREAMS)}", flush=True)


def ratio(model: Model, way: str, over: str, streams: int) -> list[float]:
    """Of every round."""
    return [a / b for a, b in zip(model.rates[way, streams], model.rates[over, streams], strict=True)]


def report(models: Sequence[Model], rounds: int) -> str:
    """The report's text."""
    lines = [
        "# Layouts on two cores",
        "",
        f"Written by `python -m benchmarks.layouts --rounds {rounds}`: {os.cpu_count()} cores, torch "
        f"{torch.__version__}, Python {platform.python_version()}, float32, deterministic. The engine's "
        "whole loop over worker processes of one thread each, without Ray and HTTP; a way's workers are on "
        "the cores that `WAYS` gives them. All ways take turns in each round; medians, and in brackets the "
        "median of the rounds' ratios to colocated. Meanwhile other processes had "
        f"{statistics.median(share for model in models for share in model.others):.0%} of the cores (median; "
        f"at most {max(share for model in models for share in model.others):.0%}).",
    ]
    for model in models:
        lengths = ", ".join(f"{model.num_tokens[streams]}" for streams in STREAMS)
        lines += [
            "",
            f"## {model.name}",
            "",
            f"Tokens a second of so many streams of {lengths} tokens each.",
            "",
            f"| layout | {' | '.join(f'{streams} streams' for streams in STREAMS)} |",
            f"| --- |{' ---: |' * len(STREAMS)}",
        ]
        for way in WAYS:
            cells = [
                f"{statistics.median(model.rates[way, streams]):.1f} "
                f"({statistics.median(ratio(model, way, COLOCATED, streams)):.2f})"
                for streams in STREAMS
            ]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += ["", "## Goals", "", "| goal | median (range) of the rounds' ratios | |", "| --- | --- | --- |"]
    for goal in GOALS:
        (model,) = [model for model in models if model.name == goal.model]
        ratios = ratio(model, goal.way, goal.over, goal.streams)
        median = statistics.median(ratios)
        plural = "s" if goal.streams > 1 else ""
        lines.append(
            f"| {goal.model}, {goal.streams} stream{plural}: {goal.way} ≥ {goal.least} × {goal.over} "
            f"| {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {'met' if median >= goal.least else 'not met'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = make_checkpoint(Path(folder) / "small", size="small", seed=3)
        models = [
            Model("nano R1", CHECKPOINT, {1: 256, 8: 128, 32: 64}),
            Model("small", small, {1: 48, 8: 24, 32: 12}),
        ]
        for model in models:
            measure(model, options.rounds)
    text = report(models, options.rounds)
    options.report.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
