"""A step's tokens as tensors, built once per step and stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import ROW_TILE
from kernels.ops import AttentionPlan
from r1_cluster.models.loader import Shard
from r1_cluster.records import StepPlan, unpack_int32


@dataclass(frozen=True)
class AttentionBatch:
    """What all layers of a stage need to know of a step.

    `num_tokens` are real, `num_rows` with padding (whole tiles in deterministic mode, else the same).
    `token_ids_T` and `positions_T` (int64) cover all rows, zeros in padding; `slots_T` (int64) says where
    each real token's latent goes, page · page_size + offset. Sequence i has rows
    [query_starts[i], query_starts[i + 1]) and context_lens[i] tokens after the step. `sample_rows` are the
    last rows of the sequences in `plan.samples`, in that order.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_tokens: int
    num_rows: int
    sample_rows: Tensor
    attention: AttentionPlan

    @classmethod
    def from_plan(cls, plan: StepPlan, page_size: int, shard: Shard) -> AttentionBatch:
        """Raises ValueError for a plan whose lists or page tables do not fit together."""
        num_new = np.asarray(plan.num_new, dtype=np.int64)
        num_cached = np.asarray(plan.num_cached, dtype=np.int64)
        num_pages = np.asarray(plan.num_pages, dtype=np.int64)
        tokens, pages = unpack_int32(plan.tokens), unpack_int32(plan.pages)
        context = num_cached + num_new
        _check(plan, len(tokens), len(pages), context, page_size)
        num_tokens = len(tokens)
        num_rows = -(-num_tokens // ROW_TILE) * ROW_TILE if shard.deterministic else num_tokens

        starts = np.concatenate(([0], np.cumsum(num_new)))
        sequence_T = np.repeat(np.arange(len(num_new)), num_new)
        positions = np.zeros(num_rows, dtype=np.int64)
        positions[:num_tokens] = np.arange(num_tokens) - starts[sequence_T] + num_cached[sequence_T]
        token_ids = np.zeros(num_rows, dtype=np.int64)
        token_ids[:num_tokens] = tokens
        table = np.zeros((len(num_pages), int(num_pages.max(initial=0))), dtype=np.int64)
        table[np.arange(table.shape[1]) < num_pages[:, None]] = pages
        real = positions[:num_tokens]
        slots = table[sequence_T, real // page_size] * page_size + real % page_size
        sample_rows = np.asarray([starts[sample.index + 1] - 1 for sample in plan.samples], dtype=np.int64)

        context_lens = tuple(context.tolist())
        host = [torch.from_numpy(array) for array in (token_ids, positions, slots, sample_rows)]
        attention, there = shard.ops.plan_attention(
            plan.num_new,
            context_lens,
            torch.from_numpy(table),
            page_size,
            absorb_all=shard.deterministic,
            along=host,
            device=shard.device,
        )
        token_ids_T, positions_T, slots_T, sample_rows_S = there
        return cls(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slots_T=slots_T,
            query_starts=tuple(starts.tolist()),
            context_lens=context_lens,
            num_tokens=num_tokens,
            num_rows=num_rows,
            sample_rows=sample_rows_S,
            attention=attention,
        )


def buckets(most: int, least: int = 1, factor: int = 2) -> list[int]:
    """Sizes to prepare for: least, least · factor, … below `most`, and `most` itself, whose own bucket is
    larger than all of them where it is no power."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return [*found, most]


def _check(plan: StepPlan, num_tokens: int, num_pages: int, context: np.ndarray, page_size: int) -> None:
    lengths = {len(plan.seq_ids), len(plan.num_cached), len(plan.num_new), len(plan.num_pages)}
    if len(lengths) != 1:
        raise ValueError(f"step {plan.step}: the plan's lists are of different lengths {sorted(lengths)}")
    if num_tokens != sum(plan.num_new) or num_pages != sum(plan.num_pages):
        raise ValueError(
            f"step {plan.step}: {num_tokens} tokens and {num_pages} pages came, "
            f"{sum(plan.num_new)} and {sum(plan.num_pages)} are announced"
        )
    for sequence, needed, have in zip(plan.seq_ids, context, plan.num_pages):
        if needed > have * page_size:
            raise ValueError(f"step {plan.step}: sequence {sequence} has {have} pages for {needed} tokens")
