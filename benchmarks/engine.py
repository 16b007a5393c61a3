"""Tokens a second of the engine's whole loop, in one process and in processes of their own, without Ray.

    python -m benchmarks.engine [--device cuda] [--streams 1 8 64] [--tokens 64] [--json FILE]

The model is the tiny R1 of the package: what is measured is the loop, its plans, links and launches, not
the model. In processes of their own there are two stages, their routers and three expert shards, and
tensors go over CUDA IPC, or through the host's memory on the CPU. At the end an expert process is killed
(SIGKILL) while 8 streams run: the longest pause is the stall, most of which is the start of its successor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

import r1_cluster
from benchmarks.processes import LocalEngine, Settings
from r1_cluster.config import LayoutConfig
from r1_cluster.records import Request, SamplingParams

CHECKPOINT = Path(r1_cluster.__file__).parent / "assets/nano_r1"
LAYOUTS = {
    "colocated": LayoutConfig(kind="colocated"),
    "disaggregated": LayoutConfig(kind="disaggregated", stages=2, expert_shards=3),
}
PROMPT_TOKENS = 16
VICTIM = "experts-1"
KILL_STREAMS = 8


def requests(count: int, num_tokens: int) -> list[Request]:
    """Seeded draws at what R1 recommends, of so many tokens each."""
    return [
        Request(
            f"r{i}",
            [5 + (7 * i + j) % 400 for j in range(PROMPT_TOKENS)],
            SamplingParams(temperature=0.6, top_p=0.95, top_k=0, seed=i),
            max_tokens=num_tokens,
            stop_token_ids=[],
            sink="sink",
            ignore_eos=True,
        )
        for i in range(count)
    ]


def rates(engine: LocalEngine, streams: list[int], num_tokens: int) -> dict[str, float]:
    """Tokens a second by number of streams, from the first token to the last."""
    engine.run(requests(max(streams), 4))  # whatever is done once, is done
    found = {}
    for count in streams:
        _, times = engine.run(requests(count, num_tokens))
        found[str(count)] = round(count * (num_tokens - 1) / (times[-1] - times[0]), 1)
    return found


def killed(engine: LocalEngine, num_tokens: int) -> dict[str, float | bool]:
    """The longest pause of 8 streams while an expert process is killed, and whether their texts are as
    before."""
    asked = requests(KILL_STREAMS, num_tokens)
    before, undisturbed = engine.run(asked)
    done = False

    def kill(count: int) -> None:
        nonlocal done
        if not done and count >= KILL_STREAMS * num_tokens // 3:
            engine.processes[VICTIM].kill()
            done = True

    after, times = engine.run(asked, kill)

    def pause(times: list[float]) -> float:
        return max(b - a for a, b in pairwise(times))

    return {
        "stall_s": round(pause(times), 3),
        "longest_pause_without_s": round(pause(undisturbed), 3),
        "texts_unchanged": after == before,
    }


def main() -> int:
    """Prints a row per layout."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    parser.add_argument(
        "--fast", action="store_true", help="not deterministic: texts may change with the batch"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    most = max(*options.streams, KILL_STREAMS)
    settings = Settings(
        checkpoint=str(CHECKPOINT),
        device=options.device,
        dtype="bfloat16" if on_gpu else "float32",
        transport="device" if on_gpu else "host memory",
        deterministic=not options.fast,
        num_pages=most * -(-(PROMPT_TOKENS + options.tokens) // 16) + 16,
        max_num_seqs=most,
        max_context_len=256 if options.tokens <= 200 else 2048,
    )
    where = torch.cuda.get_device_name() if on_gpu else "the CPU"
    print(
        f"tiny R1 on {where}, {'fast' if options.fast else 'deterministic'}, {options.tokens} tokens a stream"
    )
    print(f"| layout | start, s | {' | '.join(f'{n} streams, tok/s' for n in options.streams)} |")
    print(f"| --- | {'--- | ' * (len(options.streams) + 1)}")
    results: dict[str, object] = {
        "device": where,
        "tokens": options.tokens,
        "deterministic": not options.fast,
    }
    for name, layout in LAYOUTS.items():
        started = time.monotonic()
        with LocalEngine(settings, layout) as engine:
            start_s = time.monotonic() - started
            measured = rates(engine, options.streams, options.tokens)
            print(f"| {name} | {start_s:.1f} | {' | '.join(map(str, measured.values()))} |", flush=True)
            results[name] = {"start_s": round(start_s, 1), "tokens_per_s": measured}
            if name == "disaggregated":
                results["killed"] = outcome = killed(engine, options.tokens)
                print(f"\n{VICTIM} killed: {outcome}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
