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
    words = "steps of {:,} tokens, divided among data ranks, or {} sequences each, of up to {:,} tokens"
    assert words.format(*settings) in page
    assert "nine tenths of its device" in page
    assert layout_memory.SHARE == 0.9


def test_a_row_is_that_of_the_arithmetic_by_hand():
    """Llama 70B for two ranks: 80 layers of 8,192, a rank with 32 of 64 heads of 128 and 4 of 8 of keys."""
    *_, row = table(Machines(LLAMA, 2, "H100", 80, ({"tensor_parallel": 2},)))
    attention = 2 * 8192 * 4096 + 2 * 8192 * 512
    weights = 80 * (attention + 3 * 8192 * 14336 + 2 * 8192) + 8192 + 128256 * 8192
    positions = 131072 * 128 * 4
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["`{tensor_parallel: 2}`", *["does not fit"] * 2, "2 like `stage-0-rank-1`"]
    assert (cells[4], cells[7]) == (f"{(2 * weights + positions) / 1e9:.1f}", f"{80 * 2 * 4 * 128 * 2:,}")


def test_the_stage_with_the_least_room_decides():
    keys = {"kind": "disaggregated", "stages": ["0-9", "10-79"]}
    first, second = table(Machines(LLAMA, 2, "H100", 192, (keys,)))[-2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (first, second)]
    assert cells[1][:3] == [""] * 3
    tokens = [float(row[6]) * 1e9 / int(row[7].replace(",", "")) for row in cells]
    assert int(cells[0][1].replace(",", "")) == pytest.approx(min(tokens), rel=0.01)
    assert min(tokens) < tokens[0] / 2
