"""The held-out set as it ships: one JSON object a line."""

import json
from dataclasses import dataclass
from pathlib import Path

from nano_r1.data import TASKS, held_out_examples

COUNT = 100  # examples per task and kind of wording


@dataclass(frozen=True)
class HeldOut:
    """One question of the held-out set with what the model should write.

    `wording` is "known" or "unseen" (in training); `size` the digits of the longest operand, characters of a
    decimal or items of a list; `result` what the box should hold, or the whole answer where there is no box.
    """

    task: str
    language: str
    wording: str
    size: int
    prompt: str
    thought: str
    answer: str
    result: str


def draw_held_out(seed: int, count: int = COUNT) -> list[HeldOut]:
    """`count` questions per task in known wordings and as many in unseen ones."""
    return [
        HeldOut(e.task, e.language, wording, e.size, e.prompt, e.thought, e.answer, e.result)
        for task in TASKS
        for wording in ("known", "unseen")
        for e in held_out_examples(task, wording == "unseen", count, seed)
    ]


def write_held_out(items: list[HeldOut], path: Path) -> None:
    """Write the set as JSON lines."""
    lines = [json.dumps(vars(item), ensure_ascii=False, separators=(",", ":")) for item in items]
    path.write_text("\n".join(lines) + "\n")


def read_held_out(path: Path) -> list[HeldOut]:
    """Read a set that `write_held_out` wrote."""
    return [HeldOut(**json.loads(line)) for line in path.read_text().splitlines()]
