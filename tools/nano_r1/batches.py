"""Packs chats into rows of fixed length without cutting any."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nano_r1.data import Example, training_examples
from nano_r1.tokenizer import PAD_ID, ChatEncoder

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Be brief.",
    "You are a careful calculator.",
    "日本語で答えてください。",
)

LONG_EVERY = 8


@dataclass
class Batch:
    """ids, documents (0 for padding) and loss weights of the tokens as targets, each [B, S]."""

    ids: Tensor
    documents: Tensor
    weights: Tensor


def _encode(
    rng: random.Random, examples: Iterator[Example], encoder: ChatEncoder, max_turns: int
) -> tuple[list[int], int]:
    """Ids of one chat and how many of them are prompt; some chats have a history or a system prompt."""
    example = next(examples)
    history: tuple[tuple[str, str], ...] = ()
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.05 else ""
    if rng.random() < 0.12 * max_turns:
        earlier = [next(examples) for _ in range(rng.randint(1, max_turns))]
        history = tuple((turn.prompt, turn.answer) for turn in earlier)
    prompt = encoder.prompt(example.prompt, history, system)
    completion = encoder.completion(example.thought, example.answer)
    if rng.random() < 0.02:  # the chat page can switch the thought off
        prompt += encoder.closed_thought()
        completion = encoder.answer(example.answer)
    return prompt + completion, len(prompt)


def batch_at(step: int, seed: int, encoder: ChatEncoder, num_rows: int, row_length: int) -> Batch:
    """The batch of one step; it depends on seed and step alone, so a resumed run sees the same data.

    Every eighth batch has half as many rows of twice the length, for chats of many turns.
    """
    rng = random.Random(f"batch|{seed}|{step}")
    max_turns = 1
    if step % LONG_EVERY == LONG_EVERY - 1:
        num_rows, row_length, max_turns = num_rows // 2, row_length * 2, 6
    examples = training_examples(rng)
    rows: list[list[tuple[list[int], int]]] = [[] for _ in range(num_rows)]
    room = [row_length] * num_rows
    misses = 0
    while misses < 8:
        ids, num_prompt = _encode(rng, examples, encoder, max_turns)
        fitting = [row for row in range(num_rows) if room[row] >= len(ids)]
        if not fitting:
            misses += 1
            continue
        tightest = min(fitting, key=lambda row: room[row])
        rows[tightest].append((ids, num_prompt))
        room[tightest] -= len(ids)
    batch = Batch(
        torch.full((num_rows, row_length), PAD_ID),
        torch.zeros(num_rows, row_length, dtype=torch.long),
        torch.zeros(num_rows, row_length),
    )
    for row, chats in enumerate(rows):
        start = 0
        for number, (ids, num_prompt) in enumerate(chats, 1):
            end = start + len(ids)
            batch.ids[row, start:end] = torch.tensor(ids)
            batch.documents[row, start:end] = number
            batch.weights[row, start + num_prompt : end] = 1.0
            start = end
    return batch
