"""LangChain: ChatOpenAI and ChatDeepSeek."""

import functools
import operator

import openai
import pytest
from scripted_server import ANSWER, THOUGHT

TURN = [("system", "Be brief."), ("user", "Hi")]


@pytest.fixture(params=["ChatOpenAI", "ChatDeepSeek"])
def model(request, server):
    """A function that makes the model, so that its options can differ."""
    common = {"model": "nano", "api_key": "none", "max_retries": 0, "timeout": 30}
    if request.param == "ChatOpenAI":
        from langchain_openai import ChatOpenAI

        return functools.partial(ChatOpenAI, base_url=server.url, **common)
    from langchain_deepseek import ChatDeepSeek

    return functools.partial(ChatDeepSeek, api_base=server.url, **common)


def check(message, name):
    assert message.content == ANSWER
    if name == "ChatDeepSeek":  # ChatOpenAI leaves out what is not OpenAI's
        assert message.additional_kwargs["reasoning_content"] == THOUGHT


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_its_own_message_comes_back(model, server, streamed):
    llm = model()
    messages = [*TURN]
    for turn in range(3):
        if streamed:
            answer = functools.reduce(operator.add, llm.stream(messages))
        else:
            answer = llm.invoke(messages)
        check(answer, model.func.__name__)
        assert server.prompts[-1].count(ANSWER) == turn
        messages += [answer, ("user", "more")]
    assert server.prompts[-1].startswith("Be brief.") or "Be brief.<｜User｜>Hi" in server.prompts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_was_thought_alone_comes_back(model, server, streamed):
    server.answer = None
    llm = model()
    answer = functools.reduce(operator.add, llm.stream(TURN)) if streamed else llm.invoke(TURN)
    assert answer.content == ""
    llm.invoke([*TURN, answer, ("user", "more")])
    assert len(server.prompts) == 2


def test_messages_with_names_parts_and_calls(model, server):
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

    call = {"name": "f", "args": {"x": 1}, "id": "1", "type": "tool_call"}
    model().invoke(
        [
            SystemMessage([{"type": "text", "text": "Be brief."}]),
            HumanMessage(["Hi", {"type": "text", "text": "there"}], name="joe"),
            AIMessage("", tool_calls=[call]),
            ToolMessage("5", tool_call_id="1", name="f"),
            AIMessage([{"type": "text", "text": "Five."}], additional_kwargs={"reasoning_content": "hm"}),
            HumanMessage("more"),
        ]
    )
    assert "Hi\nthere" in server.prompts[-1]
    assert '{"x": 1}' in server.prompts[-1]
    assert "Five." in server.prompts[-1]
    assert "hm" not in server.prompts[-1]


def test_its_options_are_taken(model, server):
    llm = model(temperature=0.5, top_p=0.9, max_tokens=100, seed=1, n=1, stop=["###"], stream_usage=True)
    (answer,) = llm.batch([TURN])
    check(answer, model.func.__name__)
    assert server.bodies[-1].keys() >= {"temperature", "top_p", "seed", "stop"}
    chunks = list(llm.stream(TURN))
    assert any(chunk.usage_metadata for chunk in chunks)


@pytest.mark.usefixtures("slow_server")
def test_signs_of_life_are_no_chunks(model):
    check(functools.reduce(operator.add, model().stream(TURN)), model.func.__name__)


def test_structured_output_is_refused_by_name(model):
    schema = {
        "title": "Answer",
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
    }
    with pytest.raises(openai.BadRequestError, match="is not supported yet") as caught:
        model().with_structured_output(schema).invoke(TURN)
    assert caught.value.param in ("response_format", "tools", "tool_choice")
