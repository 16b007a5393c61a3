"""The messages of a chat request. Clients send back what they were given, with fields of their own: what is
not known here is dropped, at every depth."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

ROLES = ("system", "developer", "user", "assistant", "tool")

# Where a part's text is, by its type. `input_text` and `output_text` are the Responses API's words.
_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text"}
_SAID_KEYS = {**_TEXT_KEYS, "refusal": "refusal"}
# An earlier turn's thought, which is no part of the history, as several clients keep it.
_THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_content"})


def _joined(parts: list[object], keys: dict[str, str], dropped: frozenset[str] = frozenset()) -> str:
    """The texts of parts, each on lines of its own. A bare string stands for a text part."""
    texts = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            raise PydanticCustomError("part", "part {index} is no object with a string 'type'", {"index": i})
        if kind in dropped:
            continue
        if kind not in keys:
            context = {"index": i, "kind": kind[:64]}
            raise PydanticCustomError(
                "part", "part {index} is of type '{kind}', but only text is supported here", context
            )
        text = part.get(keys[kind])
        if not isinstance(text, str):
            context = {"index": i, "kind": kind, "key": keys[kind]}
            raise PydanticCustomError("part", "part {index} of type '{kind}' needs a string '{key}'", context)
        texts.append(text)
    return "\n".join(texts)


def _text(value: object) -> object:
    """What somebody asks: a string, or a list of text parts that is not empty."""
    if not isinstance(value, list):
        return value
    if not value:
        raise PydanticCustomError("part", "a list of parts must not be empty")
    return _joined(value, _TEXT_KEYS)


def _result(value: object) -> object:
    """What a tool gave, which may be nothing."""
    return _joined(value, _TEXT_KEYS) if isinstance(value, list) else value


def _said(value: object) -> object:
    """What the assistant said, which may be a refusal, or nothing."""
    return _joined(value, _SAID_KEYS, _THOUGHTS) if isinstance(value, list) else value


def _kind_of_call(value: object) -> object:
    return "function" if value is None else value


_Text = Annotated[str, BeforeValidator(_text)]
_SHAPE = ConfigDict(strict=True, extra="ignore")


class Function(TypedDict):
    """Name and arguments (JSON, as text) of a call that the assistant made."""

    __pydantic_config__ = _SHAPE  # type: ignore[misc]
    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call in an assistant's turn. Those of OpenAI's type `custom` are not supported."""

    __pydantic_config__ = _SHAPE  # type: ignore[misc]
    id: NotRequired[str | None]
    type: NotRequired[Annotated[Literal["function"], BeforeValidator(_kind_of_call)]]
    function: Function


class InstructionMessage(TypedDict):
    """The system prompt; `developer` is OpenAI's later word for it."""

    __pydantic_config__ = _SHAPE  # type: ignore[misc]
    role: Literal["system", "developer"]
    content: _Text
    name: NotRequired[str | None]


class UserMessage(TypedDict):
    """A user's turn."""

    __pydantic_config__ = _SHAPE  # type: ignore[misc]
    role: Literal["user"]
    content: _Text
    name: NotRequired[str | None]


class AssistantMessage(TypedDict):
    """A former answer, as clients send it back.

    `prefix` (DeepSeek's: go on with this turn) is not supported yet, and ignoring it would answer something
    else than what was asked for.
    """

    __pydantic_config__ = _SHAPE  # type: ignore[misc]
    role: Literal["assistant"]
    content: NotRequired[Annotated[str | None, BeforeValidator(_said)]]
    refusal: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCall] | None]
    name: NotRequired[str | None]
    prefix: NotRequired[Literal[False] | None]


class ToolMessage(TypedDict):
    """What a call gave."""

    __pydantic_config__ = _SHAPE  # type: ignore[misc]
    role: Literal["tool"]
    content: Annotated[str, BeforeValidator(_result)]
    tool_call_id: NotRequired[str | None]
    name: NotRequired[str | None]


def _with_content(message: AssistantMessage) -> AssistantMessage:
    """A turn without content said its refusal, or called tools, or nothing: an answer that was thought alone
    comes back from some clients with null, and templates take null only beside calls."""
    if message.get("content") is None and not message.get("tool_calls"):
        message["content"] = message.get("refusal") or ""
    return message


Message = Annotated[
    InstructionMessage
    | UserMessage
    | Annotated[AssistantMessage, AfterValidator(_with_content)]
    | ToolMessage,
    Field(discriminator="role"),
]
