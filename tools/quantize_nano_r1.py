#!/usr/bin/env python3
"""What INT8 and INT4 cost the embedded nano R1: errors of its weights, held-out accuracy; writes a report.

    python tools/quantize_nano_r1.py                                # some minutes on two cores
    python tools/quantize_nano_r1.py --samples 0 --report /tmp/a.md # greedy answers alone

All 1,600 questions of the held-out set are asked of the checkpoint as it is shipped and of what the weights
of its INT8 and INT4 forms stand for, in float32, greedily and by sampling, with the same seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing
from nano_r1.evaluate import TEMPERATURE, TOP_P, boxed, generation_pass
from nano_r1.heldout import HeldOut, read_held_out
from nano_r1.tokenizer import ChatEncoder
from safetensors.torch import save_file
from tokenizers import Tokenizer

from r1_cluster.cli.quantize import error_table
from r1_cluster.models.family import load_config, mtp_table, tensor_table
from r1_cluster.weights.checkpoint import Checkpoint
from r1_cluster.weights.quantize import quantize_checkpoint
from r1_cluster.weights.tensors import INT4, INT8

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "r1_cluster/assets/nano_r1"
REPORT = ROOT / "benchmarks/results/quantize-nano.md"
FORMATS = {"INT8": INT8, "INT4": INT4}
MAY_LOSE = 0.005  # by INT8, of the share of right answers


@dataclass(frozen=True)
class Score:
    """Per question: whether the greedy answer is right, and what share of the sampled ones."""

    items: list[HeldOut]
    greedy: list[bool]
    sampled: list[float]

    def share(self, wording: str | None = None, *, sampled: bool = False) -> float:
        """Of right answers, of all questions or of those in one kind of wording."""
        values = self.sampled if sampled else self.greedy
        chosen = [v for v, item in zip(values, self.items) if wording in (None, item.wording)]
        return sum(chosen) / len(chosen)


def in_floats(folder: Path, target: Path) -> Path:
    """What a checkpoint's weights stand for, in float32, with its other files."""
    config = load_config(folder)
    target.mkdir()
    specs = (*tensor_table(config), *mtp_table(config))
    with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
        device = torch.device("cpu")
        tensors = {spec.name: checkpoint.get(spec.name, torch.float32, device).clone() for spec in specs}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folder / "config.json", target / "config.json")
    return target


def measure(
    folders: dict[str, Path], encoder: ChatEncoder, items: list[HeldOut], num_samples: int, num_workers: int
) -> dict[str, Score]:
    """Each model's score; the passes over the questions share `num_workers` processes."""
    prompts = [encoder.prompt(item.prompt) for item in items]
    passes = [(folder, prompts, i) for folder in folders.values() for i in range(1 + num_samples)]
    with torch.multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        outputs = pool.starmap(generation_pass, passes, chunksize=1)
    scores = {}
    for index, name in enumerate(folders):
        own = outputs[index * (1 + num_samples) :][: 1 + num_samples]
        right = [
            [boxed(output, encoder) == item.result for output, item in zip(part, items, strict=True)]
            for part in own
        ]
        greedy, *sampled = right
        shares = [sum(answers) / num_samples for answers in zip(*sampled)] if sampled else []
        scores[name] = Score(items, greedy, shares)
    return scores


def report(
    scores: dict[str, Score],
    tables: dict[str, str],
    sizes: dict[str, int],
    options: argparse.Namespace,
    seconds: float,
) -> str:
    """The report's text; `sizes` are in bytes."""
    num_samples = options.samples
    every = f" --every {options.every}" if options.every > 1 else ""
    plain = scores["BF16, as shipped"]
    kinds = [("greedy", False)] + [(f"pass@1 of {num_samples}", True)] * (num_samples > 0)
    lines = [
        "# The embedded nano R1 in INT8 and INT4",
        "",
        f"Written by `python tools/quantize_nano_r1.py --samples {num_samples}{every}` on {os.cpu_count()} "
        f"cores, no GPU, in {seconds:.0f} s: {len(plain.items):,} held-out questions, greedily"
        + (f" and {num_samples} times at temperature {TEMPERATURE}, top-p {TOP_P}" if num_samples else "")
        + ", with the same seeds for each. Half of the questions are in wordings that training never saw. "
        "Computed in float32 over what the weights stand for, which the engine's CPU path does to rounding "
        "(`tests/models/test_quantized.py`).",
        "",
        "| weights | MB | " + " | ".join(f"{kind}: known | unseen | all | lost" for kind, _ in kinds) + " |",
        "| --- | ---: | " + " | ".join(["---: | ---: | ---: | ---:"] * len(kinds)) + " |",
    ]
    for name, score in scores.items():
        cells = []
        for _, sampled in kinds:
            known, unseen, both = (score.share(w, sampled=sampled) for w in ("known", "unseen", None))
            lost = 100 * (plain.share(sampled=sampled) - both)
            cells.append(f"{known:.4f} | {unseen:.4f} | {both:.4f} | {lost:+.2f} points")
        lines.append(f"| {name} | {sizes[name] / 1e6:.2f} | " + " | ".join(cells) + " |")
    differing = [
        f"{sum(a != b for a, b in zip(plain.greedy, score.greedy))} ({name})"
        for name, score in scores.items()
        if score is not plain
    ]
    lines += ["", f"Greedy answers of which one is right and the other is not: {', '.join(differing)}."]
    lines.append(verdict(scores, num_samples))
    for name, table in tables.items():
        lines += ["", f"## Errors of the weights, {name}", "", table]
    return "\n".join(lines) + "\n"


def verdict(scores: dict[str, Score], num_samples: int) -> str:
    """Whether INT8 keeps to what it may lose, by the measure of more answers."""
    plain, rounded = (scores[name].share(sampled=num_samples > 0) for name in ("BF16, as shipped", "INT8"))
    kept = "within" if plain - rounded <= MAY_LOSE else "**beyond**"
    return f"INT8 may lose {100 * MAY_LOSE:.1f} points of all answers: {kept} that."


def main() -> None:
    """Quantizes, measures, writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=4, help="sampled answers per question (default 4)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--every", type=int, default=1, help="ask every so many-th question alone")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    config = load_config(ASSETS)
    table, module = tensor_table(config), mtp_table(config)
    items = read_held_out(ASSETS / "heldout.jsonl")[:: options.every]
    encoder = ChatEncoder(Tokenizer.from_file(str(ASSETS / "tokenizer.json")))
    with tempfile.TemporaryDirectory() as scratch:
        folders, stored = {"BF16, as shipped": ASSETS}, {"BF16, as shipped": ASSETS}
        tables = {}
        for name, how in FORMATS.items():
            stored[name] = Path(scratch) / name
            _, errors = quantize_checkpoint(ASSETS, stored[name], table, how, fp8_block=None, module=module)
            tables[name] = error_table(errors, {spec.name: spec.part for spec in (*table, *module)})
            folders[name] = in_floats(stored[name], Path(scratch) / f"{name}-floats")
        sizes = {name: (folder / "model.safetensors").stat().st_size for name, folder in stored.items()}
        scores = measure(folders, encoder, items, options.samples, options.workers)
    text = report(scores, tables, sizes, options, time.monotonic() - began)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(text, encoding="utf-8")
    shares = {name: score.share(sampled=options.samples > 0) for name, score in scores.items()}
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
