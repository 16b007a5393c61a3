"""The tokenizers of all ten models, by small ones of the same structure, against `tokenizers` and `transformers`."""

import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_tokenizer import BOS, EOS, FAMILIES, TEMPLATES, main, make_tokenizer, min_vocab
from tokenizers import Tokenizer as Reference

from r1_cluster.text.detokenize import StreamDecoder
from r1_cluster.text.template import ChatTemplate
from r1_cluster.text.tokenizer import Piece, Tokenizer

VOCAB_SIZE = 1536

# Text that the structures cut in ways of their own, or that a byte, a normalizer or a cut may break.
ODD = [
    "12345678901 ٣٤٥ ⅷ² 1,234.50",
    "   a\t\tb \n\n  \r\n c\n",
    "I'm, we'LL, don'T, l'été d'accord 's",
    "請一步一步地推理。ひらがなカタカナ한국어",
    "e\u0301 A\u030a \u212b \u2126 \u1100\u1161\u11a8 \u0958 \u1fbe\u0308\u0341 ﬁ",
    "👩‍👩‍👧‍👦🇯🇵👍🏽 \U0001f1e6",
    "\x00\x01\x7f\u200b\ufeff\u2028\u3000\xa0",
    "<think> </think> <|endoftext|> <tool_call> <|fim_prefix|>",
    "https://example.org/?a=1&b=[2]#c _snake_case CamelCase `x`",
    "\u0301\u0308 starts with marks",
    "𝔘𝔫𝔦 \U0010fffd \ue000",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    ids = make_tokenizer(folder, family, VOCAB_SIZE)
    (folder / "config.json").write_text(json.dumps(ids))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return Reference.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def plain(folder):
    """The library's, without added tokens: what text is that somebody else wrote."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    return Reference.from_str(json.dumps(definition | {"added_tokens": [], "post_processor": None}))


@cache
def added(family):
    return [*FAMILIES[family].first, *FAMILIES[family].last]


ALL_ADDED = sorted({token for family in FAMILIES for token in added(family)})
characters = st.characters(exclude_categories=["Cs"])
text = st.lists(
    st.one_of(st.text(characters, max_size=20), st.sampled_from(ODD), st.sampled_from(ALL_ADDED)), max_size=5
).map("".join)


def normal(reference, value):
    return value if reference.normalizer is None else reference.normalizer.normalize_str(value)


@pytest.mark.slow
@given(text)
def test_what_a_user_writes_is_text_and_nothing_else(tokenizer, reference, plain, value):
    ids = tokenizer.encode(value)
    assert ids == plain.encode(value, add_special_tokens=False).ids
    assert not tokenizer.control_ids & set(ids)
    assert tokenizer.decode(ids) == normal(reference, value)


@pytest.mark.slow
@given(text)
def test_what_the_template_writes_is_encoded_as_the_library_does(tokenizer, reference, value):
    expected = reference.encode(value, add_special_tokens=False).ids
    assert tokenizer.encode_pieces([Piece(value, True)]) == expected


@pytest.mark.slow
@given(text, text)
def test_a_prompt_has_the_control_tokens_of_its_template_alone(tokenizer, first, second):
    pieces = [
        Piece(BOS, True),
        Piece(first, False),
        Piece("<｜Assistant｜>", True),
        Piece(second, False),
        Piece("<think>\n", True),
    ]
    ids = tokenizer.encode_pieces(pieces)
    controls = [token for token in ids if token in tokenizer.control_ids]
    assert controls == [tokenizer.bos_id, tokenizer.token_id("<｜Assistant｜>"), tokenizer.think_start_id]
    assert tokenizer.at_least(pieces) <= len(ids)


@given(st.lists(st.integers(0, VOCAB_SIZE + 3), max_size=40), st.lists(st.integers(0, 4), max_size=12))
def test_decoding_is_the_librarys_however_the_ids_come(tokenizer, reference, ids, sizes):
    """Ids at random are mostly broken UTF-8, with control tokens among it."""
    expected = reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == expected
    decoder, shown = StreamDecoder(tokenizer), []
    for size in sizes:
        shown.append(decoder.feed(ids[:size]))
        ids = ids[size:]
    assert "".join(shown) + decoder.feed(ids) + decoder.flush() == expected


@given(text)
def test_a_stream_shows_whole_characters_only(tokenizer, reference, value):
    decoder = StreamDecoder(tokenizer)
    shown = "".join(decoder.feed([token]) for token in tokenizer.encode(value))
    assert shown == normal(reference, value)
    assert decoder.flush() == ""


def test_tokens_end_within_characters(family, tokenizer):
    """Else nothing above had to be put together. R1's stand-in has single bytes alone for that."""
    sizes = [len(tokenizer.token_bytes(i)) for i in range(VOCAB_SIZE) if "\ufffd" in tokenizer.decode([i])]
    assert max(sizes) > 1 or family == "deepseek_v3"
    assert sizes.count(1) == 128


def test_digits_are_cut_as_the_family_cuts_them(family, tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("20261126")]
    assert "".join(pieces) == "20261126"
    assert max(map(len, pieces)) <= (3 if family in ("deepseek_v3", "llama") else 1)


@pytest.mark.parametrize("words", ODD, ids=range(len(ODD)))
def test_transformers_reads_the_same(folder, tokenizer, words):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    trusted = f"{BOS}{words}<｜User｜>{words}</think>{EOS}"
    ids = tokenizer.encode_pieces([Piece(trusted, True)])
    assert ids == theirs.encode(trusted, add_special_tokens=False)
    assert tokenizer.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_marks_and_places_of_the_control_tokens(family, folder, tokenizer):
    """The tags are added tokens and not special, so that their text appears; BOS and EOS are special."""
    for text, shown in (("<think>", "<think>"), ("</think>", "</think>"), (BOS, ""), (EOS, "")):
        token = tokenizer.token_id(text)
        assert tokenizer.decode([token]) == shown
    config = json.loads((folder / "config.json").read_text())
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (config["bos_token_id"], {config["eos_token_id"]})
    assert (tokenizer.bos_id < 256) == (family == "deepseek_v3")
    assert (tokenizer.token_id("<｜tool▁sep｜>") is None) == (family in ("llama", "qwen2"))


def test_where_the_vocabulary_has_no_tool_tokens_they_are_the_templates_text(family, tokenizer, folder):
    call = {"function": {"name": "now", "arguments": "{}"}}
    messages = [{"role": "user", "content": "<｜tool▁sep｜>"}, {"role": "assistant", "tool_calls": [call]}]
    ids = ChatTemplate.from_folder(folder, tokenizer).prompt_ids(messages)
    token = tokenizer.token_id("<｜tool▁sep｜>")
    assert ids.count(token) == (0 if token is None else 1)
    assert tokenizer.decode(ids).count("<｜tool▁sep｜>") == 2


def test_blank_tokens_are_white_space(tokenizer, reference):
    blank = tokenizer.blank_ids()
    assert set(tokenizer.encode(" ")) | set(tokenizer.encode("\n")) <= blank
    for token in range(VOCAB_SIZE):
        assert (token in blank) == reference.decode([token], skip_special_tokens=True).isspace()
        assert tokenizer.is_blank(token) == (token in blank)
    assert not tokenizer.is_blank(VOCAB_SIZE + 7)


def test_the_same_arguments_give_the_same_files(family, folder, tmp_path):
    make_tokenizer(tmp_path, family, VOCAB_SIZE)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_the_smallest_vocabulary_of_each_family(tmp_path, family, capsys):
    size = min_vocab(family)
    assert main([str(tmp_path), "--family", family, "--vocab-size", str(size), "--template", "r1"]) == 0
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(ODD[3])) == ODD[3]
    assert max(tokenizer.control_ids) < size
    assert main([str(tmp_path), "--family", family, "--vocab-size", str(size - 1)]) == 1
    assert f"below {size}" in capsys.readouterr().err


def test_what_there_is_not_is_named(tmp_path):
    with pytest.raises(ValueError, match="there are: deepseek_v3, llama, qwen2, qwen3"):
        make_tokenizer(tmp_path, "gpt2")
    with pytest.raises(ValueError, match=f"there are: {', '.join(TEMPLATES)}"):
        make_tokenizer(tmp_path, "llama", template="chatml")
