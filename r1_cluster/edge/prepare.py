"""A chat request's bytes → what the engine and the answer's stream need: parse, template, tokenize.

All of it holds the GIL or may take long, so that only tiny bodies are prepared where streams run.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

from r1_cluster.api.errors import context_length_exceeded, invalid_request, model_not_found
from r1_cluster.api.protocol import ChatCompletionRequest, parse_chat_request
from r1_cluster.api.sampling import check_stop_tokens, sampling_of
from r1_cluster.config import Sampling
from r1_cluster.records import Request
from r1_cluster.text.reasoning import Thought
from r1_cluster.text.template import ChatTemplate, PromptTooLong, TemplateError
from r1_cluster.text.tokenizer import Tokenizer

MAX_STOP_CHARACTERS = 4096
"""Of all stop strings of a request together. Their tables are built where streams run."""


class PrepareOptions(NamedTuple):
    """What of a service its requests depend on; `max_model_len` in tokens, `vocab_size` the model's."""

    model_path: str
    served_name: str
    defaults: Sampling
    max_model_len: int
    vocab_size: int


class Prepared(NamedTuple):
    """A request as it was sent, without messages; as the engine knows it, but for its id and sink; and how
    the prompt left the thought."""

    chat: ChatCompletionRequest
    record: Request
    thought: Thought


class Preparer:
    """Prepares the requests of one service."""

    def __init__(self, options: PrepareOptions) -> None:
        """Reads tokenizer and template; raises TokenizerError, TemplateError."""
        self._options = options
        self.tokenizer = Tokenizer.from_folder(options.model_path)
        self._template = ChatTemplate.from_folder(options.model_path, self.tokenizer)

    def prepare(self, body: bytes) -> Prepared:
        """Raises ApiError (400, 404)."""
        chat = parse_chat_request(body)
        if chat.model != self._options.served_name:
            raise model_not_found(chat.model)
        if sum(map(len, chat.stop)) > MAX_STOP_CHARACTERS:
            raise invalid_request(
                "stop", f"stop: all strings together may have {MAX_STOP_CHARACTERS} characters at most"
            )
        thought = self._template.thought(thinking=chat.thinking)
        check_stop_tokens(chat, self._options.vocab_size, tags_seen=self._sees_tags(thought))
        record = self._record(chat, self._prompt(chat), thought)
        return Prepared(chat.model_copy(update={"messages": []}), record, thought)

    def _sees_tags(self, thought: Thought) -> bool:
        """Whether the engine, which reads tokens, can tell where the thought begins and ends."""
        start_is_seen = thought is not Thought.UNDECIDED or self.tokenizer.think_start_id is not None
        return start_is_seen and self.tokenizer.think_end_id is not None

    def _prompt(self, chat: ChatCompletionRequest) -> list[int]:
        limit, wanted = self._options.max_model_len, chat.max_output_tokens
        most = limit - (wanted or 1)
        try:
            prompt = self._template.prompt_ids(chat.messages, thinking=chat.thinking, limit=most)
        except TemplateError as error:
            raise invalid_request("messages", str(error)) from None
        except PromptTooLong as error:
            raise context_length_exceeded(limit, error.at_least, wanted, at_least=True) from None
        if len(prompt) > most:
            raise context_length_exceeded(limit, len(prompt), wanted)
        return prompt

    def _record(self, chat: ChatCompletionRequest, prompt: list[int], thought: Thought) -> Request:
        defaults, wanted = self._options.defaults, chat.max_output_tokens
        room = self._options.max_model_len - len(prompt)
        return Request(
            request_id="",
            prompt=prompt,
            sampling=sampling_of(chat, defaults, drawn_seed=secrets.randbits(63)),
            max_tokens=min(room, defaults.max_tokens) if wanted is None else wanted,
            stop_token_ids=chat.stop_token_ids,
            sink="",
            ignore_eos=chat.ignore_eos,
            sleeping_until=self.tokenizer.think_end_id if chat.stops_sleep else None,
            sleeping_from=(
                self.tokenizer.think_start_id if chat.stops_sleep and thought is Thought.UNDECIDED else None
            ),
        )
