"""OpenAI's own client."""

import asyncio
import inspect

import openai
import pytest
from scripted_server import ANSWER, THOUGHT

ASK = {"model": "nano", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def text_of(chunks):
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    return thought, "".join(delta.content or "" for delta in deltas)


def test_null_for_every_parameter(client, server):
    parameters = inspect.signature(client.chat.completions.create).parameters.keys()
    nulls = dict.fromkeys(parameters - {"extra_headers", "extra_query", "extra_body", "timeout"})
    answer = client.chat.completions.create(**{**nulls, **ASK})
    assert answer.choices[0].message.content == ANSWER
    (body,) = server.bodies
    assert len(body) > 30
    assert {name: value for name, value in body.items() if value is not None} == ASK
    vllms = (
        "top_k",
        "min_p",
        "stop_token_ids",
        "ignore_eos",
        "chat_template_kwargs",
        "min_tokens",
        "guided_json",
    )
    client.chat.completions.create(**ASK, extra_body=dict.fromkeys(vllms))


def test_the_clients_own_message_comes_back(client, server):
    messages = [*ASK["messages"]]
    for streamed in (False, True):
        if streamed:
            with client.chat.completions.stream(model="nano", messages=messages) as stream:
                message = stream.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(model="nano", messages=messages).choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, ANSWER)
        messages += [message, {"role": "user", "content": "more"}]
    client.chat.completions.create(model="nano", messages=messages)
    assert {"reasoning_content", "reasoning"} <= server.bodies[-1]["messages"][1].keys()
    assert server.prompts[-1].count(ANSWER) == 2
    assert THOUGHT not in server.prompts[-1]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_was_thought_alone_comes_back(client, server, streamed):
    server.answer = None
    if streamed:
        with client.chat.completions.stream(**ASK) as stream:
            message = stream.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**ASK).choices[0].message
    assert message.reasoning_content == THOUGHT
    for content in (message.content, None):
        again = [*ASK["messages"], {**message.model_dump(), "content": content}, *ASK["messages"]]
        client.chat.completions.create(model="nano", messages=again)


def test_streams_and_their_usage(client):
    with client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert text_of(chunks) == (THOUGHT, ANSWER)
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens > 0


async def async_answers(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        whole = await client.chat.completions.create(**ASK, temperature=0, max_completion_tokens=100)
        async with await client.chat.completions.create(**ASK, stream=True) as stream:
            return whole.choices[0].message, [chunk async for chunk in stream]


def test_the_asynchronous_client(server):
    message, chunks = asyncio.run(async_answers(server.url))
    assert (message.reasoning_content, message.content) == (THOUGHT, ANSWER)
    assert text_of(chunks) == (THOUGHT, ANSWER)


def test_stop_sleeps_until_the_answer(client):
    answer = client.chat.completions.create(**ASK, stop=["\n\n", "世"])
    assert answer.choices[0].message.reasoning_content == THOUGHT
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("The answer is ", "stop")
    awake = client.chat.completions.create(**ASK, stop="\n\n", extra_body={"stop_in_thought": True})
    assert awake.choices[0].message.reasoning_content == "Let me see."
    options = {"chat_template_kwargs": {"thinking": False}}
    without = client.chat.completions.create(**ASK, stop="世", extra_body=options)
    assert without.choices[0].message.content == "The answer is "


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
    ],
)
def test_what_is_not_built_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, **{field: value})
    assert caught.value.param == field
    assert caught.value.type == "invalid_request_error"


def test_an_image_is_refused_by_name(client):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, image]}]
    with pytest.raises(openai.BadRequestError, match="'image_url'") as caught:
        client.chat.completions.create(model="nano", messages=messages)
    assert caught.value.param == "messages[0].content"
