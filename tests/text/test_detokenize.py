import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1_cluster.text.detokenize import StreamDecoder


def cuts(ids, sizes):
    start = 0
    for size in sizes:
        yield ids[start : start + size]
        start += size
    yield ids[start:]


@given(st.lists(st.integers(0, 520), max_size=60), st.lists(st.integers(0, 5), max_size=20))
def test_increments_join_to_the_whole_text(tokenizer, ids, sizes):
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.feed, cuts(ids, sizes))) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["日本語のテキスト", "中文，标点。", "👩‍👩‍👧‍👦 🇯🇵 é", "Ωß naïve"])
def test_no_half_character_is_shown(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    shown = [decoder.feed([token]) for token in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) == text
    assert decoder.flush() == ""


def test_flush_shows_lone_bytes_once(tokenizer):
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert decoder.feed(ids[:-1]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.feed(ids) == "🙂"


@pytest.mark.serial
def test_a_long_text_costs_no_more_per_token_than_a_short_one(tokenizer):
    def seconds_per_token(count):
        decoder = StreamDecoder(tokenizer)
        start = time.perf_counter()
        for token in range(count):
            decoder.feed((token % 500,))
        return (time.perf_counter() - start) / count

    short = min(seconds_per_token(2_000) for _ in range(5))
    assert seconds_per_token(100_000) < 5 * short
