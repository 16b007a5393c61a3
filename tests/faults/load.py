"""Streams under which a service is hurt: what they said, token for token, and how long each paused."""

import json
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

SKULLS = "☠☠☠☠☠☠"
"""What a poison request says, where poison is armed (conftest.py)."""
PAUSE_S = 0.25
"""A pause shorter than this is no stall."""


def streams(count=16, max_tokens=150, seed=0):
    """`count` requests, greedy and seeded in turns, with prompts that fill several chunks."""
    requests = []
    for i in range(count):
        words = " ".join(f"word{(7 * i + 3 * j + seed) % 97}" for j in range(10 + 5 * i % 35))
        requests.append(
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"question {i} {seed} {words}"}],
                "max_tokens": max_tokens + 5 * (i % 8),
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i + seed}),
            }
        )
    return requests


@dataclass
class Stream:
    """One answer as it came: `arrivals` are the times (CLOCK_MONOTONIC) of its pieces of text."""

    began: float
    arrivals: list[float] = field(default_factory=list)
    thought: str = ""
    content: str = ""
    finish_reason: str | None = None
    tokens: list[int] | None = None
    error: str | None = None
    ended: float | None = None

    @property
    def answer(self):
        """All that must not depend on who died."""
        return self.tokens, self.thought, self.content, self.finish_reason, self.error

    def pauses(self, since):
        """The pauses that ended after `since`; of one that began before, the part after it."""
        times = [self.began, *self.arrivals]
        return [later - max(earlier, since) for earlier, later in pairwise(times) if later > since]

    def stalls(self, since):
        """Pauses long enough to be seen, and the longest in any case, in s."""
        pauses = self.pauses(since)
        longest = [max(pauses)] if pauses else []
        return [round(pause, 3) for pause in pauses if pause >= PAUSE_S] or [round(p, 3) for p in longest]


class Load:
    """Requests that run at the same time, one thread each."""

    def __init__(self, url, folder, requests):
        """`folder`: the service's R1_FAULTS, where it leaves the tokens of its answers."""
        self._tokens = folder / "tokens"
        self._changed = threading.Condition()
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(30, read=150), trust_env=False)
        self.streams = [Stream(time.monotonic()) for _ in requests]
        self._threads = [
            threading.Thread(target=self._run, args=pair, daemon=True) for pair in zip(self.streams, requests)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_started(self):
        """How many streams have got their first piece."""
        return sum(1 for stream in self.streams if stream.arrivals)

    @property
    def decoding(self):
        """Whether most streams are in the midst of their answers. All at once need not ever be: the edge may
        take up the last request when the first answers end."""
        return 4 * sum(1 for s in self.streams if len(s.arrivals) >= 2) >= 3 * len(self.streams)

    @property
    def mostly_open(self):
        """Whether at most a quarter of the streams has ended."""
        return 4 * self.num_ended <= len(self.streams)

    @property
    def num_ended(self):
        return sum(1 for stream in self.streams if stream.ended is not None)

    def wait(self, condition, timeout_s=60.0):
        """Waits until `condition()`; returns whether it came true before all streams ended."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                if self.num_ended == len(self.streams) or time.monotonic() > deadline:
                    return False
                self._changed.wait(0.02)  # a condition may be of time
        return True

    def quiet_for(self, seconds):
        """Whether no stream has got anything for so long."""
        return (
            time.monotonic() - max(s.arrivals[-1] if s.arrivals else s.began for s in self.streams) >= seconds
        )

    def join(self):
        """The streams, once all have ended."""
        for thread in self._threads:
            thread.join()
        self._http.close()
        return self.streams

    def _run(self, stream, request):
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=request) as response:
                if response.status_code != 200:
                    stream.error = f"{response.status_code} {response.read().decode()}"
                    return
                self._read(stream, response)
        except httpx.HTTPError as error:
            stream.error = f"{type(error).__name__}: {error}"
        finally:
            with self._changed:
                stream.ended = time.monotonic()
                self._changed.notify_all()

    def _read(self, stream, response):
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                stream.error = str(chunk["error"])
            elif chunk.get("usage") is not None:
                path = self._tokens / chunk["id"]
                stream.tokens = json.loads(path.read_text())
                path.unlink()
                assert len(stream.tokens) == chunk["usage"]["completion_tokens"]
            else:
                self._note(stream, chunk["choices"][0])

    def _note(self, stream, choice):
        delta = choice["delta"]
        stream.finish_reason = choice["finish_reason"] or stream.finish_reason
        thought, content = delta.get("reasoning_content") or "", delta.get("content") or ""
        if thought or content:
            with self._changed:
                stream.thought += thought
                stream.content += content
                stream.arrivals.append(time.monotonic())
                self._changed.notify_all()


def quantile(values, q):
    """The value below which a share `q` of `values` lies (the nearest one); None of none."""
    ordered = sorted(values)
    return ordered[min(round(q * (len(ordered) - 1)), len(ordered) - 1)] if ordered else None
