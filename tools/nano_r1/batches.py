"""Chats as training batches: groups of similar length, shared out evenly among the worker processes."""

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
LONG_EVERY = 8  # every so many steps the chats have up to LONG_TURNS earlier turns
LONG_TURNS = 6
MAX_LENGTH = 640
GROUP_TOKENS = 1024


@dataclass(frozen=True)
class Chat:
    """Token ids of a chat, of which the first `num_prompt` are given and the rest are to be learnt."""

    ids: list[int]
    num_prompt: int


@dataclass(frozen=True)
class Group:
    """Chats padded on the right to one length: ids [B, S], and whether a token is to be learnt [B, S]."""

    ids: Tensor
    learnt: Tensor


def _draw_chat(rng: random.Random, examples: Iterator[Example], encoder: ChatEncoder, max_turns: int) -> Chat:
    """One chat; some have a history or a system prompt, a few have the thought switched off."""
    example = next(examples)
    history: tuple[tuple[str, str], ...] = ()
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.05 else ""
    if rng.random() < 0.1 * max_turns:
        earlier = [next(examples) for _ in range(rng.randint(1, max_turns))]
        history = tuple((turn.prompt, turn.answer) for turn in earlier)
    prompt = encoder.prompt(example.prompt, history, system)
    completion = encoder.completion(example.thought, example.answer)
    if rng.random() < 0.02:
        prompt += encoder.closed_thought()
        completion = encoder.answer(example.answer)
    return Chat(prompt + completion, len(prompt))


def chats_at(step: int, seed: int, encoder: ChatEncoder, num_tokens: int) -> list[Chat]:
    """The chats of one step, at least `num_tokens` tokens, shortest first.

    They depend on seed and step alone, so a resumed run sees the same data.
    """
    rng = random.Random(f"batch|{seed}|{step}")
    examples = training_examples(rng)
    max_turns = LONG_TURNS if step % LONG_EVERY == LONG_EVERY - 1 else 1
    chats: list[Chat] = []
    total = 0
    while total < num_tokens:
        chat = _draw_chat(rng, examples, encoder, max_turns)
        if len(chat.ids) <= MAX_LENGTH:
            chats.append(chat)
            total += len(chat.ids)
    return sorted(chats, key=lambda chat: len(chat.ids))


def groups_for(chats: list[Chat], worker: int, num_workers: int) -> list[Group]:
    """One worker's share of sorted `chats` (every num_workers-th), in groups of about GROUP_TOKENS tokens."""
    groups: list[Group] = []
    waiting: list[Chat] = []
    for chat in chats[worker::num_workers]:
        if waiting and (len(waiting) + 1) * len(chat.ids) > GROUP_TOKENS:
            groups.append(_pad(waiting))
            waiting = []
        waiting.append(chat)
    return [*groups, _pad(waiting)] if waiting else groups


def _pad(chats: list[Chat]) -> Group:
    length = max(len(chat.ids) for chat in chats)
    ids = torch.full((len(chats), length), PAD_ID)
    learnt = torch.zeros(len(chats), length, dtype=torch.bool)
    for row, chat in enumerate(chats):
        ids[row, : len(chat.ids)] = torch.tensor(chat.ids)
        learnt[row, chat.num_prompt : len(chat.ids)] = True
    return Group(ids, learnt)
