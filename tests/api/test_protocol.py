import inspect
import json
import time
from pathlib import Path

import pytest
from openai.resources.chat.completions import Completions

from r1_cluster.api.errors import ApiError
from r1_cluster.api.fields import IGNORED_FIELDS, NEUTRAL_VALUES
from r1_cluster.api.protocol import MAX_MESSAGES, ChatCompletionRequest, parse_chat_request

USER = {"role": "user", "content": "Hello"}


def body(**fields):
    return json.dumps({"model": "nano", "messages": [USER], **fields}).encode()


def refused(data):
    with pytest.raises(ApiError) as caught:
        parse_chat_request(data)
    error = caught.value
    assert error.status == 400
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}
    assert error.type == "invalid_request_error"
    assert "Error" not in error.message
    return error


def test_a_minimal_request_leaves_everything_to_the_service():
    request = parse_chat_request(body())
    assert request.messages == [USER]
    assert (
        request.temperature
        is request.top_p
        is request.top_k
        is request.seed
        is request.max_output_tokens
        is None
    )
    assert (request.stop, request.stop_token_ids, request.ignore_eos) == ([], [], False)
    assert request.thinking
    assert not request.include_usage


def test_a_full_request():
    request = parse_chat_request(
        body(
            temperature=0,
            top_p=1,
            top_k=5,
            seed=-(2**63),
            stop="\n",
            stop_token_ids=[7],
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
            ignore_eos=True,
            chat_template_kwargs={"thinking": False},
        )
    )
    assert (request.temperature, request.top_p, request.top_k, request.seed) == (0, 1, 5, -(2**63))
    assert (request.stop, request.stop_token_ids, request.max_output_tokens) == (["\n"], [7], 9)
    assert request.include_usage
    assert request.ignore_eos
    assert not request.thinking


@pytest.mark.parametrize("value", [-1, 0])
def test_both_ways_to_turn_top_k_off(value):
    assert parse_chat_request(body(top_k=value)).top_k == 0


KNOWN_FIELDS = (
    IGNORED_FIELDS | NEUTRAL_VALUES.keys() | ChatCompletionRequest.model_json_schema()["properties"].keys()
)


def test_null_is_silence():
    nulls = dict.fromkeys(KNOWN_FIELDS - {"model", "messages"})
    assert len(nulls) > 70
    assert parse_chat_request(body(**nulls)) == parse_chat_request(body())
    options = {"include_usage": None, "include_obfuscation": None, "continuous_usage_stats": None}
    assert not parse_chat_request(body(stream=True, stream_options=options)).include_usage
    assert parse_chat_request(body(chat_template_kwargs={"thinking": None})).thinking


def test_every_field_of_openais_client_is_known():
    parameters = inspect.signature(Completions.create).parameters.keys()
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert parameters - transport <= KNOWN_FIELDS


def test_no_field_is_of_two_minds():
    fields = ChatCompletionRequest.model_json_schema()["properties"].keys()
    assert not IGNORED_FIELDS & NEUTRAL_VALUES.keys()
    assert not (IGNORED_FIELDS | NEUTRAL_VALUES.keys()) & fields


def test_the_docs_name_every_field():
    text = (Path(__file__).parents[2] / "docs/api.md").read_text()
    assert {name for name in KNOWN_FIELDS if f"`{name}`" not in text} == set()


def test_ignored_fields_may_hold_anything():
    for value in ("x", 5, True, {"a": [1]}, [None], ""):
        assert parse_chat_request(body(**dict.fromkeys(IGNORED_FIELDS, value))) == parse_chat_request(body())


def test_values_that_change_nothing_are_taken():
    for name, values in NEUTRAL_VALUES.items():
        for value in values:
            assert parse_chat_request(body(**{name: value})) == parse_chat_request(body())
    floats = {
        "n": 1.0,
        "presence_penalty": -0.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "top_logprobs": 0.0,
    }
    assert parse_chat_request(body(**floats)) == parse_chat_request(body())


@pytest.mark.parametrize("value", [7, 0.5, "x", {"a": 1}, ["a"]], ids=str)
@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_what_is_not_built_is_refused_by_name(name, value):
    error = refused(body(**{name: value}))
    assert (error.param, error.message) == (name, f"this value of {name} is not supported yet")


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, True),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "disabled", "budget_tokens": None}, "reasoning_effort": "high"}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, True),
        ({"reasoning_effort": "max"}, True),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, True),
        ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}}, False),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": True}}, True),
    ],
    ids=str,
)
def test_switches_of_the_thought(fields, thinking):
    request = parse_chat_request(body(**fields))
    assert request.thinking is thinking
    assert request.stops_sleep is thinking
    assert not parse_chat_request(body(**fields, stop_in_thought=True)).stops_sleep


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**99}, "seed"),
        ({"seed": True}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a"] * 1000}, "stop"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"chat_template_kwargs": {"thinking": 0}}, "chat_template_kwargs.thinking"),
        ({"chat_template_kwargs": {"enable": True}}, "chat_template_kwargs.enable"),
        ({"temprature": 1}, "temprature"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"logprobs": 0}, "logprobs"),
        ({"stop_in_thought": "yes"}, "stop_in_thought"),
        ({"thinking": {"type": "adaptive"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "display": 1}}, "thinking.display"),
        ({"thinking": True}, "thinking"),
        ({"thinking_switch": {"type": "enabled"}}, "thinking_switch"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"temprature": None}, "temprature"),
        ({"thinking_budget": 5}, "thinking_budget"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(fields, param):
    error = refused(body(**fields))
    assert error.param == param
    assert param in error.message


def test_a_missing_field_and_an_unsupported_one_are_told_apart():
    assert refused(b'{"messages":[]}').message == "model is required"
    assert refused(body(temprature=1)).message == "unknown field: temprature"
    assert "not supported yet" in refused(body(n=2)).message


def test_a_long_name_is_not_sent_back_whole():
    assert len(refused(body(**{"x" * 10_000: 1})).message) < 200


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"null", "JSON object"),
        (b"[]", "JSON object"),
        (b'"x"', "JSON object"),
        (b"5", "JSON object"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"model": "x"}'.encode("utf-16"), "UTF-8"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"model": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"model": "a\x00b"}', "not valid JSON"),
        (rb'{"model": "\ud800"}', "surrogate"),
        (rb'{"model": "\uDC00\uD800"}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000, "nested"),
        (b'{"a": ' * 100_000, "nested"),
        (b'{"model": 1, "model": 2}', "the key model stands there twice"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e400}', "too large"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "10000 digits"),
        (b'{"seed": -' + b"9" * 10_000_000 + b"}", "digits"),
        (b'{"top_p": 0.' + b"9" * 10_000_000 + b"}", "digits"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_bodies_that_are_no_request(data, words):
    start = time.perf_counter()
    error = refused(data)
    assert time.perf_counter() - start < 2
    assert words in error.message
    assert error.param is None
    assert len(error.message) < 200


def test_text_may_hold_any_character():
    data = rb'{"model": "m", "messages": [{"role": "user", "content": "\u0000 \ud83d\ude42 \uffff"}]}'
    assert parse_chat_request(data).messages[0]["content"] == "\0 🙂 \uffff"


def refused_within(seconds, data):
    start = time.process_time()
    error = refused(data)
    assert time.process_time() - start < seconds
    return error


def test_too_many_messages_are_named():
    assert refused(body(messages=[USER] * (MAX_MESSAGES + 1))).param == "messages"
    assert len(parse_chat_request(body(messages=[USER] * MAX_MESSAGES)).messages) == MAX_MESSAGES


def test_a_key_that_stands_there_twice_among_150_000_costs_no_more_than_reading_them():
    keys = ",".join(f'"k{i}": 0' for i in range(150_000))
    error = refused_within(10, f'{{{keys}, "k149999": 0}}'.encode())
    assert error.message.endswith("the key k149999 stands there twice")


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b'{"model": "m", "messages": [' + b",".join([b'{"role":"user","content":""}'] * 1_000_000) + b"]}",
        b'{"logit_bias": {' + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b"}}",
        b'{"stop": [' + b'"a",' * 4_000_000 + b'"a"]}',
        b'{"a": [' + b"[],{}," * 2_000_000 + b"0]}",
        # Text that never ends, in which each escaped quote might be its beginning.
        b'{"a": "' + rb"\"," * 4_000_000,
        b'{"a": "' + rb"\"," * 4_000_000 + b"\\",
    ],
    ids=["messages", "keys", "stops", "brackets", "no end", "no end but a backslash"],
)
def test_a_body_of_megabytes_is_refused_in_linear_time(data):
    assert refused_within(10, data).param is None


def test_commas_in_text_are_no_values():
    text = 'a,b:[{"\\' * 200_000
    assert (
        parse_chat_request(body(messages=[{"role": "user", "content": text}])).messages[0]["content"] == text
    )
