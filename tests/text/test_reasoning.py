import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1_cluster.text.reasoning import ReasoningSplitter, Split, StopChecker, Thought
from r1_cluster.text.tokenizer import Piece, Tokenizer


@pytest.fixture(scope="session")
def real_tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session", params=["with a token for the tag", "without"])
def tokenizer(request, folder, real_tokenizer):
    if request.param == "without":
        definition = json.loads((folder / "tokenizer.json").read_text())
        definition["added_tokens"] = [t for t in definition["added_tokens"] if "think" not in t["content"]]
        return Tokenizer(definition, bos_token=None, eos_token=None, eos_ids=frozenset({1}))
    return real_tokenizer


def ids_of(tokenizer, text):
    return tokenizer.encode_pieces([Piece(text, True)])


def split(tokenizer, ids, size=1, thought=Thought.OPEN):
    splitter = ReasoningSplitter(tokenizer, thought)
    parts = [splitter.feed(ids[i : i + size]) for i in range(0, len(ids), size)] + [splitter.finish()]
    first = next((i for i, part in enumerate(parts) if part.content), len(parts))
    assert not any(part.reasoning for part in parts[first + 1 :])
    return Split("".join(p.reasoning for p in parts), "".join(p.content for p in parts)), splitter


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("Well.\n</think>\n\nYes.", "Well.", "Yes."),
        ("Well. \n\n", "Well. \n\n", ""),
        ("a\n\nb \t\n</think>\n \nc\n\nd\n", "a\n\nb", "c\n\nd\n"),
        ("</think>x", "", "x"),
        ("\n\n</think>\n\n", "", ""),
        ("a</think>b</think>c", "a", "b</think>c"),
        ("a </thin b", "a </thin b", ""),
        ("a </thin", "a </thin", ""),
        ("日本語</think>世界🙂", "日本語", "世界🙂"),
    ],
)
def test_split(tokenizer, text, reasoning, content, size):
    assert split(tokenizer, ids_of(tokenizer, text), size)[0] == (reasoning, content)


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nWell.\n</think>\n\nYes.", "Well.", "Yes."),
        ("\n\n<think>a</think>b", "a", "b"),
        (" \t\n <think>  a \n b </think> \n c ", "a \n b", "c "),
        ("Yes.\n\nNo.", "", "Yes.\n\nNo."),
        ("\n\nYes <think> no </think>", "", "Yes <think> no </think>"),
        ("a</think>b", "", "a</think>b"),
        ("<think>", "", ""),
        ("<think>\n", "", ""),
        ("<think>a", "a", ""),
        ("<think> a <think> b</think>c</think>d", "a <think> b", "c</think>d"),
        ("<think></think>x", "", "x"),
        ("<think>\n\n</think>\n\n", "", ""),
        ("</think>x", "", "x"),
        (" \n</think>\n\nx", "", "x"),
        ("<thi", "", "<thi"),
        ("\n<thinker></think>", "", "<thinker></think>"),
        ("< think>a", "", "< think>a"),
        ("<", "", "<"),
        (" \n", "", ""),
        ("", "", ""),
        ("🙂<think>", "", "🙂<think>"),
        ("<think>日本語</think>世界🙂", "日本語", "世界🙂"),
    ],
)
def test_a_model_that_decides_itself_whether_it_thinks(tokenizer, text, reasoning, content, size):
    result, splitter = split(tokenizer, ids_of(tokenizer, text), size, Thought.UNDECIDED)
    assert result == (reasoning, content)
    assert splitter.num_reasoning_tokens > 0 or not reasoning


@pytest.mark.parametrize("end_has_a_token", [True, False])
def test_a_tag_that_was_begun_and_not_written_is_content(folder, end_has_a_token):
    """Where `<think>` has no token, what may begin it is held back, and never lost."""
    tags = {"<think>"} if end_has_a_token else {"<think>", "</think>"}
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] not in tags]
    tokenizer = Tokenizer(definition, bos_token=None, eos_token=None, eos_ids=frozenset({1}))
    splitter = ReasoningSplitter(tokenizer, Thought.UNDECIDED)
    shown = [splitter.feed([token]) for token in ids_of(tokenizer, "\n<thi</think>x")]
    assert "".join(part.content for part in shown) == "<thi</think>x"
    assert not any(part.reasoning for part in shown)


def test_whether_there_is_a_thought_is_decided_at_once(real_tokenizer):
    tokenizer = real_tokenizer
    splitter = ReasoningSplitter(tokenizer, Thought.UNDECIDED)
    assert splitter.feed(ids_of(tokenizer, "\n\n")) == ("", "")
    assert splitter.feed(ids_of(tokenizer, "<")) == (
        "",
        "<",
    )  # with a token for the tag, this cannot begin one
    splitter = ReasoningSplitter(tokenizer, Thought.UNDECIDED)
    assert splitter.feed(ids_of(tokenizer, "\n<think>\nWell")) == ("Well", "")


def test_no_part_of_a_tag_is_shown(tokenizer):
    for text in ("\n<think>\na</think>b", "<think>a\n</think>"):
        splitter = ReasoningSplitter(tokenizer, Thought.UNDECIDED)
        shown = [splitter.feed([token]) for token in ids_of(tokenizer, text)] + [splitter.finish()]
        assert not any("<" in part.reasoning + part.content for part in shown)


def test_white_space_between_the_tags_counts_as_reasoning_and_the_tags_do_not(real_tokenizer):
    tokenizer = real_tokenizer
    letter, blank = tokenizer.encode("a"), tokenizer.encode("\n")
    start, end = [tokenizer.think_start_id], [tokenizer.think_end_id]
    for before, thought, after in ((0, 3, 2), (2, 3, 0), (1, 0, 4)):
        ids = blank * before + start + blank + letter * thought + end + letter * after
        splitter = split(tokenizer, ids, 2, Thought.UNDECIDED)[1]
        assert splitter.num_reasoning_tokens == 1 + thought
    for ids in (letter * 5, letter + start + letter, end + letter, blank * 3):
        assert split(tokenizer, ids, 2, Thought.UNDECIDED)[1].num_reasoning_tokens == 0


@given(st.text("a<k \n", max_size=12), st.text("b>\n ", max_size=12), st.integers(1, 4), st.booleans())
def test_tokens_of_a_tag_in_the_text_are_no_reasoning(folder, thought, content, size, opened):
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if "think" not in t["content"]]
    tokenizer = Tokenizer(definition, bos_token=None, eos_token=None, eos_ids=frozenset({1}))
    parts = [tokenizer.encode(part) for part in ("\n<think>", thought, "</think>", content)]
    ids = [token for part in parts[not opened :] for token in part]
    splitter = split(tokenizer, ids, size, Thought.UNDECIDED if opened else Thought.OPEN)[1]
    assert splitter.num_reasoning_tokens == len(parts[1])


def test_without_thinking_all_is_content(tokenizer):
    result, splitter = split(tokenizer, ids_of(tokenizer, "\n\nYes. </think> No"), thought=Thought.CLOSED)
    assert result == ("", "Yes. </think> No")
    assert splitter.num_reasoning_tokens == 0


def test_trailing_white_space_is_held_until_more_follows(tokenizer):
    splitter = ReasoningSplitter(tokenizer, Thought.OPEN)
    assert splitter.feed(ids_of(tokenizer, "a\n\n")) == ("a", "")
    assert splitter.feed(ids_of(tokenizer, "b")) == ("\n\nb", "")


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 7))
def test_reasoning_tokens_are_those_before_the_tag(real_tokenizer, before, after, size):
    tokenizer = real_tokenizer
    letter = tokenizer.encode("a")
    ids = letter * before + [tokenizer.think_end_id] + letter * after
    assert split(tokenizer, ids, size)[1].num_reasoning_tokens == before
    assert split(tokenizer, letter * before, size)[1].num_reasoning_tokens == before


def test_a_character_cut_off_by_the_tag_is_shown_as_such(real_tokenizer):
    tokenizer = real_tokenizer
    ids = [*tokenizer.encode("🙂")[:-1], tokenizer.think_end_id, *tokenizer.encode("x")]
    assert split(tokenizer, ids)[0] == ("\ufffd", "x")


def check(stops, parts):
    checker = StopChecker(stops)
    shown = ""
    for part in parts:
        shown += checker.feed(part)
        if checker.found is not None:
            return shown, checker.found, checker.rest
    return shown + checker.flush(), None, ""


def first_completed(stops, text):
    """The oracle: the stop string whose end comes first, the longest of those."""
    ends = [
        (m.end() + len(stop) - 1, -len(stop), stop)
        for stop in stops
        for m in re.finditer(f"(?={re.escape(stop)})", text)
    ]
    return min(((end + 1, length, stop) for end, length, stop in ends), default=None)


small_text = st.text("ab", max_size=30)


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.lists(small_text, max_size=8))
def test_stop_strings_cut_where_the_first_is_completed(stops, parts):
    text = "".join(parts)
    best = first_completed(stops, text)
    shown, found, rest = check(stops, parts)
    if best is None:
        assert (shown, found) == (text, None)
        return
    end, _, stop = best
    assert (shown, found) == (text[: end - len(stop)], stop)
    assert text[end:].startswith(rest)
    assert check(stops, list(text))[:2] == (shown, found)


def test_what_may_begin_a_stop_string_is_held_back():
    checker = StopChecker(["###"])
    assert checker.feed("a#") == "a"
    assert checker.feed("#") == ""
    assert checker.feed("b#") == "##b"
    assert checker.flush() == "#"
    assert StopChecker([]).feed("#") == "#"


def test_stops_that_never_begin_cost_next_to_nothing():
    text, stops = "abcdefgh" * 100_000, [f"#{i}" for i in range(16)]
    checker, start = StopChecker(stops), time.process_time()
    assert "".join(checker.feed(text[i : i + 8]) for i in range(0, len(text), 8)) == text
    assert time.process_time() - start < 1.0
