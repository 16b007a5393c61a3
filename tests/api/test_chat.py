import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from r1_cluster.api.chat import ChatStream
from r1_cluster.api.errors import ApiError, unavailable
from r1_cluster.api.protocol import parse_chat_request
from r1_cluster.api.streaming import ChunkFrames
from r1_cluster.records import TokenDelta
from r1_cluster.text.reasoning import Thought
from r1_cluster.text.tokenizer import Piece, Tokenizer


def request(**fields):
    fields = {"model": "nano", "messages": [{"role": "user", "content": "x"}], **fields}
    return parse_chat_request(json.dumps(fields).encode())


def stream_of(tokenizer, *, thought=None, prompt_tokens=1, **fields):
    """The stream of an answer whose prompt left the thought open, unless the request closed it."""
    asked = request(**fields)
    thought = thought or (Thought.OPEN if asked.thinking else Thought.CLOSED)
    return ChatStream(asked, tokenizer, thought=thought, prompt_tokens=prompt_tokens, request_id="r")


def deltas(tokenizer, text, size=1, end="stop"):
    """The engine's deltas for an answer; one that ends by itself ends in EOS."""
    ids = tokenizer.encode_pieces([Piece(text, True)]) + ([1] if end == "stop" else [])
    for start in range(0, len(ids), size):
        last = start + size >= len(ids)
        yield TokenDelta("r", start, ids[start : start + size], end if last else None, num_cached_prompt=3)


def answer(tokenizer, text, size=1, end="stop", thought=None, **fields):
    stream = stream_of(tokenizer, thought=thought, prompt_tokens=10, **fields)
    frames = []
    for delta in deltas(tokenizer, text, size, end):
        frames += stream.feed(delta)
        if stream.finished:
            break
    return stream, frames


def events(frames):
    """The payloads of a stream; checks its form."""
    data = b"".join(frames).decode()
    assert data.endswith("data: [DONE]\n\n")
    lines = data.split("\n\n")[:-2]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def joined(chunks):
    """Thought, content, finish reason of a stream; checks the order of its chunks."""
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    kinds = [key for choice in choices[1:] for key in ("reasoning", "content") if key in choice["delta"]]
    assert kinds == sorted(kinds, reverse=True)
    assert all(choice["delta"] and all(choice["delta"].values()) for choice in choices[1:-1])
    thought = "".join(choice["delta"].get("reasoning", "") for choice in choices)
    assert thought == "".join(choice["delta"].get("reasoning_content", "") for choice in choices)
    return (
        thought,
        "".join(choice["delta"].get("content", "") for choice in choices),
        choices[-1]["finish_reason"],
    )


def said(stream):
    message = stream.whole()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"]
    return message["reasoning"], message["content"], stream.whole()["choices"][0]["finish_reason"]


ANSWERS = {
    "both": ("Let me see.\n</think>\n\nIt is 世界 🙂.", ("Let me see.", "It is 世界 🙂.")),
    "no tag": ("Let me", ("Let me", "")),
    "no thought": ("</think>Yes", ("", "Yes")),
    "nothing": ("", ("", "")),
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("end", ["stop", "length"])
@pytest.mark.parametrize("name", ["both", "no tag", "no thought"])
def test_streamed_and_whole_say_the_same(tokenizer, name, end, size):
    text, (thought, content) = ANSWERS[name]
    assert said(answer(tokenizer, text, size, end)[0]) == (thought, content, end)
    assert joined(events(answer(tokenizer, text, size, end, stream=True)[1])) == (thought, content, end)


def test_an_answer_that_is_empty(tokenizer):
    assert said(answer(tokenizer, "")[0]) == ("", "", "stop")
    assert joined(events(answer(tokenizer, "", stream=True)[1])) == ("", "", "stop")


def test_responses_are_openais(tokenizer):
    whole = answer(tokenizer, ANSWERS["both"][0])[0].whole()
    completion = ChatCompletion.model_validate(whole, strict=True)
    assert completion.id == "chatcmpl-r"
    assert abs(completion.created - time.time()) < 60
    chunks = events(
        answer(tokenizer, ANSWERS["both"][0], stream=True, stream_options={"include_usage": True})[1]
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert (chunk["id"], chunk["model"]) == ("chatcmpl-r", "nano")


def test_usage_counts_prompt_cache_answer_and_thought(tokenizer):
    stream, _ = answer(tokenizer, "aaa</think>bb")
    assert stream.whole()["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": len(stream.tokens),
        "total_tokens": 10 + len(stream.tokens),
        "completion_tokens_details": {"reasoning_tokens": stream.tokens.index(tokenizer.think_end_id)},
        "prompt_tokens_details": {"cached_tokens": 3},
        "prompt_cache_hit_tokens": 3,
        "prompt_cache_miss_tokens": 7,
    }
    assert stream.tokens[-1] == 1  # EOS counts, but has no text


def test_usage_chunk_comes_last_where_it_was_asked_for(tokenizer):
    chunks = events(answer(tokenizer, "a", stream=True, stream_options={"include_usage": True})[1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert not any("usage" in chunk for chunk in events(answer(tokenizer, "a", stream=True)[1]))


def test_first_token_is_flushed_at_once(tokenizer):
    stream = stream_of(tokenizer, stream=True)
    frames = stream.feed(TokenDelta("r", 0, tokenizer.encode("a")))
    assert b'"role":"assistant"' in frames[0]
    assert b'"reasoning":"a"' in frames[1]


def test_no_half_character_is_streamed(tokenizer):
    _, frames = answer(tokenizer, "日本語🙂</think>中文🙂", stream=True)
    assert b"\\ufffd" not in b"".join(frames)
    assert "\ufffd" not in b"".join(frames).decode()


def test_without_thinking_all_is_content(tokenizer):
    stream, _ = answer(tokenizer, "Yes", chat_template_kwargs={"thinking": False})
    assert said(stream) == ("", "Yes", "stop")
    assert stream.usage()["completion_tokens_details"] == {"reasoning_tokens": 0}


IN_CONTENT = [
    ("ab</think>cd END ef", ["END"], ("ab", "cd ", "stop")),
    ("abE</think>NDcd", ["END"], ("abE", "NDcd", "length")),
    ("ab</think>cdEN", ["END"], ("ab", "cdEN", "length")),
    ("abEN", ["END"], ("abEN", "", "length")),
    ("a\n\n</think>\n\nb", ["\n\n"], ("a", "b", "length")),
    ("a</think>bcd", ["cd", "bcd"], ("a", "", "stop")),
]
ASLEEP = [
    ("ab END</think>cd", ["END"], ("ab END", "cd", "length")),
    ("ab END</think>cd END", ["END"], ("ab END", "cd ", "stop")),
    ("a\n\nc</think>b", ["\n\n"], ("a\n\nc", "b", "length")),
    ("a\n\n", ["\n\n"], ("a\n\n", "", "length")),
    ("a </think> b</think>c", ["</think>"], ("a", "b", "stop")),
]
AWAKE = [
    ("ab END</think>cd", ["END"], ("ab ", "", "stop")),
    ("a\n\nc</think>b", ["\n\n"], ("a", "", "stop")),
    ("a\n\n", ["\n\n"], ("a", "", "stop")),
]


@pytest.fixture(params=["with a token for the tag", "without"])
def either_tokenizer(request, tokenizer, checkpoint):
    if request.param == "without":
        definition = json.loads((checkpoint / "tokenizer.json").read_text())
        definition["added_tokens"] = [t for t in definition["added_tokens"] if "think" not in t["content"]]
        return Tokenizer(definition, bos_token=None, eos_token=None, eos_ids=frozenset({1}))
    return tokenizer


def stops_at(tokenizer, text, size, expected, **fields):
    assert said(answer(tokenizer, text, size, "length", **fields)[0]) == expected
    assert joined(events(answer(tokenizer, text, size, "length", stream=True, **fields)[1])) == expected


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(("text", "stop", "expected"), IN_CONTENT + ASLEEP)
def test_stop_strings_sleep_until_the_end_of_the_thought(either_tokenizer, text, stop, expected, size):
    stops_at(either_tokenizer, text, size, expected, stop=stop)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(("text", "stop", "expected"), IN_CONTENT + AWAKE)
def test_stop_strings_can_be_awake_in_the_thought(either_tokenizer, text, stop, expected, size):
    stops_at(either_tokenizer, text, size, expected, stop=stop, stop_in_thought=True)


small_text = st.text("ab\n", max_size=12)


@given(
    small_text, small_text, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.integers(1, 5)
)
@settings(max_examples=200)
def test_asleep_stops_cut_the_answer_alone(tokenizer, thought, content, stops, size):
    text = f"{thought}</think>{content}"
    whole_thought, whole, _ = said(answer(tokenizer, text, size, "length")[0])
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    first = min(ends, default=len(whole))
    longest = max((len(stop) for stop in stops if whole[:first].endswith(stop)), default=0)
    expected = whole_thought, whole[: first - longest], "stop" if ends else "length"
    assert said(answer(tokenizer, text, size, "length", stop=stops)[0]) == expected


@pytest.mark.parametrize(
    "switched_off",
    [
        {"chat_template_kwargs": {"thinking": False}},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 1000])
def test_without_a_thought_stop_strings_are_awake_at_once(tokenizer, size, switched_off):
    stops_at(tokenizer, "ab END", size, ("", "ab ", "stop"), stop=["END"], **switched_off)


OWN_THOUGHT = [
    ("<think>\nab END\n</think>\n\ncd END", ["END"], ("ab END", "cd ", "stop")),
    ("\n<think>ab END", ["END"], ("ab END", "", "length")),
    ("ab END cd", ["END"], ("", "ab ", "stop")),
    ("\n\nab END cd", ["\n\n", "END"], ("", "ab ", "stop")),
    ("END", ["END"], ("", "", "stop")),
    ("</think>ab END", ["END"], ("", "ab ", "stop")),
    ("ab <think> cd", ["<think>"], ("", "ab ", "stop")),
    ("<think>ab", ["<think>", "<"], ("ab", "", "length")),
]


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(("text", "stop", "expected"), OWN_THOUGHT)
def test_stop_strings_sleep_only_through_a_thought_that_is_there(
    either_tokenizer, text, stop, expected, size
):
    stops_at(either_tokenizer, text, size, expected, stop=stop, thought=Thought.UNDECIDED)


def test_usage_of_a_model_that_decides_itself(tokenizer):
    def num_reasoning(text):
        stream, _ = answer(tokenizer, text, thought=Thought.UNDECIDED)
        assert stream.usage()["completion_tokens"] == len(stream.tokens)
        return stream.usage()["completion_tokens_details"]["reasoning_tokens"]

    assert num_reasoning("aaa bb") == 0
    thought = len(tokenizer.encode("aaa\n"))
    assert num_reasoning("\n<think>aaa\n</think>\n\nbb") == thought
    assert num_reasoning("<think>aaa\n") == thought


def test_tokens_behind_a_stop_string_are_not_counted(tokenizer):
    stream, _ = answer(tokenizer, "a b c d e f", 1000, "length", stop="c", stop_in_thought=True)
    assert tokenizer.decode(stream.tokens) == "a b c"
    assert stream.finished
    assert stream.feed(TokenDelta("r", 99, [5])) == []


def test_a_stop_token_is_counted_but_not_shown(tokenizer):
    token = tokenizer.encode("b")[0]
    stream = stream_of(tokenizer, stop_token_ids=[token])
    stream.feed(TokenDelta("r", 0, [*tokenizer.encode("a"), token], "stop"))
    assert said(stream) == ("a", "", "stop")
    assert len(stream.tokens) == 2


def test_an_ignored_eos_is_not_shown(tokenizer):
    stream = stream_of(tokenizer, ignore_eos=True)
    stream.feed(TokenDelta("r", 0, [*tokenizer.encode("a"), 1, *tokenizer.encode("b"), 1], "length"))
    assert said(stream) == ("ab", "", "length")
    assert len(stream.tokens) == 4


@given(st.integers(1, 4), st.lists(st.integers(0, 12), max_size=6))
@settings(max_examples=50)
def test_deltas_told_twice_change_nothing(tokenizer, size, rewinds):
    text = "Let me see</think>It is 世界"
    expected = b"".join(answer(tokenizer, text, 1, stream=True)[1])
    once = list(deltas(tokenizer, text, size))
    everything = [token for delta in once for token in delta.tokens]
    stream = stream_of(tokenizer, prompt_tokens=10, stream=True)
    frames = []
    for delta, back in zip(once, rewinds + [0] * len(once), strict=False):
        start = max(0, delta.position - back)
        tokens = everything[start : delta.position + len(delta.tokens)]
        frames += stream.feed(TokenDelta("r", start, tokens, delta.finish_reason))
    assert stream.tokens == everything
    assert joined(events(frames)) == joined(events([expected]))


def test_missing_tokens_are_an_error(tokenizer):
    stream = stream_of(tokenizer)
    with pytest.raises(ValueError, match="token 1 came when 0 was next"):
        stream.feed(TokenDelta("r", 1, [5]))


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_an_answer_that_could_not_be_finished_is_an_error(tokenizer, reason):
    failed = TokenDelta("r", 0, [], reason, "RuntimeError: boom")
    stream = stream_of(tokenizer)
    assert stream.feed(failed) == []
    assert stream.finished
    with pytest.raises(ApiError, match="could not be finished"):
        stream.whole()
    stream = stream_of(tokenizer, stream=True)
    stream.feed(TokenDelta("r", 0, tokenizer.encode("a")))
    (payload,) = events(stream.feed(failed))
    assert payload["error"]["code"] == "service_unavailable"
    assert "boom" not in json.dumps(payload)


def test_fail_ends_a_stream_once(tokenizer):
    stream = stream_of(tokenizer, stream=True)
    assert events(stream.fail(unavailable("no")))[0]["error"]["message"] == "no"
    assert stream.fail(unavailable("no")) == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_a_frame(text):
    frames = ChunkFrames("i", 1, 'm"\n', include_usage=False)
    for frame, names in (
        (frames.content(text), ["content"]),
        (frames.reasoning(text), ["reasoning_content", "reasoning"]),
    ):
        (chunk,) = events([frame, b"data: [DONE]\n\n"])
        assert chunk["model"] == 'm"\n'
        assert chunk["choices"][0]["delta"] == dict.fromkeys(names, text)


@pytest.mark.serial
def test_a_token_costs_microseconds(tokenizer):
    ids = tokenizer.encode("and then the answer is " * 400)

    def microseconds_per_token():
        stream = stream_of(tokenizer, stream=True)
        batch = [TokenDelta("r", i, [token]) for i, token in enumerate(ids)]
        start = time.thread_time()
        for delta in batch:
            stream.feed(delta)
        return (time.thread_time() - start) / len(ids) * 1e6

    assert min(microseconds_per_token() for _ in range(5)) < 15  # 3 on an idle core


def test_text_and_api_load_neither_torch_nor_ray():
    modules = [
        "text.tokenizer",
        "text.template",
        "text.reasoning",
        "text.detokenize",
        "api.chat",
        "api.protocol",
    ]
    script = f"import sys, {', '.join('r1_cluster.' + name for name in modules)}\n"
    script += "sys.exit(', '.join({'torch', 'transformers', 'ray', 'fastapi'} & sys.modules.keys()) or None)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
