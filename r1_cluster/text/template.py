"""Chat messages → a prompt, by the checkpoint's own template, with no way for text to pose as control."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from r1_cluster.text.reasoning import Thought
from r1_cluster.text.tokenizer import THINK_END, THINK_START, Piece, Tokenizer, read_json

# What templates are asked before they are used.
_QUESTION = {"role": "user", "content": "?"}
_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
_OPEN_THOUGHT, _CLOSE_THOUGHT = f"{THINK_START}\n", f"\n{THINK_END}\n\n"

# Written from the behaviour of the template that DeepSeek publishes with R1 (tokenizer_config.json).
# Three things are mended: a second round of tool calls opens like the first, outputs start anew in
# each round, and a user who speaks straight after tool outputs finds them closed.
R1_CHAT_TEMPLATE = r"""
{%- set state = namespace(outputs=false) -%}
{{- bos_token -}}
{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') -}}
{%- for message in messages -%}
  {%- if message['role'] == 'tool' -%}
    {{- '\n' if state.outputs else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
    {%- set state.outputs = true -%}
  {%- elif message['role'] != 'system' -%}
    {%- set after_outputs = state.outputs -%}
    {%- if state.outputs -%}
      {{- '<｜tool▁outputs▁end｜>' -}}
      {%- set state.outputs = false -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
      {{- '<｜User｜>' + message['content'] -}}
    {%- else -%}
      {%- if message['tool_calls'] or not after_outputs -%}
        {{- '<｜Assistant｜>' -}}
      {%- endif -%}
      {%- if message['content'] -%}
        {{- message['content'].split('</think>')[-1] -}}
      {%- endif -%}
      {%- for call in message['tool_calls'] -%}
        {{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' -}}
        {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] -}}
        {{- '\n```json\n' + call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' -}}
        {{- '<｜tool▁calls▁end｜>' if loop.last -}}
      {%- endfor -%}
      {{- '<｜end▁of▁sentence｜>' -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if state.outputs -%}
  {{- '<｜tool▁outputs▁end｜>' -}}
{%- elif add_generation_prompt -%}
  {{- '<｜Assistant｜><think>\n' -}}
{%- endif -%}
"""

_RENDERING_FAILS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)


class TemplateError(Exception):
    """Messages that cannot be rendered, or a template that cannot be used; the text says why."""


class PromptTooLong(Exception):
    """A prompt of `at_least` so many tokens, which is more than there is room for."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"the prompt has {at_least} tokens or more")
        self.at_least = at_least


class _UserText(str):
    """Text of a message while a template runs: as a string it is a marker, to be replaced afterwards.

    Whatever a template asks of it (`in`, length, `strip`, `split`, …) is answered from the text itself,
    and strings that come out of that are markers again.
    """

    _raw: str
    _book: _MarkerBook

    def __str__(self) -> str:
        return self  # str(x) must not turn a marker into a plain string that filters then change


def _answered_from_text(name: str) -> Callable[..., object]:
    method: Callable[..., object] = getattr(str, name)

    def answer(self: _UserText, *arguments: object, **named: object) -> object:
        plain = [a._raw if isinstance(a, _UserText) else a for a in arguments]
        return self._book.wrap(method(self._raw, *plain, **named))

    return answer


# What puts text together (`+`, `%`, `join`, `format`) is none, and must keep markers as they are; `encode`
# would turn them into something that is no string.
_NO_QUESTIONS = {"join", "format", "format_map", "encode"}
_QUESTIONS = {name for name in dir(str) if not name.startswith("_")} - _NO_QUESTIONS
_QUESTIONS |= {
    f"__{name}__" for name in ("contains", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "hash", "len")
}
for _name in sorted(_QUESTIONS):
    setattr(_UserText, _name, _answered_from_text(_name))


class _MarkerBook:
    """The markers of one rendering, and what they stand for."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        marker = _UserText(f"\U000f0000{self._nonce}:{len(self._texts)}\U000f0001")
        marker._raw, marker._book = text, self
        self._texts.append(text)
        return marker

    def wrap(self, value: object) -> object:
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, list | tuple):
            return [self.wrap(item) for item in value]
        return value

    def split(self, rendered: str) -> list[Piece]:
        """The rendered text, cut at the markers."""
        parts = re.split(f"\U000f0000{self._nonce}:([0-9]+)\U000f0001", rendered)
        pieces = []
        for i, part in enumerate(parts):
            trusted = i % 2 == 0
            pieces.append(Piece(part if trusted else self._texts[int(part)], trusted))
        return pieces


class ChatTemplate:
    """A checkpoint's chat template, run in jinja2's sandbox."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Raises TemplateError where `source` is no template, or refuses even a plain question.

        What kind of template it is shows in what it renders: `opens_thought` tells whether it opens the
        thought itself, as all of the family's but R1-0528's do.
        """
        self._tokenizer = tokenizer
        # The two block settings are those that published templates are written for (transformers').
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the checkpoint's chat template is broken: {error}") from None
        # R1's templates want null for the content of a turn with calls alone; R1-0528's take text only.
        self._no_content: str | None = None
        self.opens_thought = self._run([_QUESTION], str).endswith((THINK_START, _OPEN_THOUGHT))
        try:
            self._run([_QUESTION, _CALL], str)
        except TemplateError:
            self._no_content = ""

    @classmethod
    def from_folder(cls, path: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
        """chat_template.jinja, or `chat_template` in tokenizer_config.json; else R1's own."""
        file, config = Path(path) / "chat_template.jinja", Path(path) / "tokenizer_config.json"
        if file.is_file():
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise TemplateError(f"{file} cannot be read: {error}") from None
            return cls(text, tokenizer)
        source = read_json(config).get("chat_template")
        if isinstance(source, list):  # several, by name
            named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
            source = named[0].get("template") if named else source
        if source is None:
            return cls(R1_CHAT_TEMPLATE, tokenizer)
        if not isinstance(source, str):
            raise TemplateError(
                f"{config}: chat_template is neither a text nor a list with one named default"
            )
        return cls(source, tokenizer)

    def prompt_ids(
        self, messages: Sequence[Mapping[str, object]], *, thinking: bool = True, limit: int | None = None
    ) -> list[int]:
        """Token ids of the prompt; raises TemplateError with a sentence for the client, and PromptTooLong,
        before any text is tokenized, where it is plain that there are more than `limit`.

        A message has `role` (system, developer, user, assistant or tool) and `content`, an assistant's may
        have `tool_calls` in OpenAI's form. With a template that opens the thought every prompt ends so
        (R1's leaves it out behind a tool's output), in `<think>\\n`; without `thinking` any prompt ends in a
        thought that is closed at once.
        """
        pieces = self._render(messages)
        tail = pieces[-1].text  # what comes after the last marker: always trusted
        if (self.opens_thought or not thinking) and not tail.endswith(_OPEN_THOUGHT):
            tail += _OPEN_THOUGHT.removeprefix(THINK_START) if tail.endswith(THINK_START) else _OPEN_THOUGHT
        if not thinking:
            tail += _CLOSE_THOUGHT
        pieces[-1] = Piece(tail, True)
        if limit is not None and (at_least := self._tokenizer.at_least(pieces)) > limit:
            raise PromptTooLong(at_least)
        return self._with_one_bos(self._tokenizer.encode_pieces(pieces))

    def thought(self, *, thinking: bool) -> Thought:
        """How prompts leave the thought."""
        if not thinking:
            return Thought.CLOSED
        return Thought.OPEN if self.opens_thought else Thought.UNDECIDED

    def _render(self, messages: Sequence[Mapping[str, object]]) -> list[Piece]:
        book = _MarkerBook()
        pieces = book.split(self._run(messages, book.mark))
        # What a template did to a marker without asking the text shows when it is given the text itself.
        if "".join(piece.text for piece in pieces) != self._run(messages, str):
            raise TemplateError(
                "the checkpoint's chat template changes these messages in a way not supported"
            )
        return pieces

    def _run(self, messages: Sequence[Mapping[str, object]], mark: Callable[[str], str]) -> str:
        try:
            return self._template.render(
                messages=[_for_template(message, mark, self._no_content) for message in messages],
                add_generation_prompt=True,
                bos_token=self._tokenizer.bos_token,
                eos_token=self._tokenizer.eos_token,
            )
        except _RENDERING_FAILS as error:
            raise TemplateError(f"the model's chat template refuses these messages: {error}") from None

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_id
        if bos is None:
            return ids
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[start:]]


def _for_template(
    message: Mapping[str, object], mark: Callable[[str], str], no_content: str | None
) -> dict[str, object]:
    """A message as templates know it, every text of the client's marked; `no_content` stands for null."""
    role, content = message["role"], message.get("content")
    if role == "developer":
        role = "system"
    if role == "assistant" and isinstance(content, str):
        content = content.split(THINK_END)[-1]
    shown: dict[str, object] = {"role": role}
    shown["content"] = mark(content) if isinstance(content, str) else no_content
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls:
        shown["tool_calls"] = [
            {
                "type": "function",
                "function": {key: mark(call["function"][key]) for key in ("name", "arguments")},
            }
            for call in calls
        ]
    return shown


def _raise_exception(message: str) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)
