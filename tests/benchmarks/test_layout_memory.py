"""The tables of docs/layouts.md are what the command finds, and its settings those that the page names."""

import pytest

from benchmarks import layout_memory
from benchmarks.layout_memory import LLAMA, Machines, table, tables, with_tables


@pytest.mark.slow
def test_the_page_has_the_tables_as_they_are():
    page = layout_memory.PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page, tables()), "python -m benchmarks.layout_memory --write"


def test_the_page_names_the_settings():
    page = " ".join(layout_memory.PAGE.read_text(encoding="utf-8").split())
    settings = layout_memory.MAX_BATCH_TOKENS, layout_memory.MAX_NUM_SEQS, layout_memory.MAX_CONTEXT_LEN
    assert "steps of {:,} tokens or {} sequences of up to {:,} tokens".format(*settings) in page
    assert "nine tenths of its device" in page
    assert layout_memory.SHARE == 0.9


def test_a_row_is_that_of_the_arithmetic_by_hand():
    """Llama 70B for two ranks: 80 layers of 8,192, a rank with 32 of 64 heads of 128 and 4 of 8 of keys."""
    *_, row = table(Machines(LLAMA, 2, "H100", 80, ({"tensor_parallel": 2},)))
    attention = 2 * 8192 * 4096 + 2 * 8192 * 512
    weights = 80 * (attention + 3 * 8192 * 14336 + 2 * 8192) + 8192 + 128256 * 8192
    positions = 131072 * 128 * 4
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == [
        "`{tensor_parallel: 2}`",
        "2 like `stage-0-rank-1`",
        f"{(2 * weights + positions) / 1e9:.1f}",
    ]
    assert cells[5] == f"{80 * 2 * 4 * 128 * 2:,}"
    assert cells[6:] == ["does not fit"] * 2
