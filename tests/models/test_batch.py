"""A step's tensors from its plan."""

import numpy as np
import pytest
import torch

from r1_cluster.models.batch import AttentionBatch
from r1_cluster.models.loader import Shard
from r1_cluster.records import SampleSpec, SamplingParams, StepPlan, pack_int32

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0)
CPU = torch.device("cpu")


def plan(**changes):
    values = {
        "epoch": 0,
        "step": 3,
        "micro_batch": 0,
        "seq_ids": [7, 9],
        "num_cached": [5, 0],
        "num_new": [1, 3],
        "tokens": pack_int32(np.array([11, 21, 22, 23])),
        "num_pages": [2, 1],
        "pages": pack_int32(np.array([6, 2, 4])),
        "samples": [SampleSpec(1, 3, GREEDY), SampleSpec(0, 6, GREEDY)],
    }
    return StepPlan(**(values | changes))


def test_padded_to_the_tile():
    batch = AttentionBatch.from_plan(plan(), 4, Shard(CPU, torch.float32, deterministic=True))
    assert (batch.num_tokens, batch.num_rows) == (4, 8)
    assert batch.token_ids_T.tolist() == [11, 21, 22, 23, 0, 0, 0, 0]
    assert batch.positions_T.tolist() == [5, 0, 1, 2, 0, 0, 0, 0]
    assert batch.slots_T.tolist() == [2 * 4 + 1, 16, 17, 18]
    assert batch.query_starts == (0, 1, 4)
    assert batch.context_lens == (6, 3)
    assert batch.sample_rows.tolist() == [3, 0]


def test_real_rows_alone():
    batch = AttentionBatch.from_plan(plan(samples=[]), 4, Shard(CPU, torch.float32, deterministic=False))
    assert batch.num_rows == 4
    assert batch.token_ids_T.tolist() == [11, 21, 22, 23]
    assert batch.sample_rows.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_new": [1]}, "different lengths"),
        ({"num_new": [1, 2]}, "4 tokens and 3 pages came, 3 and 3 are announced"),
        ({"num_pages": [2, 2]}, "4 tokens and 3 pages came, 4 and 4 are announced"),
        ({"num_cached": [8, 0]}, "sequence 7 has 2 pages for 9 tokens"),
    ],
)
def test_plans_that_do_not_fit_together(changes, words):
    with pytest.raises(ValueError, match=words):
        AttentionBatch.from_plan(plan(**changes), 4, Shard(CPU, torch.float32, deterministic=True))
