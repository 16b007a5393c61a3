"""What an FP8 cache costs the embedded nano R1 in right answers to its held-out questions; writes a report.

    PYTHONPATH=. python -m benchmarks.kv_cache                                     # some minutes on two cores
    PYTHONPATH=. python -m benchmarks.kv_cache --every 8 --samples 0 --report /tmp/a.md

The engine answers in one process on the CPU, in float32, once with its cache in float32 and once in FP8:
greedily, and by sampling with the same seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.heldout import HELD_OUT, final_answer
from benchmarks.processes import LocalEngine, Settings
from r1_cluster.config import ASSETS, KvCacheDtype, LayoutConfig
from r1_cluster.records import Request, SamplingParams
from r1_cluster.text.template import ChatTemplate
from r1_cluster.text.tokenizer import Tokenizer

MODEL = ASSETS / "nano_r1"
REPORT = Path(__file__).parent / "results/kv-cache-nano.md"
MAX_TOKENS = 400
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0)
TEMPERATURE, TOP_P = 0.6, 0.95
CACHES: dict[str, KvCacheDtype | None] = {"float32": None, "FP8": "fp8"}


@dataclass(frozen=True)
class Answers:
    """By question, then greedy and each sample: the tokens, and whether they are right."""

    tokens: list[list[list[int]]]
    right: list[list[bool]]
    seconds: float

    def share(self, chosen: list[int], *, sampled: bool) -> float:
        """Of right answers to these questions, greedy or sampled."""
        found = [right for i in chosen for right in (self.right[i][1:] if sampled else self.right[i][:1])]
        return sum(found) / len(found)


def answers(items: list[dict[str, str]], num_samples: int, cache: KvCacheDtype | None) -> Answers:
    """The engine's answers to all questions."""
    tokenizer = Tokenizer.from_folder(MODEL)
    template = ChatTemplate.from_folder(MODEL, tokenizer)
    eos = json.loads((MODEL / "config.json").read_text())["eos_token_id"]
    kinds = [GREEDY, *(SamplingParams(TEMPERATURE, TOP_P, 0, seed) for seed in range(num_samples))]
    requests = [
        Request(f"{i} {j}", prompt, sampling, MAX_TOKENS, [eos], "sink")
        for i, item in enumerate(items)
        for prompt in [template.prompt_ids([{"role": "user", "content": item["prompt"]}])]
        for j, sampling in enumerate(kinds)
    ]
    settings = Settings(
        checkpoint=str(MODEL),
        device="cpu",
        dtype="float32",
        transport="sockets",
        num_pages=4096,
        max_context_len=1024,
        step_timeout_s=60.0,
        kv_cache_dtype=cache,
    )
    with LocalEngine(settings, LayoutConfig()) as engine:
        began = time.monotonic()
        texts, _ = engine.run(requests)
        seconds = time.monotonic() - began

    def is_right(tokens: list[int], result: str) -> bool:
        if len(tokens) == MAX_TOKENS and tokens[-1] != eos:
            return False  # cut off
        text = tokenizer.decode([token for token in tokens if token != eos])
        return final_answer(text.rpartition("</think>")[2]) == result

    tokens = [[texts[f"{i} {j}"] for j in range(len(kinds))] for i in range(len(items))]
    right = [[is_right(one, item["result"]) for one in own] for own, item in zip(tokens, items, strict=True)]
    return Answers(tokens, right, seconds)


def report(items: list[dict[str, str]], found: dict[str, Answers], num_samples: int, every: int) -> str:
    """The report's text."""
    plain, fp8 = found["float32"], found["FP8"]
    kinds = [("greedy", False)] + [(f"pass@1 of {num_samples}", True)] * (num_samples > 0)
    lines = [
        "# The embedded nano R1 with its KV cache in FP8",
        "",
        f"Written by `python -m benchmarks.kv_cache --samples {num_samples} --every {every}` on "
        f"{os.cpu_count()} cores, no GPU: {len(items):,} of the held-out questions, half of them in wordings "
        f"that training never saw, through the engine (float32, deterministic), greedily"
        + (f" and {num_samples} times at temperature {TEMPERATURE}, top-p {TOP_P}" if num_samples else "")
        + ", with the same seeds for each.",
        "",
        "| cache | s | " + " | ".join(f"{kind}: known | unseen | all | lost" for kind, _ in kinds) + " |",
        "| --- | ---: | " + " | ".join(["---: | ---: | ---: | ---:"] * len(kinds)) + " |",
    ]
    known, unseen = ([i for i, item in enumerate(items) if item["wording"] == w] for w in ("known", "unseen"))
    for name, own in found.items():
        cells = []
        for _, sampled in kinds:
            shares = [own.share(chosen, sampled=sampled) for chosen in (known, unseen, known + unseen)]
            lost = 100 * (plain.share(known + unseen, sampled=sampled) - shares[2])
            cells.append(" | ".join(f"{share:.4f}" for share in shares) + f" | {lost:+.2f} points")
        lines.append(f"| {name} | {own.seconds:.0f} | " + " | ".join(cells) + " |")
    other = sum(a[0] != b[0] for a, b in zip(plain.tokens, fp8.tokens))
    gained = sum(b[0] and not a[0] for a, b in zip(plain.right, fp8.right))
    lost_ = sum(a[0] and not b[0] for a, b in zip(plain.right, fp8.right))
    lines += [
        "",
        f"Of {len(items):,} greedy answers {other} are not the same text; {lost_} are right with float32 "
        f"alone, {gained} with FP8 alone.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Asks, and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=2, help="sampled answers per question (default 2)")
    parser.add_argument("--every", type=int, default=1, help="ask every so many-th question alone")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    items = [json.loads(line) for line in HELD_OUT.read_text().splitlines()][:: options.every]
    found = {name: answers(items, options.samples, cache) for name, cache in CACHES.items()}
    text = report(items, found, options.samples, options.every)
    options.report.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
