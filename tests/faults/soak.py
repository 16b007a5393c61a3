"""Streams without end, and every few seconds something dies under them.

    python tests/faults/soak.py --seconds 1200 --every 6 --seed 7 --json soak.json

Clients in a closed loop send requests whose undisturbed answers were computed at the start; each answer is
compared with its own, token for token. The exit code is 1 if one was lost or wrong.
"""

import argparse
import json
import random
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

if __name__ == "__main__":
    TESTS = Path(__file__).parents[1]
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

from faults.arena import LAYOUTS, Arena
from faults.leaks import memory
from faults.load import Load, quantile, streams
from make_checkpoint import make_checkpoint

HOWS = ("kill", "kill", "kill", "stop", "cut", "exception")
"""A plain death is the most frequent one."""
MEGABYTE = 1 << 20


class Clients:
    """Closed loops: each asks, compares, and asks again until `stop`."""

    def __init__(self, arena, expected, count, seed):
        self.num_streams = 0
        self.wrong = []
        self.stalls = []
        self._arena = arena
        self._expected = expected
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {i}"),)) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self):
        """Lets every stream end, and no other begin."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, rng):
        while not self._stop.is_set():
            index = rng.randrange(len(self._expected))
            (stream,) = Load(
                self._arena.service.url, self._arena.folder, [self._arena.requests[index]]
            ).join()
            with self._lock:
                self.num_streams += 1
                self.stalls += [max(stream.pauses(stream.began), default=0.0)]
                if stream.answer != self._expected[index]:
                    self.wrong.append((index, stream.error or "its tokens differ"))
                    print(f"request {index}: {self.wrong[-1][1]}", flush=True)
            if stream.error is not None:
                self._stop.wait(0.2)  # no storm of refused requests


class Memory:
    """Resident memory by kind of process, over time."""

    def __init__(self):
        self._samples = defaultdict(list)

    def sample(self, processes):
        """`processes`: {pid: title}. The mean of a kind, because their number changes when one dies."""
        by_kind = defaultdict(list)
        for pid, resident in memory(processes).items():
            by_kind[processes[pid]].append(resident)
        for kind, values in by_kind.items():
            self._samples[kind].append(sum(values) / len(values) / MEGABYTE)

    def table(self):
        """Of each kind the median of the first and of the last third of the time, MB."""
        table = {}
        for kind, values in sorted(self._samples.items()):
            third = max(len(values) // 3, 1)
            table[kind] = {
                "first_third_mb": round(quantile(values[:third], 0.5), 1),
                "last_third_mb": round(quantile(values[-third:], 0.5), 1),
                "max_mb": round(max(values), 1),
            }
        return table


def disturb(arena, rng, deaths):
    """Hurts a part that is there, be the service in a recovery or not."""
    seen = arena.observer.ask()
    if not seen.get("engines"):
        return  # the engine is dead, or hangs: its turn comes first
    targets = arena.targets(seen)
    part = rng.choice(sorted(set(targets.pids) - {"ingress"}))
    how = rng.choice(HOWS)
    try:
        arena.inflict(targets, part, how)
    except (AssertionError, ProcessLookupError):
        return  # it has died meanwhile
    deaths[f"{part} {how}"] += 1
    print(f"{time.strftime('%H:%M:%S')} {part} {how}", flush=True)


def soak(arena, *, seconds, every, clients, seed):
    """The whole soak; returns its report."""
    expected = [stream.answer for stream in arena.load().join()]
    assert all(answer[-1] is None for answer in expected), "the undisturbed answers failed"
    before = arena.observer.holdings()
    rng, deaths, resident = random.Random(seed), Counter(), Memory()
    recoveries = Counter()
    driven = Clients(arena, expected, clients, seed)
    end = time.monotonic() + seconds
    try:
        while (left := end - time.monotonic()) > 0:
            threading.Event().wait(min(every, left))
            resident.sample(arena.observer.processes())
            if left > every:
                disturb(arena, rng, deaths)
    finally:
        driven.stop()
    for line in (arena.folder / "events").read_text().splitlines():
        recoveries[json.loads(line)[1]] += 1
    try:
        arena.observer.wait_equal(before, timeout_s=60)
        leaked = None
    except AssertionError as error:
        leaked = str(error)
    return {
        "seed": seed,
        "seconds": seconds,
        "layout": arena.service.data["layout"],
        "streams": driven.num_streams,
        "lost_or_wrong": len(driven.wrong),
        "wrong": driven.wrong[:50],
        "stall_p50_s": quantile(driven.stalls, 0.5),
        "stall_p99_s": quantile(driven.stalls, 0.99),
        "deaths": dict(sorted(deaths.items())),
        "num_deaths": sum(deaths.values()),
        "losses_noticed": recoveries["lost"],
        "engines_started": recoveries["engine"],
        "memory": resident.table(),
        "leaked": leaked,
        "pages_used_at_end": sum(e.get("pages_used", 0) for e in arena.observer.ask().get("engines", [])),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--every", type=float, default=6, help="seconds from death to death")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--clients", type=int, default=12, help="streams at the same time (default 12)")
    parser.add_argument("--layout", choices=LAYOUTS, default="disaggregated")
    parser.add_argument("--json", type=Path, help="write the report here")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    checkpoint = make_checkpoint(folder / "checkpoint", size="nano", seed=3, max_position_embeddings=2048)
    arena = Arena(folder, checkpoint, LAYOUTS[arguments.layout], requests=streams(32, max_tokens=60))
    try:
        report = soak(
            arena,
            seconds=arguments.seconds,
            every=arguments.every,
            clients=arguments.clients,
            seed=arguments.seed,
        )
    finally:
        arena.close()
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    shutil.rmtree(folder)
    return 1 if report["lost_or_wrong"] or report["leaked"] else 0


if __name__ == "__main__":
    sys.exit(main())
