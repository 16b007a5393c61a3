"""LiteLLM, by each of the routes that people take to a server like this one."""

import pytest
from litellm_client import litellm_client
from scripted_server import ANSWER, THOUGHT

# It has pydantic make schemas of types that pydantic warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning")

ROUTES = ["openai", "hosted_vllm", "deepseek"]


@pytest.fixture(scope="module")
def litellm():
    with litellm_client() as module:
        yield module


@pytest.fixture(params=ROUTES)
def complete(request, server, litellm):
    def ask(messages, **options):
        common = {"api_base": server.url, "api_key": "none", "max_retries": 0, "timeout": 30}
        answer = litellm.completion(model=f"{request.param}/nano", messages=messages, **common, **options)
        return litellm.stream_chunk_builder(list(answer)) if options.get("stream") else answer

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_its_own_message_comes_back(complete, server, streamed):
    messages = [{"role": "user", "content": "Hi"}]
    for turn in range(3):
        message = complete(messages, stream=streamed).choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, ANSWER)
        assert server.prompts[-1].count(ANSWER) == turn
        messages += [message, {"role": "user", "content": "more"}]
    assert streamed or "provider_specific_fields" in server.bodies[-1]["messages"][1]
    assert THOUGHT not in server.prompts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_was_thought_alone_comes_back(complete, server, streamed):
    server.answer = None
    messages = [{"role": "user", "content": "Hi"}]
    message = complete(messages, stream=streamed).choices[0].message
    assert message.reasoning_content == THOUGHT
    assert not message.content
    complete([*messages, message, {"role": "user", "content": "more"}])
    assert len(server.prompts) == 2


def test_what_other_providers_left_in_its_messages(complete, server):
    """A conversation that began elsewhere: Anthropic's thinking blocks, cache marks, an old function call."""
    complete(
        [
            {
                "role": "system",
                "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            },
            {"role": "user", "content": "Hi", "cache_control": {"type": "ephemeral"}},
            {
                "role": "assistant",
                "content": "Hello.",
                "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}],
                "provider_specific_fields": {"citations": None},
                "function_call": None,
                "tool_calls": None,
                "audio": None,
                "annotations": [],
                "images": [],
            },
            {"role": "user", "content": "more"},
        ]
    )
    assert "Be brief.<｜User｜>Hi<｜Assistant｜>Hello." in server.prompts[-1]


def test_usage_of_a_stream(complete):
    answer = complete(
        [{"role": "user", "content": "Hi"}], stream=True, stream_options={"include_usage": True}
    )
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


@pytest.mark.usefixtures("slow_server")
def test_signs_of_life_are_no_chunks(complete):
    message = complete([{"role": "user", "content": "Hi"}], stream=True).choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, ANSWER)


def test_its_fields_are_taken(complete, server):
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 100,
        "stop": ["###"],
        "seed": 1,
        "user": "u",
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "metadata": {"trace": "x"},
        "extra_body": {"top_k": 5, "chat_template_kwargs": {"thinking": True}},
    }
    assert complete([{"role": "user", "content": "Hi"}], **options).choices[0].message.content == ANSWER
    assert server.bodies[-1].keys() >= {"temperature", "top_p", "stop", "seed", "top_k"}


@pytest.mark.parametrize("effort", ["none", "low", "high"])
def test_reasoning_effort(complete, server, effort):
    answer = complete(
        [{"role": "user", "content": "Hi"}],
        reasoning_effort=effort,
        allowed_openai_params=["reasoning_effort"],
    )
    assert answer.choices[0].message.content == ANSWER
    assert server.prompts[-1].endswith("</think>\n\n") == (effort == "none")


def test_what_is_not_built_is_refused_once_and_by_name(complete, server, litellm):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(litellm.BadRequestError, match="this value of tools is not supported yet"):
        complete([{"role": "user", "content": "Hi"}], tools=[tool])
    assert len(server.bodies) == 1
