#!/usr/bin/env python3
"""Loads an OpenAI endpoint and measures what its clients feel.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --model nano-r1
    python benchmarks/serve.py --url http://127.0.0.1:8103 --model m --api completions --vocab 4096

Every request has the same prompt and output length (temperature 0, EOS ignored), is streamed, and differs in
its prompt's first tokens, so that no prefix cache answers for the model. Levels of concurrency are run one
after the other, `--rounds` times in turn, so that a noisy minute does not fall on one level alone.

TTFT: from sending a request to its first chunk. Inter-token latency: between two chunks that bring text.
ms/token: a request's time after the first chunk by its further tokens, which also holds where a server puts
several tokens into a chunk, or none. Tokens are counted by the server's `usage`, by chunks where it has none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import string
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec

WARM_UP_TOKENS = 8
FIRST_ORDINARY_ID = 3  # BOS, EOS and padding come before
CONTROL_TOKENS_AT_END = 32


class BenchmarkError(Exception):
    """The endpoint cannot be measured; the text says why."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta or _Delta()
        return bool(self.text or delta.content or delta.reasoning_content or delta.reasoning)


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
Prompt = str | list[int]


@dataclass(frozen=True)
class Load:
    """What each request asks for. `prompt` of a chat is text, of a completion token ids."""

    url: str
    model: str
    api: str
    num_prompt_tokens: int
    num_output_tokens: int
    vocab: int
    timeout_s: float


@dataclass
class Sample:
    """One request's times, in s from the moment it was sent."""

    ttft: float = math.nan
    total: float = math.nan
    gaps: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_chunks: int = 0
    last_text: float = math.nan
    error: str | None = None

    @property
    def per_token(self) -> float:
        return (self.total - self.ttft) / max(self.num_output_tokens - 1, 1)

    def take(self, chunk: _Chunk, now: float) -> None:
        """Notes what one chunk brought."""
        if chunk.error is not None:
            self.error = bytes(chunk.error).decode()[:300]
        if chunk.usage is not None:
            self.num_prompt_tokens = chunk.usage.prompt_tokens
            self.num_output_tokens = chunk.usage.completion_tokens
        if chunk.choices and math.isnan(self.ttft):
            self.ttft = now
        if any(choice.has_text for choice in chunk.choices):
            if self.num_chunks:
                self.gaps.append(now - self.last_text)
            self.last_text = now
            self.num_chunks += 1


@dataclass
class Level:
    """All samples at one concurrency, and how long they took together."""

    concurrency: int
    samples: list[Sample] = field(default_factory=list)
    duration_s: float = 0.0

    def summary(self) -> dict[str, object]:
        good = [sample for sample in self.samples if sample.error is None]
        num_output_tokens = sum(sample.num_output_tokens for sample in good)
        return {
            "concurrency": self.concurrency,
            "requests": len(self.samples),
            "failed": len(self.samples) - len(good),
            "prompt_tokens": statistics.mean([sample.num_prompt_tokens for sample in good] or [0]),
            "output_tokens": statistics.mean([sample.num_output_tokens for sample in good] or [0]),
            "duration_s": self.duration_s,
            "output_tokens_per_s": num_output_tokens / self.duration_s,
            "ttft_ms": _median_and_p99([sample.ttft for sample in good]),
            "inter_token_ms": _median_and_p99([gap for sample in good for gap in sample.gaps]),
            "ms_per_token": _median_and_p99([sample.per_token for sample in good]),
        }


def _median_and_p99(seconds: Sequence[float]) -> dict[str, float | None]:
    """In ms; the 99th percentile is a value that was measured (nearest rank)."""
    if not seconds:
        return {"median": None, "p99": None}
    ordered = sorted(seconds)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return {"median": statistics.median(ordered) * 1e3, "p99": p99 * 1e3}


def random_ids(rng: random.Random, load: Load) -> list[int]:
    """A prompt of ordinary token ids."""
    last = max(load.vocab - CONTROL_TOKENS_AT_END, FIRST_ORDINARY_ID + 1)
    return [rng.randrange(FIRST_ORDINARY_ID, last) for _ in range(load.num_prompt_tokens)]


def words(rng: random.Random, num_words: int) -> str:
    """Text whose beginning no other prompt has."""
    return " ".join(["".join(rng.choices(string.ascii_lowercase, k=8)), *["the"] * num_words])


def payload(load: Load, prompt: Prompt, num_output_tokens: int) -> dict[str, object]:
    """The request's body."""
    body: dict[str, object] = {
        "model": load.model,
        "max_tokens": num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.api == "chat":
        return body | {"messages": [{"role": "user", "content": prompt}]}
    return body | {"prompt": prompt}


def events(buffer: bytes) -> tuple[list[bytes], bytes]:
    """The whole events' data in a buffer, and what is left of it."""
    *whole, rest = buffer.replace(b"\r\n", b"\n").split(b"\n\n")
    return [event[5:].strip() for event in whole if event.startswith(b"data:")], rest


async def ask(client: httpx.AsyncClient, load: Load, prompt: Prompt, num_output_tokens: int) -> Sample:
    """Sends one request and times its chunks; a failure is in the sample's `error`."""
    sample = Sample()
    path = "/v1/chat/completions" if load.api == "chat" else "/v1/completions"
    request = payload(load, prompt, num_output_tokens)
    done, rest = False, b""
    start = time.perf_counter()
    try:
        async with client.stream("POST", load.url + path, json=request) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", "replace")
                sample.error = f"status {response.status_code}: {text[:300]}"
                return sample
            async for data in response.aiter_raw():
                now = time.perf_counter() - start
                found, rest = events(rest + data)
                for event in found:
                    if event == b"[DONE]":
                        done = True
                    else:
                        sample.take(_decode_chunk(event), now)
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.total = time.perf_counter() - start
    sample.num_output_tokens = sample.num_output_tokens or sample.num_chunks
    if sample.error is None and (not done or math.isnan(sample.ttft)):
        sample.error = "the stream ended early"
    return sample


async def run_level(
    client: httpx.AsyncClient, load: Load, prompts: Iterator[Prompt], concurrency: int, num_requests: int
) -> tuple[list[Sample], float]:
    """`num_requests` requests, `concurrency` of them at a time; the samples and the time in s."""

    async def warm_up() -> None:
        sample = await ask(client, load, next(prompts), WARM_UP_TOKENS)
        if sample.error is not None:
            raise BenchmarkError(f"{load.url} does not answer: {sample.error}")

    async def work() -> None:
        for _ in turns:
            samples.append(await ask(client, load, next(prompts), load.num_output_tokens))

    await asyncio.gather(*(warm_up() for _ in range(concurrency)))
    samples: list[Sample] = []
    turns = iter(range(num_requests))  # shared by all workers
    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return samples, time.perf_counter() - start


async def count_words(client: httpx.AsyncClient, load: Load, rng: random.Random) -> int:
    """How many words make a chat prompt of the wished length, by the server's own count.

    Raises BenchmarkError if it does not count or if its template alone is longer.
    """

    async def cost(num_words: int) -> int:
        sample = await ask(client, load, words(rng, num_words), 1)
        if sample.error is not None:
            raise BenchmarkError(f"{load.url} does not answer: {sample.error}")
        if not sample.num_prompt_tokens:
            raise BenchmarkError(f"{load.url} does not count prompt tokens in usage")
        return sample.num_prompt_tokens

    few, many = await cost(1), await cost(33)
    num_words = 1 + round((load.num_prompt_tokens - few) / max((many - few) / 32, 0.1))
    if num_words < 0:
        raise BenchmarkError(
            f"a prompt of {load.num_prompt_tokens} tokens is too short: a few words make {few}"
        )
    return num_words


async def measure(
    load: Load, levels: Sequence[int], rounds: int, requests_per_slot: int, seed: int
) -> list[Level]:
    """Runs all levels `rounds` times in turn."""
    rng = random.Random(seed)
    limits = httpx.Limits(max_connections=max(levels), max_keepalive_connections=max(levels))
    async with httpx.AsyncClient(limits=limits, timeout=load.timeout_s, trust_env=False) as client:
        num_words = await count_words(client, load, rng) if load.api == "chat" else 0

        def prompts() -> Iterator[Prompt]:
            while True:
                yield words(rng, num_words) if load.api == "chat" else random_ids(rng, load)

        results = [Level(concurrency) for concurrency in levels]
        for _ in range(rounds):
            for level in results:
                num_requests = level.concurrency * requests_per_slot
                samples, duration_s = await run_level(
                    client, load, prompts(), level.concurrency, num_requests
                )
                level.samples += samples
                level.duration_s += duration_s
    return results


def table(summaries: Sequence[dict[str, object]]) -> str:
    """The figures as a Markdown table."""

    def figures(value: object) -> str:
        assert isinstance(value, dict)
        return " / ".join("–" if value[key] is None else f"{value[key]:.2f}" for key in ("median", "p99"))

    lines = [
        "| concurrency | requests (failed) | tokens in / out | TTFT ms, median / p99"
        " | inter-token ms, median / p99 | ms/token, median / p99 | output tokens/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in summaries:
        lines.append(
            f"| {row['concurrency']} | {row['requests']} ({row['failed']})"
            f" | {row['prompt_tokens']:.0f} / {row['output_tokens']:.0f} | {figures(row['ttft_ms'])}"
            f" | {figures(row['inter_token_ms'])} | {figures(row['ms_per_token'])}"
            f" | {row['output_tokens_per_s']:.1f} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--url", required=True, help="without /v1")
    parser.add_argument("--model", required=True, help="the name that is served")
    parser.add_argument("--api", choices=("chat", "completions"), default="chat")
    parser.add_argument(
        "--vocab", type=int, help="size of the vocabulary, for prompts of token ids (completions)"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--requests-per-slot", type=int, default=4, metavar="N", help="times the concurrency")
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument(
        "--timeout-s", type=float, default=300, metavar="S", help="for each wait on the server"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    if options.api == "completions" and options.vocab is None:
        parser.error("--api completions needs --vocab")
    counts = [*options.concurrency, options.prompt_tokens, options.output_tokens]
    if min(*counts, options.requests_per_slot, options.rounds) < 1:
        parser.error("counts must be 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    load = Load(
        options.url.rstrip("/"), options.model, options.api, options.prompt_tokens, options.output_tokens,
        options.vocab or 0, options.timeout_s,
    )  # fmt: skip
    try:
        levels = asyncio.run(
            measure(load, options.concurrency, options.rounds, options.requests_per_slot, options.seed)
        )
    except BenchmarkError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    summaries = [level.summary() for level in levels]
    print(table(summaries))
    if options.json is not None:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"settings": settings, "levels": summaries}, indent=2) + "\n")
    errors = [sample.error for level in levels for sample in level.samples if sample.error is not None]
    if errors:
        print(f"serve: {len(errors)} requests failed, the first with: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
