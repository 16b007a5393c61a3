import json
import sys
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from make_tokenizer import BOS, CONTROL_TOKENS, EOS
from tokenizers import Tokenizer as Reference

from r1_cluster.text.tokenizer import NFC_SHORTENS, Piece, Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def reference(folder):
    return Reference.from_file(str(folder / "tokenizer.json"))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# Text in which control tokens are frequent.
tricky = st.lists(st.one_of(text, st.sampled_from([BOS, EOS, *CONTROL_TOKENS])), max_size=6).map("".join)


@given(tricky)
def test_no_text_becomes_a_control_token(tokenizer, value):
    ids = tokenizer.encode(value)
    assert not tokenizer.control_ids & set(ids)
    assert tokenizer.decode(ids) == value


@given(tricky)
def test_trusted_text_is_encoded_as_the_reference_does(tokenizer, reference, value):
    expected = reference.encode(value, add_special_tokens=False).ids
    assert tokenizer.encode_pieces([Piece(value, True)]) == expected


@given(st.lists(text, max_size=5))
def test_how_ordinary_text_is_cut_into_pieces_makes_no_difference(tokenizer, parts):
    # Hypothesis takes words from the code, too, and control tokens in trusted text are no ordinary text.
    assume(not any(token in part for token in (BOS, EOS, *CONTROL_TOKENS) for part in parts))
    pieces = [Piece(part, i % 2 == 0) for i, part in enumerate(parts)]
    assert tokenizer.encode_pieces(pieces) == tokenizer.encode("".join(parts))


def test_a_control_token_is_not_put_together_from_trusted_and_other_text(tokenizer):
    ids = tokenizer.encode_pieces([Piece("</thi", True), Piece("nk>", False), Piece("</think>", True)])
    assert ids[-1] == tokenizer.think_end_id
    assert not tokenizer.control_ids & set(ids[:-1])


@given(st.lists(st.integers(0, 511), max_size=40))
def test_decode_skips_special_tokens_as_the_reference_does(tokenizer, reference, ids):
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@given(st.lists(st.tuples(text, st.booleans()), max_size=6))
def test_no_prompt_has_fewer_tokens_than_at_least(tokenizer, parts):
    pieces = [Piece(*part) for part in parts]
    assert 0 <= tokenizer.at_least(pieces) <= len(tokenizer.encode_pieces(pieces))


def test_a_prompt_of_the_longest_tokens_is_counted_exactly(tokenizer):
    longest = max(map(tokenizer.token_bytes, range(512)), key=len)
    control = max(["<｜Assistant｜>", "<｜tool▁outputs▁begin｜>"], key=lambda text: len(text.encode()))
    assert tokenizer.at_least([Piece(control * 10, True)]) <= 10
    assert tokenizer.at_least([Piece("x" * 10_000_000, False)]) > 100_000
    assert tokenizer.at_least([Piece(longest.decode() * 10, False)]) <= 10


def test_what_normalizers_may_shorten_text_to(folder):
    definition = json.loads((folder / "tokenizer.json").read_text())

    def at_least(normalizer):
        changed = definition | {"normalizer": normalizer}
        tokenizer = Tokenizer(changed, bos_token=None, eos_token=None, eos_ids=frozenset({1}))
        return tokenizer.at_least([Piece("x" * 1000, False)])

    plain, nfc = at_least(None), at_least({"type": "NFC"})
    assert plain > 10
    assert nfc == -(-plain // 4)
    assert at_least({"type": "Sequence", "normalizers": []}) == plain
    assert at_least({"type": "Sequence", "normalizers": [{"type": "NFC"}]}) == nfc
    assert at_least({"type": "NFKC"}) == at_least({"type": "Lowercase"}) == 0
    assert at_least({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}) == 0


def test_nfc_shortens_no_text_more_than_is_reckoned_with():
    """Of the text that becomes a character, each part is one that NFD gives, or one that it replaces."""
    every = (chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000)
    parts_of = {c: parts for c in every if (parts := unicodedata.normalize("NFD", c)) != c}
    longest = {}
    for character, parts in parts_of.items():
        if len(parts) == 1:
            longest[parts] = max(longest.get(parts, 0), len(character.encode()))
    for character in [*parts_of, *longest]:
        parts = parts_of.get(character, character)
        before = sum(max(longest.get(part, 0), len(part.encode())) for part in parts)
        assert len(parts) == 1 or len(character.encode()) <= before  # itself it is no longer than its parts
        if unicodedata.normalize("NFC", character) == character:
            assert before <= NFC_SHORTENS * len(character.encode())


def test_ids_beyond_the_tokenizer_give_no_text(tokenizer):
    assert tokenizer.decode([10**6]) == ""


def test_names_of_bos_and_eos(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_id) == (BOS, 0)
    assert (tokenizer.eos_token, tokenizer.eos_ids) == (EOS, {1})
    assert tokenizer.token_id("<think>") + 1 == tokenizer.think_end_id
    assert tokenizer.token_id("think") is None


def edited(folder, target, name, change):
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        (target / file).write_bytes((folder / file).read_bytes())
    data = json.loads((target / name).read_text())
    change(data)
    (target / name).write_text(json.dumps(data))
    return target


def test_eos_ids_come_from_all_three_files(folder, tmp_path):
    edited(
        folder,
        tmp_path,
        "generation_config.json",
        lambda data: data.update(eos_token_id=[7, 9, True, "8", -1]),
    )
    assert Tokenizer.from_folder(tmp_path).eos_ids == {1, 7, 9}


def drop_eos(data):
    data["eos_token"] = None


def rename_decoder(data):
    data["decoder"] = {"type": "Metaspace"}


def reach_control(data):
    data["model"]["vocab"]["<"] = data["added_tokens"][-1]["id"]


def strip_left(data):
    data["added_tokens"][-1]["lstrip"] = True


def break_model(data):
    data["model"]["vocab"] = [1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_decoder, "byte-level"),
        (reach_control, "ordinary text can become"),
        (strip_left, "lstrip"),
        (break_model, "cannot be read"),
        (lambda data: data.update(added_tokens=["x"]), "malformed"),
        (lambda data: data["added_tokens"].append({"id": 5, "content": ""}), "malformed"),
        (lambda data: data["added_tokens"].append({"id": -1, "content": "x"}), "malformed"),
        (lambda data: data["added_tokens"].append({"id": "5", "content": "x"}), "malformed"),
        (lambda data: data["added_tokens"].append({"id": True, "content": "x"}), "malformed"),
        (lambda data: data["added_tokens"].append({"id": 5, "content": 7}), "malformed"),
    ],
)
def test_unusable_tokenizers_are_refused(folder, tmp_path, change, words):
    edited(folder, tmp_path, "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.from_folder(tmp_path)


def test_missing_and_broken_files_are_named(folder, tmp_path):
    with pytest.raises(TokenizerError, match=r"no .*tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"config\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text())
    with pytest.raises(TokenizerError, match="end-of-sequence"):
        Tokenizer(definition, bos_token=None, eos_token=None)
