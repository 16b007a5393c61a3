import json

import pytest
from make_tokenizer import make_tokenizer

from r1_cluster.api.errors import ApiError
from r1_cluster.edge.prepare import MAX_STOP_CHARACTERS, Preparer
from r1_cluster.text.reasoning import Thought
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
    chat, record, _ = preparer.prepare(body(seed=5))
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
    chat, record, _ = preparer.prepare(body(stop="\n", stream=True, **fields))
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


@pytest.fixture(scope="module")
def undecided(options, tmp_path_factory):
    """As R1-0528's service prepares: its template opens no thought."""
    folder = tmp_path_factory.mktemp("r1-0528")
    make_tokenizer(folder, "deepseek_v3", template="r1-0528")
    return Preparer(options._replace(model_path=str(folder)))


def test_where_the_model_opens_the_thought_stop_tokens_wait_for_what_it_does(preparer, undecided):
    start, end = undecided.tokenizer.think_start_id, undecided.tokenizer.think_end_id
    _, record, thought = undecided.prepare(body(stop_token_ids=[9]))
    assert (record.sleeping_from, record.sleeping_until, thought) == (start, end, Thought.UNDECIDED)
    assert undecided.tokenizer.decode(record.prompt) == "<｜User｜>Hello<｜Assistant｜>"
    _, record, thought = undecided.prepare(body(stop_in_thought=True))
    assert (record.sleeping_from, record.sleeping_until, thought) == (None, None, Thought.UNDECIDED)
    _, record, thought = undecided.prepare(body(thinking={"type": "disabled"}))
    assert (record.sleeping_from, record.sleeping_until, thought) == (None, None, Thought.CLOSED)
    assert undecided.tokenizer.decode(record.prompt).endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    _, record, thought = preparer.prepare(body())
    assert (record.sleeping_from, record.sleeping_until, thought) == (None, end, Thought.OPEN)


@pytest.mark.parametrize("missing", ["<think>", "</think>"])
def test_stop_tokens_are_refused_where_the_engine_could_not_see_the_thought(options, tmp_path, missing):
    """A template that opens the thought itself needs no token for its beginning."""
    for template, refuses in (("r1", missing == "</think>"), ("r1-0528", True)):
        make_tokenizer(tmp_path, "deepseek_v3", template=template)
        file = tmp_path / "tokenizer.json"
        definition = json.loads(file.read_text())
        definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] != missing]
        file.write_text(json.dumps(definition))
        preparer = Preparer(options._replace(model_path=str(tmp_path)))
        assert preparer.prepare(body(stop_token_ids=[9], stop_in_thought=True))
        if refuses:
            assert refused(preparer, body(stop_token_ids=[9])).param == "stop_token_ids"
        else:
            assert preparer.prepare(body(stop_token_ids=[9])).record.sleeping_until is not None


def test_only_the_served_model_is_there(preparer):
    assert refused(preparer, body(model="../../etc")).code == "model_not_found"


def test_stop_strings_are_bounded_together(preparer):
    assert preparer.prepare(body(stop=["a" * (MAX_STOP_CHARACTERS // 16)] * 16)).chat.stop
    error = refused(preparer, body(stop=["a" * (MAX_STOP_CHARACTERS // 16)] * 15 + ["b" * 300]))
    assert error.param == "stop"
    assert str(MAX_STOP_CHARACTERS) in error.message
