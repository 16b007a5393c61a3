"""A chat answer from the engine's tokens: streamed or whole, with thought, content and usage."""

from __future__ import annotations

import time

from r1_cluster.api.errors import ApiError, unavailable
from r1_cluster.api.protocol import ChatCompletionRequest
from r1_cluster.api.streaming import DONE, ChunkFrames, error_frame
from r1_cluster.records import TokenDelta
from r1_cluster.text.reasoning import ReasoningSplitter, StopChecker, Thought
from r1_cluster.text.tokenizer import Tokenizer


def usage(num_prompt: int, num_completion: int, *, num_reasoning: int, num_cached: int) -> dict[str, object]:
    """Token counts under OpenAI's names and DeepSeek's."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "completion_tokens_details": {"reasoning_tokens": num_reasoning},
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "prompt_cache_hit_tokens": num_cached,
        "prompt_cache_miss_tokens": num_prompt - num_cached,
    }


class ChatStream:
    """One answer: takes the engine's deltas, gives frames (if it is streamed) or the whole response.

    `tokens` is the log of all tokens taken, from which another engine can go on: deltas that tell again
    what is in it are taken as read. `finished` may come before the engine ends, by a stop string; the
    request must then be aborted.
    """

    def __init__(
        self,
        request: ChatCompletionRequest,
        tokenizer: Tokenizer,
        *,
        thought: Thought,
        prompt_tokens: int,
        request_id: str,
    ) -> None:
        """`thought`: how the prompt left it."""
        self.id = f"chatcmpl-{request_id}"
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: ApiError | None = None
        self._model = request.model
        self._created = int(time.time())
        self._streamed = bool(request.stream)
        self._include_usage = request.include_usage
        self._num_prompt, self._num_cached = prompt_tokens, 0
        self._hidden_ids = tokenizer.eos_ids.union(request.stop_token_ids)
        self._splitter = ReasoningSplitter(tokenizer, thought)
        self._stop = StopChecker(request.stop)
        self._stops_sleep = request.stops_sleep
        self._frames = ChunkFrames(self.id, self._created, self._model, include_usage=self._include_usage)
        self._role_sent = False
        self._in_content = False
        self._reasoning: list[str] = []
        self._content: list[str] = []

    @property
    def finished(self) -> bool:
        """Whether nothing more is to come."""
        return self.finish_reason is not None or self.error is not None

    def feed(self, delta: TokenDelta) -> list[bytes]:
        """The frames that these tokens give; none where the answer is not streamed.

        Raises ValueError if tokens are missing between this delta and those before it.
        """
        if self.finished:
            return []
        if delta.finish_reason in ("error", "abort"):
            return self.fail(unavailable("The answer could not be finished; please ask again."))
        num_known = len(self.tokens) - delta.position
        if num_known < 0:
            raise ValueError(f"{self.id}: token {delta.position} came when {len(self.tokens)} was next")
        self._num_cached = max(self._num_cached, delta.num_cached_prompt)
        reasoning, content = self._take(delta.tokens[num_known:], delta.finish_reason)
        if not self._streamed:
            self._reasoning.append(reasoning)
            self._content.append(content)
            return []
        return self._to_frames(reasoning, content)

    def fail(self, error: ApiError) -> list[bytes]:
        """Ends the answer by an error: the frames that say so. `whole` will raise it."""
        if self.finished:
            return []
        self.error = error
        return [error_frame(error), DONE] if self._streamed else []

    def whole(self) -> dict[str, object]:
        """The response, once `finished` and not streamed; raises the ApiError that ended the answer."""
        if self.error is not None:
            raise self.error
        reasoning = "".join(self._reasoning)
        message = {
            "role": "assistant",
            "content": "".join(self._content),
            "reasoning_content": reasoning,
            "reasoning": reasoning,
        }
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
            ],
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, object]:
        """Token counts so far."""
        return usage(
            self._num_prompt,
            len(self.tokens),
            num_reasoning=self._splitter.num_reasoning_tokens,
            num_cached=self._num_cached,
        )

    def _take(self, tokens: list[int], reason: str | None) -> tuple[str, str]:
        """New thought and content of `tokens`, up to a stop string. Token by token, so that those behind
        a stop string are not counted."""
        reasoning = content = ""
        for i, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if reason == "stop" and i == len(tokens) and token in self._hidden_ids:
                break
            thought, said = self._visible(*self._splitter.feed((token,)))
            reasoning, content = reasoning + thought, content + said
            if self._stop.found is not None:
                self.finish_reason = "stop"
                return reasoning, content
        if reason is not None:
            thought, said = self._visible(*self._splitter.finish())
            held = self._stop.flush()
            if self._in_content:
                said += held
            else:
                thought += held
            reasoning, content = reasoning + thought, content + said
            self.finish_reason = reason if self._stop.found is None else "stop"
        return reasoning, content

    def _visible(self, reasoning: str, content: str) -> tuple[str, str]:
        """Text that a stop string can no longer take away. None spans thought and content."""
        if reasoning and not self._stops_sleep:
            reasoning = self._stop.feed(reasoning)
            if self._stop.found is not None:
                return reasoning, ""
        if content:
            if not self._in_content:
                self._in_content = True
                reasoning += self._stop.flush()
            content = self._stop.feed(content)
        return reasoning, content

    def _to_frames(self, reasoning: str, content: str) -> list[bytes]:
        frames = []
        if not self._role_sent:
            self._role_sent = True
            frames.append(self._frames.role())
        if reasoning:
            frames.append(self._frames.reasoning(reasoning))
        if content:
            frames.append(self._frames.content(content))
        if self.finish_reason is not None:
            frames.append(self._frames.finish(self.finish_reason))
            if self._include_usage:
                frames.append(self._frames.usage(self.usage()))
            frames.append(DONE)
        return frames
