"""The real clients against the whole service: two turns each, the second with what the first gave back."""

import openai
import pytest
from litellm_client import litellm_client

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning"),  # LiteLLM's
]

HI, MORE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "more"}
OPTIONS = {"temperature": 0.5, "seed": 1, "max_tokens": 16}


@pytest.fixture
def expected(service):
    """The thought, as it came by OpenAI's client; this model's never ends."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(model="tiny", messages=[HI], **OPTIONS)
        message = answer.choices[0].message
        assert message.content == ""
        client.chat.completions.create(model="tiny", messages=[HI, message, MORE], **OPTIONS)
    return message.reasoning_content


@pytest.mark.parametrize("route", ["openai", "hosted_vllm", "deepseek"])
def test_litellm(service, expected, route):
    common = {"model": f"{route}/tiny", "api_base": f"{service.url}/v1", "api_key": "none", "max_retries": 0}
    with litellm_client() as litellm:
        message = litellm.completion(messages=[HI], **common, **OPTIONS).choices[0].message
        assert message.reasoning_content == expected
        chunks = list(litellm.completion(messages=[HI, message, MORE], stream=True, **common, **OPTIONS))
        assert litellm.stream_chunk_builder(chunks).choices[0].message.reasoning_content


def test_langchain_openai(service):
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(model="tiny", base_url=f"{service.url}/v1", api_key="none", max_retries=0, **OPTIONS)
    answer = llm.invoke([HI])
    assert answer.response_metadata["finish_reason"] == "length"
    assert list(llm.stream([HI, answer, MORE]))


def test_langchain_deepseek(service, expected):
    from langchain_deepseek import ChatDeepSeek

    llm = ChatDeepSeek(model="tiny", api_base=f"{service.url}/v1", api_key="none", max_retries=0, **OPTIONS)
    answer = llm.invoke([HI])
    assert answer.additional_kwargs["reasoning_content"] == expected
    assert list(llm.stream([HI, answer, MORE]))


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", 1e-40, None),
        ("top_p", 1e-40, None),
        ("top_k", 2**31 - 1, None),
        ("seed", -(2**63), None),
        ("max_tokens", 3.0, None),
        ("stop_token_ids", [2**31 - 1], "stop_token_ids[0]"),
        ("top_k", 2**31, "top_k"),
    ],
    ids=str,
)
def test_numbers_at_their_limits(service, field, value, param):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        ask = {"model": "tiny", "messages": [HI], "max_tokens": 3, "extra_body": {field: value}}
        if param is None:
            assert client.chat.completions.create(**ask).usage.completion_tokens == 3
        else:
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**ask)
            assert caught.value.param == param
