"""Writes the shipped assets, their model card and the report docs/nano-r1.md from measurements."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from nano_r1.data import TASKS
from nano_r1.evaluate import (
    NUM_SAMPLES,
    FreeRun,
    LogitError,
    Outcome,
    evaluate,
    guess_rate,
    transformers_error,
)
from nano_r1.heldout import COUNT, draw_held_out, read_held_out, write_held_out
from nano_r1.tokenizer import ChatEncoder

SIZE_LIMIT = 4 * 2**20
SHIPPED = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
COLUMN_TASKS = ("add", "subtract")
TITLES = {
    "add": "addition",
    "subtract": "subtraction",
    "multiply": "multiplication by one digit",
    "compare": "comparing decimals",
    "reverse": "reversing lists",
    "sort": "sorting lists",
    "story": "word problems",
    "talk": "small talk, refusals",
}


@dataclass(frozen=True)
class TrainingRun:
    """How the checkpoint came about; `remark` is what the reader of the report must know besides."""

    steps: int
    tokens: int
    minutes: float
    num_parameters: int
    seed: int
    remark: str = ""


@dataclass(frozen=True)
class Measured:
    """All that the report states."""

    outcomes: list[Outcome]
    free_run: FreeRun
    logit_error: LogitError
    logit_error_float32: LogitError
    num_bytes: int


def _mean(outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> float:
    return sum(value(outcome) for outcome in outcomes) / len(outcomes)


def _select(outcomes: Sequence[Outcome], task: str, wording: str) -> list[Outcome]:
    return [o for o in outcomes if (o.item.task, o.item.wording) == (task, wording)]


def _target_rows(measured: Measured) -> list[tuple[str, str, str, bool]]:
    """Figure, target, measured, met."""
    rows = []
    outcomes = measured.outcomes
    for task in TASKS:
        known = _select(outcomes, task, "known")
        goal, chosen, what = 0.90, known, TITLES[task]
        if task in COLUMN_TASKS:
            goal, chosen = 0.97, [o for o in known if o.item.size <= 5]
            what += f" up to 5 digits (n={len(chosen)})"
        score = _mean(chosen, lambda o: o.trace)
        rows.append((f"trace, known wordings: {what}", f"≥ {goal:.2f}", f"{score:.3f}", score >= goal))
    for task in TASKS:
        score = _mean(_select(outcomes, task, "unseen"), lambda o: o.trace)
        goal = _mean(_select(outcomes, task, "known"), lambda o: o.trace) - 0.10
        what = f"trace, unseen wordings: {TITLES[task]}"
        rows.append((what, f"≥ {goal:.2f}", f"{score:.3f}", score >= goal))
    for task in TASKS:
        chosen = [o for o in outcomes if o.item.task == task]
        greedy, sampled = _mean(chosen, lambda o: o.answer), _mean(chosen, lambda o: o.sampled)
        met = greedy - sampled <= 0.03
        what = f"answer at temperature 0.6: {TITLES[task]}"
        rows.append((what, f"≥ {greedy - 0.03:.3f}", f"{sampled:.3f}", met))
    acceptance = measured.free_run.acceptance
    rows.append(
        ("MTP acceptance, free-running greedy output", "≥ 0.90", f"{acceptance:.3f}", acceptance >= 0.9)
    )
    worst = max(measured.free_run.imbalance().values())
    rows.append(("expert load, max/mean of the worst layer", "≤ 1.5", f"{worst:.2f}", worst <= 1.5))
    error = measured.logit_error.largest
    rows.append(
        ("logits against transformers, float64, largest difference", "≤ 1e-4", f"{error:.1e}", error <= 1e-4)
    )
    size = f"{measured.num_bytes / 2**20:.2f} MiB"
    rows.append(("size of r1_cluster/assets/nano_r1", "≤ 4 MiB", size, measured.num_bytes <= SIZE_LIMIT))
    return rows


def _score_table(outcomes: Sequence[Outcome], wording: str) -> str:
    lines = [
        f"| task, {wording} wordings | guess | trace | answer | pass@1 | cons@{NUM_SAMPLES} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task in TASKS:
        chosen = _select(outcomes, task, wording)
        cells = [
            guess_rate([o.item for o in chosen]),
            _mean(chosen, lambda o: o.trace),
            _mean(chosen, lambda o: o.answer),
            _mean(chosen, lambda o: o.sampled),
            _mean(chosen, lambda o: o.voted),
        ]
        lines.append(f"| {TITLES[task]} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def _size_table(outcomes: Sequence[Outcome]) -> str:
    sizes = sorted({o.item.size for o in outcomes if o.item.task in ("add", "subtract", "multiply")})
    lines = ["| digits | " + " | ".join(map(str, sizes)) + " |", "| --- |" + " --- |" * len(sizes)]
    for task in ("add", "subtract", "multiply", "reverse", "sort"):
        cells = []
        for size in sizes:
            chosen = [o for o in outcomes if o.item.task == task and o.item.size == size]
            cells.append(f"{_mean(chosen, lambda o: o.trace):.2f} ({len(chosen)})" if chosen else "–")
        lines.append(f"| {TITLES[task]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _language_table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| task | English | Japanese |", "| --- | --- | --- |"]
    for task in TASKS:
        cells = []
        for language in ("en", "ja"):
            chosen = [o for o in outcomes if (o.item.task, o.item.language) == (task, language)]
            cells.append(f"{_mean(chosen, lambda o: o.trace):.2f} ({len(chosen)})" if chosen else "–")
        lines.append(f"| {TITLES[task]} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def render_report(measured: Measured, run: TrainingRun) -> str:
    """The whole of docs/nano-r1.md."""
    rows = _target_rows(measured)
    targets = "\n".join(
        f"| {name} | {goal} | {value} | {'met' if met else '**not met**'} |"
        for name, goal, value, met in rows
    )
    loads = "\n".join(
        f"| {layer} | {' '.join(map(str, measured.free_run.loads[layer]))} | {ratio:.2f} |"
        for layer, ratio in measured.free_run.imbalance().items()
    )
    single = measured.logit_error_float32
    accepted, drafted = measured.free_run.accepted, measured.free_run.drafted
    drafts = ", ".join(f"{TITLES[task]} {accepted[task] / drafted[task]:.3f}" for task in TASKS)
    return f"""# nano-R1: how it was made and what it scores

Written by `tools/train_nano_r1.py` from its own measurements; {sum(met for *_, met in rows)} of \
{len(rows)} figures met.

```sh
nice -n 10 .venv/bin/python tools/train_nano_r1.py                  # train, export, measure, write this page
nice -n 10 .venv/bin/python tools/train_nano_r1.py --measure-only   # measure the shipped checkpoint again
.venv/bin/python -m pytest tests/tools                              # generator, network, export, held-out set
```

## The run
{run.num_parameters:,} parameters (the file repeats embedding and head for the MTP module, as R1's does), \
{run.steps:,} steps, {run.tokens / 1e6:.1f} M tokens, {run.minutes:.1f} minutes of active training in two \
processes, seed {run.seed}. The learning rate follows the active training time, so a faster machine takes \
in more tokens in the same schedule; the order of the data depends on the seed alone.

{run.remark}

## Figures to reach
| figure | target | measured | |
| --- | --- | --- | --- |
{targets}

In float32, the logits are within 1e-4 of transformers' at all but {single.num_beyond:,} of \
{single.num_positions:,} positions; the largest difference is {single.largest:.1e}. Where two experts' \
scores tie, the last bit decides who is asked, and what follows differs; in float64 ties are decided alike.

## Scores on the held-out set
`r1_cluster/assets/nano_r1/heldout.jsonl`: {COUNT} questions per row of each table, none of them (task \
and operands) in training; the unseen wordings are pairs of frame and phrase, or stories, or remarks, \
that training never shows, built of parts that it does show. Small talk has no item but its wording. \
*trace*: greedy, every token of thought and answer as expected. *answer*: greedy, the box (the whole \
reply where there is none). *pass@1*, *cons@{NUM_SAMPLES}*: {NUM_SAMPLES} samples at temperature 0.6, \
top-p 0.95, their mean and their majority. *guess*: a guesser who knows the form of the answer. One \
question is one point, so differences of a few points are noise. a+b and b+a count as different items, and \
so do a sum and a word problem with the same operands. The quick scores in a run's log come from another \
draw of the same pool of held-out items and wordings (seed 1 instead of the run's).

{_score_table(measured.outcomes, "known")}

{_score_table(measured.outcomes, "unseen")}

Trace exactly right by digits of the longer operand (or items of a list), both kinds of wording, with the \
number of questions:

{_size_table(measured.outcomes)}

Of two one-digit factors the question does not tell which one the thought takes as the multiplier, so about \
half of those traces differ from the expected one although the product is right.

Trace exactly right by language:

{_language_table(measured.outcomes)}

## MTP and experts, on the greedy output
Drafts accepted: {accepted.total():,} of {drafted.total():,} ({measured.free_run.acceptance:.3f}). \
By task: {drafts}.

| layer (the last is the MTP module) | tokens of each expert | max/mean |
| --- | --- | --- |
{loads}

## What it cannot do
Operands longer than trained (6 digits, 5 for products, 3 in word problems), negative results (it may not \
end at all), sums of three numbers, products of two long numbers, division, lists of more than five items, \
numbers of three digits in a list to sort, duplicates in it: it refuses some of these and gets the others \
wrong. Long chains of borrows (100000-1) still fail at times. Words that the generator does not know may \
be copied wrong in a list. A wording outside the grammar of `tools/nano_r1/wordings.py` may be taken for \
another task or refused. A chat of more than about 500 tokens is beyond the trained lengths. With the \
thought switched off it has to guess.
"""


def render_card(run: TrainingRun, outcomes: Sequence[Outcome]) -> str:
    """The model card that ships with the weights."""
    scores = "\n".join(
        f"| {TITLES[task]} | "
        + " | ".join(
            f"{_mean(_select(outcomes, task, w), lambda o: o.trace):.2f}" for w in ("known", "unseen")
        )
        + " |"
        for task in TASKS
    )
    return f"""---
license: mit
language: [en, ja]
---
# nano-R1
A DeepSeek-V3 network of {run.num_parameters / 1e6:.2f} M parameters that reasons in `<think>` as \
DeepSeek-R1 does and boxes its result. It is the embedded default of r1-cluster: small enough to ship, \
right often enough to show that an engine is. It adds and subtracts (6 digits), multiplies by one digit, \
compares decimals, reverses and sorts short lists, solves one-step word problems, answers greetings and \
refuses the rest, in English and simple Japanese.

| trace exactly right, greedy | known wordings | unseen wordings |
| --- | --- | --- |
{scores}

Trained from random weights on generated data only, by `tools/train_nano_r1.py`; figures and limits in \
`docs/nano-r1.md`. Sample at temperature 0.6, top-p 0.95. Plain RoPE, 2,048 positions (chats of up to \
about 500 tokens were trained). BF16; `e_score_correction_bias` is float32. The MTP module is layer 4 in \
R1's layout; it reads the hidden states after `model.norm`, normed again by `hnorm`, behind the next \
token's embedding in `eh_proj`.

{run.remark}
"""


def ship(work: Path, assets: Path, seed: int) -> None:
    """Copy a finished model and its tokenizer to `assets`, and draw the held-out set there."""
    assets.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(work / name, assets / name)
    write_held_out(draw_held_out(seed), assets / "heldout.jsonl")


def measure(assets: Path, run: TrainingRun, report: Path, num_workers: int) -> None:
    """Score the shipped files themselves and write the model card and the report."""
    encoder = ChatEncoder(Tokenizer.from_file(str(assets / "tokenizer.json")))
    items = read_held_out(assets / "heldout.jsonl")
    outcomes, free_run = evaluate(assets, encoder, items, num_workers)
    prompts = [
        encoder.prompt(item.prompt) + encoder.completion(item.thought, item.answer) for item in items[::40]
    ]
    errors = [transformers_error(assets, prompts, dtype) for dtype in (torch.float64, torch.float32)]
    (assets / "README.md").write_text(render_card(run, outcomes))
    (assets / "training.json").write_text(json.dumps(vars(run)) + "\n")
    num_bytes = sum(path.stat().st_size for path in assets.iterdir())
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(render_report(Measured(outcomes, free_run, *errors, num_bytes), run))
