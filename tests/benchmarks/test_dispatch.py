"""The simulated dispatch carries what arithmetic says, and gives back sums of what it sent."""

import pytest

from benchmarks.dispatch import NUM_EXPERTS, TOP_K, WIDTH, measure
from r1_cluster.comm.wire import HEADER_SIZE, SPEC_SIZE


@pytest.mark.slow
def test_a_round_carries_every_row_there_and_back():
    row = measure(num_shards=2, num_tokens=6, rounds=3, tcp=True)
    assert row.messages == 2 * 2
    rows = 6 * TOP_K * WIDTH * 2
    there = rows + 2 * (HEADER_SIZE + SPEC_SIZE + 4 * NUM_EXPERTS // 2)
    back = rows + 2 * (HEADER_SIZE + SPEC_SIZE + 8)
    assert row.num_bytes == there + back
    assert row.round_ms > 0
    assert row.router.both_s > 0
    assert row.shards.both_s > 0
