"""Scores: whole trace and boxed answer per task, sampled pass@1 and cons@8, MTP acceptance, expert load."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing

from nano_r1.data import TASKS
from nano_r1.export import load_model, moe_blocks
from nano_r1.generate import draft_acceptance, generate
from nano_r1.heldout import HeldOut, draw_held_out
from nano_r1.model import NanoR1, causal_mask
from nano_r1.tokenizer import EOS_ID, ChatEncoder

NUM_SAMPLES = 8
TEMPERATURE, TOP_P = 0.6, 0.95
_CHUNK = 160  # rows of one generation


@dataclass(frozen=True)
class Outcome:
    """One question: is the greedy trace right, its answer, what share of the samples, their vote."""

    item: HeldOut
    trace: bool
    answer: bool
    sampled: float
    voted: bool


@dataclass(frozen=True)
class FreeRun:
    """Measured on greedy output: drafts accepted and made per task, tokens of each expert by layer."""

    accepted: Counter[str]
    drafted: Counter[str]
    loads: dict[int, list[int]]

    @property
    def acceptance(self) -> float:
        """Share of all drafts accepted."""
        return float(self.accepted.total() / self.drafted.total())

    def imbalance(self) -> dict[int, float]:
        """Load of the busiest expert over the mean, by layer."""
        return {layer: float(max(load) * len(load) / sum(load)) for layer, load in self.loads.items()}


def final_answer(text: str) -> str:
    """What stands in the last box after the thought, or the whole answer where there is no box."""
    answer = text.rpartition("</think>")[2].strip()
    _, box, rest = answer.rpartition("\\boxed{")
    return rest.partition("}")[0] if box else answer


def boxed(output: Sequence[int], encoder: ChatEncoder) -> str | None:
    """The final answer of an output, or None if the model never ended."""
    if not output or output[-1] != EOS_ID:
        return None
    return final_answer(encoder.tokenizer.decode(list(output[:-1]), skip_special_tokens=False))


def guess_rate(items: Sequence[HeldOut]) -> float:
    """How often a guesser who knows the form of the answer is right.

    It picks one of the two numbers compared, some order of the list, a number with the right count of digits,
    or the most common reply.
    """
    task = items[0].task
    if task == "talk":
        return Counter(item.result for item in items).most_common(1)[0][1] / len(items)
    if task == "compare":
        return 0.5
    if task in ("reverse", "sort"):
        return sum(1 / math.factorial(item.size) for item in items) / len(items)
    return sum(1 / (9 * 10.0 ** (len(item.result) - 1)) for item in items) / len(items)


def _generate_all(
    model: NanoR1, prompts: Sequence[list[int]], temperature: float, top_p: float, seed: int
) -> list[list[int]]:
    outputs: list[list[int]] = []
    for start in range(0, len(prompts), _CHUNK):
        part = prompts[start : start + _CHUNK]
        outputs += generate(model, part, temperature=temperature, top_p=top_p, seed=seed + start)
    return outputs


def generation_pass(folder: Path, prompts: Sequence[list[int]], sample: int) -> list[list[int]]:
    """Pass 0 is greedy, the others sample; runs in a process of its own."""
    torch.set_num_threads(1)
    temperature, top_p = (TEMPERATURE, TOP_P) if sample else (0.0, 1.0)
    return _generate_all(load_model(folder), prompts, temperature, top_p, seed=10**6 * sample)


def evaluate(
    folder: Path, encoder: ChatEncoder, items: Sequence[HeldOut], num_workers: int = 1
) -> tuple[list[Outcome], FreeRun]:
    """Score the model in `folder` on `items`, greedily and by NUM_SAMPLES samples each.

    The passes share `num_workers` processes; drafts and expert load are measured on the greedy output.
    """
    prompts = [encoder.prompt(item.prompt) for item in items]
    passes = [(folder, prompts, sample) for sample in range(1 + NUM_SAMPLES)]
    with torch.multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        greedy, *samples = pool.starmap(generation_pass, passes, chunksize=1)
    outcomes = []
    for index, item in enumerate(items):
        answers = [boxed(outputs[index], encoder) for outputs in samples]
        outcomes.append(
            Outcome(
                item,
                trace=greedy[index] == encoder.completion(item.thought, item.answer),
                answer=boxed(greedy[index], encoder) == item.result,
                sampled=sum(answer == item.result for answer in answers) / NUM_SAMPLES,
                voted=Counter(answers).most_common(1)[0][0] == item.result,
            )
        )
    return outcomes, measure_free_run(load_model(folder), items, prompts, greedy)


def measure_free_run(
    model: NanoR1, items: Sequence[HeldOut], prompts: Sequence[list[int]], outputs: Sequence[list[int]]
) -> FreeRun:
    """Drafts and expert load over prompts and outputs, one sequence at a time: nothing is padding."""
    blocks = moe_blocks(model)
    for block in blocks.values():
        block.load = torch.zeros_like(block.load)
    accepted, drafted = Counter[str](), Counter[str]()
    loads = {layer: torch.zeros(model.config.n_routed_experts) for layer in blocks}
    for item, prompt, output in zip(items, prompts, outputs, strict=True):
        right, made = draft_acceptance(model, prompt, output)
        accepted[item.task] += right
        drafted[item.task] += made
        for layer, block in blocks.items():
            loads[layer] += block.load
            block.load = torch.zeros_like(block.load)
    return FreeRun(accepted, drafted, {layer: load.int().tolist() for layer, load in loads.items()})


@dataclass(frozen=True)
class LogitError:
    """How far two implementations' logits are apart: the largest difference, and at how many of so many
    positions it exceeds 1e-4."""

    largest: float
    num_beyond: int
    num_positions: int


def transformers_error(folder: Path, prompts: Sequence[list[int]], dtype: torch.dtype) -> LogitError:
    """Our logits against transformers', which reads the same `folder`, both in `dtype`.

    In float32 two experts' scores may tie, and the last bit then decides which one is asked: what follows
    differs by a tenth. In float64 ties are decided alike, so that only a difference of the functions shows.
    """
    from transformers import DeepseekV3ForCausalLM

    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    reference = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype, **plain)
    model = load_model(folder).to(dtype)
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            ours = model.head(model.trunk(ids, model.positions(causal_mask(len(prompt)))))
            found.append((ours - reference(ids).logits).abs()[0].amax(-1))
    differences = torch.cat(found)
    return LogitError(float(differences.max()), int((differences > 1e-4).sum()), len(differences))


def quick_scores(model: NanoR1, encoder: ChatEncoder, count: int = 16) -> str:
    """Greedy scores answer/trace per task, known then unseen wordings, on one line; for watching a run."""
    items = draw_held_out(seed=1, count=count)
    outputs = _generate_all(model, [encoder.prompt(item.prompt) for item in items], 0.0, 1.0, 0)
    parts = []
    for task in TASKS:
        cells = []
        for wording in ("known", "unseen"):
            chosen = [
                (item, output)
                for item, output in zip(items, outputs, strict=True)
                if (item.task, item.wording) == (task, wording)
            ]
            answers = sum(boxed(output, encoder) == item.result for item, output in chosen)
            traces = sum(output == encoder.completion(item.thought, item.answer) for item, output in chosen)
            cells.append(f"{answers / count:.2f}/{traces / count:.2f}")
        parts.append(f"{task} {' '.join(cells)}")
    return "  ".join(parts)
