"""Stage, router and experts as processes without Ray: the twin on the CPU of tests/gpu/test_engine.py."""

import pytest
from processes import assert_texts_survive, settings

from r1_cluster.config import LayoutConfig


@pytest.mark.slow
def test_texts_survive_a_killed_expert_process(tmp_path):
    """Tensors go through the host's memory as they go through a GPU's, slot by slot."""
    kind = settings(tmp_path, device="cpu", dtype="float32", transport="host memory")
    assert_texts_survive(kind, LayoutConfig(kind="disaggregated", stages=1, expert_shards=2), "experts-1")
