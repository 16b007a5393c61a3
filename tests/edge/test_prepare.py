import json

import pytest

from r1_cluster.api.errors import ApiError
from r1_cluster.edge.prepare import MAX_STOP_CHARACTERS, Preparer
from r1_cluster.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def preparer(options):
    return Preparer(options)


def body(text="Hello", **fields):
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}).encode()


def refused(preparer, data):
    with pytest.raises(ApiError) as caught:
        preparer.prepare(data)
    return caught.value


def test_a_request_gets_the_services_defaults(preparer):
    chat, record = preparer.prepare(body(seed=5))
    assert (record.sampling.temperature, record.sampling.top_p) == pytest.approx((0.6, 0.95))
    assert (record.sampling.top_k, record.sampling.seed) == (0, 5)
    assert record.max_tokens == 128 - len(record.prompt)
    assert (record.request_id, record.sink) == ("", "")
    assert preparer.tokenizer.decode(record.prompt).endswith("Hello<｜Assistant｜><think>\n")
    assert chat.messages == []


def test_what_a_request_asks_for_is_passed_on(preparer):
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "max_tokens": 7,
        "stop_token_ids": [9],
        "ignore_eos": True,
    }
    chat, record = preparer.prepare(body(stop="\n", stream=True, **fields))
    assert (record.sampling.temperature, record.sampling.top_p, record.sampling.top_k) == (0, 0.5, 3)
    assert (record.max_tokens, record.stop_token_ids, record.ignore_eos) == (7, [9], True)
    assert (chat.stop, chat.stream) == (["\n"], True)


def test_without_a_seed_each_request_gets_its_own(preparer):
    assert len({preparer.prepare(body()).record.sampling.seed for _ in range(8)}) == 8


def test_the_whole_context_can_be_asked_for_and_no_more(preparer):
    room = 128 - len(preparer.prepare(body()).record.prompt)
    assert preparer.prepare(body(max_tokens=room)).record.max_tokens == room
    error = refused(preparer, body(max_tokens=room + 1))
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    error = refused(preparer, body("x " * 100))
    assert error.code == "context_length_exceeded"
    assert "at least" not in error.message


def test_text_that_cannot_fit_is_not_tokenized(preparer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail("tokenized"))
    error = refused(preparer, body("x " * 2_000_000))
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert "at least" in error.message


def test_stop_tokens_are_the_models_and_sleep_until_the_answer(preparer):
    assert refused(preparer, body(stop_token_ids=[512])).param == "stop_token_ids[0]"
    end = preparer.tokenizer.think_end_id
    assert preparer.prepare(body(stop_token_ids=[511])).record.sleeping_until == end
    assert preparer.prepare(body(stop_in_thought=True)).record.sleeping_until is None


def test_only_the_served_model_is_there(preparer):
    assert refused(preparer, body(model="../../etc")).code == "model_not_found"


def test_stop_strings_are_bounded_together(preparer):
    assert preparer.prepare(body(stop=["a" * (MAX_STOP_CHARACTERS // 16)] * 16)).chat.stop
    error = refused(preparer, body(stop=["a" * (MAX_STOP_CHARACTERS // 16)] * 15 + ["b" * 300]))
    assert error.param == "stop"
    assert str(MAX_STOP_CHARACTERS) in error.message
