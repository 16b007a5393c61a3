"""Batched generation with a key-value cache, for scoring the model without an engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nano_r1.model import KVCache, NanoR1, causal_mask
from nano_r1.tokenizer import EOS_ID, PAD_ID


def sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row: greedy at temperature 0, else from the smallest set that holds top_p of the mass."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities, order = torch.softmax(logits_BV.float() / temperature, -1).sort(-1, descending=True)
    mass_before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(mass_before >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(kept, 1, generator=generator))[:, 0]


@torch.inference_mode()
def generate(
    model: NanoR1,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt up to and including the end of sentence, at most `max_tokens` tokens."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[PAD_ID] * (longest - len(ids)) + ids for ids in prompts])
    seen_BS = torch.tensor([[False] * (longest - len(ids)) + [True] * len(ids) for ids in prompts])
    outputs: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts))  # which prompt each running row belongs to
    cache, start = KVCache(), 0
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    visible = seen_BS[:, None, :] & causal
    for _ in range(max_tokens):
        mask = torch.zeros(visible.shape).masked_fill(~visible, -1e9)[:, None]
        hidden_BSD = model.trunk(ids_BS, model.positions(mask, start, cache))
        start += ids_BS.shape[1]
        tokens_B = sample(model.head(hidden_BSD[:, -1]), temperature, top_p, generator)
        for row, token in zip(rows.tolist(), tokens_B.tolist(), strict=True):
            outputs[row].append(token)
        running = (tokens_B != EOS_ID).nonzero()[:, 0]
        if not len(running):
            break
        if len(running) < len(rows):
            rows, tokens_B, seen_BS = rows[running], tokens_B[running], seen_BS[running]
            cache.keep_rows(running)
        seen_BS = torch.cat((seen_BS, torch.ones(len(rows), 1, dtype=torch.bool)), 1)
        ids_BS, visible = tokens_B[:, None], seen_BS[:, None, :]
    return outputs


@torch.inference_mode()
def draft_acceptance(model: NanoR1, prompt: list[int], output: list[int]) -> tuple[int, int]:
    """How many tokens of a free-running greedy `output` the MTP module drafts right, and how many in all.

    The draft of token i+2 is the MTP head's best token after the trunk's state i and token i+1; the first
    token of an output has no draft.
    """
    ids = torch.tensor([prompt + output])
    positions = model.positions(causal_mask(ids.shape[1]))
    hidden = model.trunk(ids, positions)
    drafts = model.head(model.draft(hidden, ids.roll(-1, 1), positions)).argmax(-1)[0]
    targets = ids[0, len(prompt) + 1 :]
    return int((drafts[len(prompt) - 1 : -2] == targets).sum()), len(targets)
