"""Request bodies in the shape in which programs send them that are not installed here: taken, or refused by the
name of a field that is not built yet."""

import json

import httpx
import pytest
from scripted_server import ANSWER, THOUGHT

HI = [{"role": "user", "content": "Hi"}]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}

TAKEN = {
    # model_args=…,num_concurrent=…: local-chat-completions. Older ones mark each message with a type.
    "lm-eval": {
        "messages": HI,
        "model": "nano",
        "max_tokens": 256,
        "temperature": 0,
        "stop": ["Question:", "</s>", "<|im_end|>", "\n\n"],
        "seed": 1234,
    },
    "lm-eval, older": {
        "messages": [{"role": "user", "content": "Hi", "type": "text"}],
        "model": "nano",
        "max_tokens": 256,
        "temperature": 0.0,
        "stop": [],
        "seed": 1234,
        "top_p": 1,
    },
    "Open WebUI": {
        "stream": True,
        "model": "nano",
        "messages": [{"role": "system", "content": "User Context:\n\n"}, *HI],
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 512,
        "frequency_penalty": 0,
        "seed": 42,
        "stop": ["###"],
    },
    "Open WebUI, a title": {
        "model": "nano",
        "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title"}],
        "stream": False,
        "max_completion_tokens": 1000,
    },
    "Open WebUI, with the user's name": {
        "model": "nano",
        "messages": HI,
        "stream": False,
        "user": {"name": "joe", "id": "1", "email": "joe@example.org", "role": "admin"},
    },
    "Cline": {
        "model": "nano",
        "messages": [
            {"role": "system", "content": "You are Cline."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<task>\nfix it\n</task>"},
                    {"type": "text", "text": "<environment_details>\n</environment_details>"},
                ],
            },
            {"role": "assistant", "content": "<read_file>", "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "[read_file] Result:"}]},
        ],
        "temperature": 0,
        "max_tokens": None,
        "reasoning_effort": None,
        **USAGE,
    },
    "vllm bench serve, openai-chat": {
        "model": "nano",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_completion_tokens": 128,
        **USAGE,
        "ignore_eos": True,
        "temperature": 0.0,
        "top_p": None,
        "top_k": None,
        "min_p": None,
        "repetition_penalty": 1.0,
    },
    "genai-perf": {"model": "nano", "messages": HI, "stream": True, "max_tokens": 100, "ignore_eos": True},
}

NOT_BUILT = {
    "lm-eval, samples": ("n", {"messages": HI, "model": "nano", "max_tokens": 256, "n": 4}),
    "Open WebUI, a JSON answer": (
        "response_format",
        {"model": "nano", "messages": HI, "stream": False, "response_format": {"type": "json_object"}},
    ),
    "Open WebUI, penalties": (
        "frequency_penalty",
        {"model": "nano", "messages": HI, "frequency_penalty": 0.3},
    ),
    "Open WebUI, with tools": (
        "tools",
        {"model": "nano", "messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    "Cline, native tools": (
        "tools",
        {
            "model": "nano",
            "messages": HI,
            **USAGE,
            "tools": [{"type": "function", "function": {"name": "read_file", "strict": False}}],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
        },
    ),
    "Cline, a screenshot": (
        "messages[0].content",
        {
            "model": "nano",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look"},
                        {"type": "image_url", "image_url": {"url": "data:image/webp;base64,AAAA"}},
                    ],
                }
            ],
        },
    ),
    "vllm bench serve, sampling": ("min_p", {"model": "nano", "messages": HI, **USAGE, "min_p": 0.1}),
    "genai-perf, exact lengths": (
        "min_tokens",
        {"model": "nano", "messages": HI, "stream": True, "max_tokens": 100, "min_tokens": 100},
    ),
    "genai-perf, Dynamo's extension": (
        "nvext",
        {"model": "nano", "messages": HI, "nvext": {"ignore_eos": True}},
    ),
}


def said(stream):
    *events, done = stream.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


@pytest.mark.parametrize("name", TAKEN)
def test_taken(server, name):
    response = httpx.post(f"{server.url}/chat/completions", json=TAKEN[name])
    assert response.status_code == 200, response.text
    parts = said(response.text) if TAKEN[name].get("stream") else [response.json()["choices"][0]["message"]]
    assert "".join(part.get("reasoning_content", "") for part in parts) == THOUGHT
    assert "".join(part.get("content", "") for part in parts) == ANSWER


@pytest.mark.parametrize("name", NOT_BUILT)
def test_refused_by_name(server, name):
    param, body = NOT_BUILT[name]
    response = httpx.post(f"{server.url}/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert param in error["message"]
