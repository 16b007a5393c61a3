"""The tokenizer: round trips, single digits, control tokens out of the user's reach, R1's template."""

import functools
import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_r1.data import training_examples
from nano_r1.tokenizer import (
    ADDED_TOKENS,
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    PAD,
    PAD_ID,
    VOCAB_SIZE,
    ChatEncoder,
    save_tokenizer,
    train_tokenizer,
)
from tokenizers import Tokenizer


def make_tokenizer() -> Tokenizer:
    examples = islice(training_examples(random.Random(0)), 4000)
    return train_tokenizer(text for e in examples for text in (e.prompt, e.thought, e.answer))


@functools.cache
def encoder() -> ChatEncoder:
    return ChatEncoder(make_tokenizer())


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert encoder().tokenizer.decode(encoder().text(text), skip_special_tokens=False) == text


@given(st.integers(0, 10**9))
def test_digits_never_merge(number: int) -> None:
    assert len(encoder().text(str(number))) == len(str(number))
    assert len(encoder().text(f"x{number} {number}y")) == 3 + 2 * len(str(number))


def test_control_tokens_have_r1s_ids_and_flags() -> None:
    tokenizer = encoder().tokenizer
    assert [tokenizer.token_to_id(text) for text in (BOS, EOS, PAD)] == [BOS_ID, EOS_ID, PAD_ID] == [0, 1, 2]
    flags = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert flags == {BOS: True, EOS: True, PAD: True} | dict.fromkeys(ADDED_TOKENS, False)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


@pytest.mark.parametrize("text", [*ADDED_TOKENS, BOS, EOS, PAD])
def test_users_cannot_write_control_tokens(text: str) -> None:
    control = set(encoder().tokenizer.get_added_tokens_decoder())
    assert not control & set(encoder().text(f"a{text}b"))


def test_training_is_deterministic() -> None:
    assert make_tokenizer().to_str() == encoder().tokenizer.to_str()


def test_thought_steps_are_single_tokens() -> None:
    for text in (" → ", " carry ", " borrow ", " | ", ": ", ", ", "①", "②", "③", "④", "⑤"):
        assert len(encoder().text(text)) == 1, text


def test_chat_template_and_encoder_agree(tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(encoder().tokenizer, tmp_path, 2048)
    reader = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a greeting\n</think>\n\nHello!"},
        {"role": "user", "content": "2+2"},
    ]
    text = reader.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        f"{BOS}Be brief.<｜User｜>hi<｜Assistant｜>\n\nHello!{EOS}<｜User｜>2+2<｜Assistant｜><think>\n"
    )
    ids = encoder().tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == encoder().prompt("2+2", (("hi", "\n\nHello!"),), "Be brief.")


def test_chat_template_writes_tool_calls_and_outputs(tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(encoder().tokenizer, tmp_path, 2048)
    reader = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    one_call = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
    assert reader.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
        f"{BOS}<｜User｜>go<｜Assistant｜><｜tool▁calls▁begin｜>{one_call}\n{one_call}<｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜>"
        "\n<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
