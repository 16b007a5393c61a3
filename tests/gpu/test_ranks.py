"""Ranks of a stage in processes of their own, all of them on one GPU, which they share by CUDA IPC.

What of it needs no GPU runs in tests/engine/test_rank_processes.py, by the same code.
"""

import pytest
import torch
from processes import (
    OWN_TEXTS,
    assert_logits_are_those_of_one_process,
    assert_own_texts_survive,
    settings,
)

from r1_cluster.config import LayoutConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = {"device": "cuda", "dtype": "bfloat16", "transport": "device"}


@pytest.mark.parametrize("count", [2, 4])
def test_logits_are_those_of_one_process(tmp_path, count):
    assert_logits_are_those_of_one_process(settings(tmp_path, **ON_GPU), count)


@pytest.mark.parametrize("name", OWN_TEXTS)
def test_texts_survive_a_killed_process(tmp_path, name):
    layout, victim = OWN_TEXTS[name]
    assert_own_texts_survive(settings(tmp_path, **ON_GPU), LayoutConfig(**layout), victim)
