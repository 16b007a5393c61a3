"""Served as a user serves them: combinations of architecture, dtype and layout in which every two occur together. By
HTTP they answer with transformers' greedy tokens, whole and streamed, and, in some, while a worker is killed."""

import itertools
from contextlib import closing

import openai
import pytest
from combinations import ALL, LAYOUTS, Oracle, computed_in, write_checkpoint
from faults.arena import Arena

FLOATS, FP8, INTEGERS = "floats", "fp8", "integers"
KINDS = {"float32": FLOATS, "bfloat16": FLOATS, "fp8": FP8, "int8": INTEGERS, "int4": INTEGERS}

# architecture, dtype, layout, and who is killed in the midst of an answer, if anybody.
ROWS = [
    ("deepseek_v3", "float32", "one process", None),
    ("deepseek_v3", "float32", "expert shards", None),
    ("deepseek_v3", "float32", "two ranks", "stage-0-rank-0"),
    ("deepseek_v3", "bfloat16", "two stages", None),
    ("deepseek_v3", "bfloat16", "expert shards", "experts-2"),
    ("deepseek_v3", "fp8", "expert shards", "experts-1"),
    ("deepseek_v3", "int8", "expert shards", "router-0"),
    ("deepseek_v3", "int4", "expert shards", None),
    ("deepseek_v3", "float32", "data ranks", "dp-0"),
    ("deepseek_v3", "bfloat16", "data ranks", None),
    ("deepseek_v3", "fp8", "data ranks", "dp-1"),
    ("deepseek_v3", "int8", "data ranks", "dp-0"),
    ("deepseek_v3", "int4", "data ranks", None),
    ("llama", "float32", "two stages", "stage-1"),
    ("llama", "bfloat16", "one process", None),
    ("llama", "fp8", "two ranks", "stage-0-rank-1"),
    ("llama", "int8", "one process", None),
    ("llama", "int4", "two ranks", None),
    ("qwen2", "float32", "one process", None),
    ("qwen2", "bfloat16", "two ranks", None),
    ("qwen2", "fp8", "one process", "stage-0"),
    ("qwen2", "int8", "two stages", None),
    ("qwen2", "int4", "one process", "stage-0"),
    ("qwen3", "float32", "two ranks", None),
    ("qwen3", "bfloat16", "one process", "stage-0"),
    ("qwen3", "fp8", "two stages", "stage-0"),
    ("qwen3", "int8", "two ranks", "stage-0-rank-1"),
    ("qwen3", "int4", "two stages", "stage-1"),
]


def pairs(row):
    return set(itertools.combinations(row, 2))


def test_every_two_that_can_occur_together_do():
    assert {row[:3] for row in ROWS} <= set(ALL)
    missing = set().union(*map(pairs, ALL)) - set().union(*(pairs(row[:3]) for row in ROWS))
    assert not missing
    killed = {(KINDS[dtype], layout) for _, dtype, layout, part in ROWS if part is not None}
    assert killed == set(itertools.product(KINDS.values(), LAYOUTS))


def answers_to(oracle, tokenizer, dtype):
    """[(question, the oracle's Answer)], three of them, without control tokens in the answers, which are no text; the
    prompts are what transformers makes of the template."""
    chosen, control = [], frozenset(tokenizer.get_added_vocab().values())
    for first in range(3):
        asked = {}

        def prompts(first=first, asked=asked):
            for number in itertools.count(first, 3):
                question = f"What is {37 * number} times {91 + number}, and why?"
                messages = [{"role": "user", "content": question}]
                prompt = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False
                )
                asked[tuple(prompt)] = question
                yield prompt

        answer = oracle.answer(prompts(), dtype, barred=control)
        chosen.append((asked[tuple(answer.prompt)], answer))
    return chosen


def request_of(question, answer):
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": len(answer.tokens),
        "temperature": 0,
    }


def whole_answers_are_those(url, tokenizer, chosen):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        for question, answer in chosen:
            got = client.chat.completions.create(
                **request_of(question, answer), extra_body={"ignore_eos": True}
            )
            (choice,) = got.choices
            text = (choice.message.reasoning_content or "") + (choice.message.content or "")
            assert text.strip() == tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
            assert choice.finish_reason == "length"
            assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (
                len(answer.prompt),
                len(answer.tokens),
            )


def streams_of(chosen):
    """24 requests, and the tokens of each."""
    stream = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return [request_of(*pair) | stream for pair in chosen] * 8, [answer.tokens for _, answer in chosen] * 8


def streams_are_those(load, tokens):
    streams = load.join()
    assert [stream.error for stream in streams if stream.error is not None] == []
    assert [stream.tokens for stream in streams] == tokens
    assert {stream.finish_reason for stream in streams} == {"length"}
    return streams


def kill_in_the_midst_of_an_answer(arena, part, requests, tokens):
    """Kills the part under load, again where nobody happened to be in the midst of an answer."""
    before = arena.observer.holdings()
    for _ in range(4):
        targets = arena.targets()
        load = arena.load(requests)
        assert load.wait(lambda load=load: any(len(s.arrivals) >= 2 and not s.ended for s in load.streams))
        at = arena.inflict(targets, part, "kill")
        streams = streams_are_those(load, tokens)
        arena.observer.wait_equal(before)
        assert arena.noticed(at, part) is not None
        if any(stream.arrivals and stream.arrivals[0] < at < stream.arrivals[-1] for stream in streams):
            return
    raise AssertionError("nobody was in the midst of an answer")


@pytest.mark.models
@pytest.mark.cluster
@pytest.mark.parametrize(("architecture", "dtype", "layout", "part"), ROWS)
def test_the_answers_are_transformers(tmp_path, architecture, dtype, layout, part):
    from transformers import AutoTokenizer

    checkpoint = write_checkpoint(tmp_path / "checkpoint", architecture, dtype)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    oracle = Oracle(checkpoint, tmp_path / "oracle")
    chosen = answers_to(oracle, tokenizer, computed_in(dtype))
    requests, tokens = streams_of(chosen)
    # Two at a time, so that somebody is always in the midst of an answer.
    engine = {"dtype": computed_in(dtype), "max_num_seqs": 2}
    with closing(Arena(tmp_path, checkpoint, LAYOUTS[layout], **engine)) as arena:
        whole_answers_are_those(arena.service.url, tokenizer, chosen)
        streams_are_those(arena.load(requests), tokens)
        if part is not None:
            kill_in_the_midst_of_an_answer(arena, part, requests, tokens)
