"""What clients put into messages: their own fields, odd shapes of known ones, parts that are no text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1_cluster.api.errors import ApiError
from r1_cluster.api.protocol import parse_chat_request
from r1_cluster.text.template import ChatTemplate

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TEXT = {"type": "text", "text": "a"}


def parsed(*messages):
    data = json.dumps({"model": "nano", "messages": messages}).encode()
    return parse_chat_request(data).messages


def contents(*messages):
    return [message["content"] for message in parsed(*messages)]


def refused(message):
    with pytest.raises(ApiError) as caught:
        parsed({"role": "user", "content": "x"}, message)
    assert caught.value.status == 400
    assert caught.value.param.startswith("messages[1]")
    assert caught.value.message.startswith(f"{caught.value.param}")
    return caught.value


def test_messages_of_all_roles():
    assert contents(
        {"role": "system", "content": "a"},
        {"role": "developer", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "user", "content": "d", "name": "joe"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "function_call": None},
        {"role": "tool", "content": "e", "tool_call_id": "1"},
        {"role": "assistant", "content": "f", "reasoning_content": "g", "reasoning": "g", "annotations": []},
    ) == ["a", "b\nc", "d", None, "e", "f"]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_parts_of_every_role(role):
    for parts, text in (
        ([TEXT], "a"),
        ([TEXT, {"type": "text", "text": "b"}], "a\nb"),
        (
            [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}],
            "a\nb",
        ),
        ([{**TEXT, "cache_control": {"type": "ephemeral"}}, "b"], "a\nb"),
        ([{"type": "text", "text": ""}], ""),
    ):
        assert contents({"role": role, "content": parts}) == [text]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "tool_use", "robot"])
def test_parts_that_are_no_text_are_refused_by_their_type(role, kind):
    error = refused({"role": role, "content": [TEXT, {"type": kind, kind: {"url": "data:…"}}]})
    assert error.param == "messages[1].content"
    assert (
        error.message == f"messages[1].content: part 1 is of type '{kind}', but only text is supported here"
    )


def test_a_long_type_is_not_sent_back_whole():
    assert len(refused({"role": "user", "content": [{"type": "x" * 10_000}]}).message) < 200


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": "a"}, "a"),
        ({"content": ""}, ""),
        ({}, ""),
        ({"content": None}, ""),
        ({"content": []}, ""),
        ({"content": None, "tool_calls": None}, ""),
        ({"content": None, "tool_calls": []}, ""),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": "a", "refusal": "no"}, "a"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, TEXT]}, "a"),
        ({"content": [{"type": "reasoning", "summary": []}]}, ""),
        ({"content": None, "reasoning_content": "thought alone"}, ""),
        ({"content": None, "function_call": {"name": "f", "arguments": "{}"}}, ""),
        ({"content": None, "audio": {"id": "1"}}, ""),
        ({"content": "a", "prefix": False}, "a"),
        ({"content": None, "tool_calls": [CALL]}, None),
        ({"tool_calls": [CALL]}, None),
        ({"content": "", "tool_calls": [CALL]}, ""),
    ],
    ids=str,
)
def test_what_an_assistant_said(message, content):
    (taken,) = parsed({"role": "assistant", **message})
    assert taken.get("content") == content


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {**CALL, "index": 0},
        {**CALL, "id": None, "type": None},
        {"function": CALL["function"]},
        {**CALL, "function": {**CALL["function"], "parsed_arguments": {}}},
        {**CALL, "cache_control": 1},
    ],
    ids=str,
)
def test_calls_as_clients_keep_them(call):
    (message,) = parsed({"role": "assistant", "tool_calls": [call]})
    assert message["tool_calls"][0]["function"] == CALL["function"]


FOREIGN = {
    "provider_specific_fields": {"a": [1]},
    "thinking_blocks": [{"type": "thinking", "thinking": "…", "signature": "x"}],
    "cache_control": {"type": "ephemeral"},
    "function_call": {"name": "f", "arguments": 5},
    "audio": {"id": "1"},
    "annotations": [{}],
    "reasoning": 5,
    "reasoning_content": {"a": 1},
    "reasoning_details": [],
    "images": [],
    "type": "text",
    "id": 1,
    "metadata": {"trimmed": True},
    "additional_kwargs": {},
    "__proto__": None,
}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_fields_of_the_clients_own_are_dropped(role):
    known = {"role": role, "content": "x"}
    assert parsed({**FOREIGN, **known}) == parsed(known)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
    max_leaves=5,
)
KNOWN = {"role", "content", "name", "refusal", "tool_calls", "tool_call_id", "prefix"}


@given(
    st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), json_values, max_size=4),
)
def test_no_foreign_field_changes_a_message(role, fields):
    known = {"role": role, "content": "x"}
    foreign = {name: value for name, value in fields.items() if name not in KNOWN}
    assert parsed({**foreign, **known}) == parsed(known)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": 3}, "content"),
        ({"role": "user", "content": {}}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "system", "content": []}, "content"),
        ({"role": "system", "content": None}, "content"),
        ({"role": "tool", "content": None}, "content"),
        ({"role": "user", "content": [3]}, "content"),
        ({"role": "user", "content": [{"text": "a"}]}, "content"),
        ({"role": "user", "content": [{"type": 3}]}, "content"),
        ({"role": "user", "content": [{"type": "text"}]}, "content"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "content"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "content"),
        ({"role": "user", "content": [{"type": "thinking"}]}, "content"),
        ({"role": "assistant", "content": 5}, "content"),
        ({"role": "assistant", "content": [{"type": "refusal", "text": "no"}]}, "content"),
        ({"role": "assistant", "refusal": 5}, "refusal"),
        ({"role": "user", "content": "x", "name": 5}, "name"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "tool_call_id"),
        ({"role": "assistant", "content": "x", "prefix": True}, "prefix"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, "tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls[0].type"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            "tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            "tool_calls[0].function.arguments",
        ),
        ({"role": "function", "content": "x", "name": "f"}, "role"),
        ({"role": None, "content": "x"}, "role"),
        ({"role": ["user"], "content": "x"}, "role"),
    ],
    ids=str,
)
def test_odd_values_of_known_fields_are_refused_by_name(message, param):
    assert refused(message).param == f"messages[1].{param}"


def test_what_is_taken_can_be_rendered(checkpoint, tokenizer):
    """Also where a template takes null for the content of a turn with calls alone."""
    strict = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}"
    strict += "{{ m.content + '' }}{% endif %}{% endfor %}<think>"
    for template in (ChatTemplate.from_folder(checkpoint, tokenizer), ChatTemplate(strict, tokenizer)):
        for message in ({"content": None}, {}, {"content": None, "tool_calls": [CALL]}, {"tool_calls": []}):
            messages = parsed({"role": "user", "content": "x"}, {"role": "assistant", **message})
            assert template.prompt_ids(messages)
