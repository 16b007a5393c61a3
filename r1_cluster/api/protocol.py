"""A chat request: what may be in it, and how its bytes become one."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Literal, NoReturn

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field

from r1_cluster.api.errors import ApiError, invalid_request
from r1_cluster.api.fields import IGNORED_FIELDS, NEUTRAL_VALUES, is_neutral
from r1_cluster.api.messages import ROLES, Message

MAX_MESSAGES = 16_384
MAX_STOPS = 16
MAX_STOP_TOKENS = 256
MAX_NUMBER_LENGTH = 100
MAX_VALUES = 500_000
"""Commas, colons and opening brackets of a body: 16,384 messages with tool calls have some 300,000."""
_INT32_MAX = 2**31 - 1
# A string of JSON. One that never ends goes to the end, or the search would begin anew at each quote in it.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)', re.DOTALL)
_EXACT_INTEGERS = 2**53
"""Up to here a float64 holds every integer, so that a JSON number like 1e3 means one and not several."""


def _as_list(value: object) -> object:
    """One stop string stands for a list of one, null for none."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _false_if_null(value: object) -> object:
    return False if value is None else value


def _whole(value: object) -> object:
    """JSON does not tell 1.0 from 1, and some clients write all their numbers as floats."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT_INTEGERS:
        return int(value)
    return value


def _no_top_k(value: int | None) -> int | None:
    """-1 and 0 both mean all tokens."""
    return value and max(value, 0)


_Integer = Annotated[int, BeforeValidator(_whole)]
_Flag = Annotated[bool, BeforeValidator(_false_if_null)]


class _Fields(pydantic.BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class StreamOptions(_Fields):
    """`include_obfuscation` is OpenAI's, and without effect; `continuous_usage_stats` is vLLM's, and is not
    supported yet."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class TemplateArguments(_Fields):
    """`thinking`: false closes the thought before it begins."""

    thinking: bool | None = None


class Thinking(_Fields):
    """DeepSeek's switch for the thought. A budget (Anthropic's word for it) is not supported yet."""

    type: Literal["enabled", "disabled"]
    budget_tokens: None = None


class ChatCompletionRequest(_Fields):
    """`POST /v1/chat/completions`. Where a field is null the service's default holds."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[_Integer | None, Field(ge=-1, le=_INT32_MAX), pydantic.AfterValidator(_no_top_k)] = None
    seed: Annotated[_Integer | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)
    ] = []
    stop_token_ids: Annotated[
        list[Annotated[_Integer, Field(ge=0, le=_INT32_MAX)]],
        Field(max_length=MAX_STOP_TOKENS),
        BeforeValidator(_as_list),
    ] = []
    stop_in_thought: _Flag = False
    max_tokens: Annotated[_Integer | None, Field(ge=1, le=_INT32_MAX)] = None
    max_completion_tokens: Annotated[_Integer | None, Field(ge=1, le=_INT32_MAX)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: _Flag = False
    chat_template_kwargs: TemplateArguments | None = None
    thinking_switch: Annotated[Thinking | None, Field(alias="thinking")] = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = (
        None
    )

    @property
    def max_output_tokens(self) -> int | None:
        """The limit on the answer's tokens, by whichever name it was given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def thinking(self) -> bool:
        """Whether the model thinks first; it does unless it was told not to. Where several fields speak of
        it, the most explicit one counts."""
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.thinking is not None:
            return self.chat_template_kwargs.thinking
        if self.thinking_switch is not None:
            return self.thinking_switch.type == "enabled"
        return self.reasoning_effort != "none"

    @property
    def stops_sleep(self) -> bool:
        """Whether `stop` and `stop_token_ids` wait for the end of the thought."""
        return self.thinking and not self.stop_in_thought

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends in a chunk with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """The request in a body; raises ApiError (400), which names the field at fault."""
    fields = _without_ignored(parse_json_object(body))
    try:
        request = ChatCompletionRequest.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _first_fault(error) from None
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid_request("max_tokens", "only one of max_tokens and max_completion_tokens may be given")
    if request.stream_options is not None and not request.stream:
        raise invalid_request("stream_options", "stream_options is only allowed together with stream: true")
    return request


def parse_json_object(body: bytes) -> dict[str, object]:
    """A JSON object, read strictly: UTF-8 without lone surrogates, no key twice, numbers that are numbers.

    Raises ApiError (400). The cost grows with the body's length alone.
    """
    if _num_values(body) > MAX_VALUES:
        raise invalid_request(None, f"the body has more than {MAX_VALUES} keys and values")
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_float,
            parse_int=_int,
        )
        if re.search(rb"\\u[dD][89a-fA-F]", body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise invalid_request(None, "the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise invalid_request(None, "the body is not valid UTF-8") from None
    except UnicodeEncodeError:
        raise invalid_request(None, "the body has a lone surrogate in a string") from None
    except ValueError as error:
        raise invalid_request(None, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid_request(None, "the body must be a JSON object")
    return value


def _num_values(body: bytes) -> int:
    """How many structural characters a body has, which bounds what its values will take in memory."""
    count = _num_structural(body)
    # Text has commas too: only where they could decide it are strings told from the rest.
    return count if count <= MAX_VALUES else _num_structural(_STRING.sub(b"", body))


def _num_structural(text: bytes) -> int:
    return sum(map(text.count, (b",", b":", b"[", b"{")))


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        # `add` returns None, so that each key is looked up and noted once.
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_shown(twice)} stands there twice")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _float(text: str) -> float:
    _check_length(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:30]} is too large")
    return value


def _int(text: str) -> int:
    _check_length(text)
    return int(text)


def _check_length(number: str) -> None:
    if len(number) > MAX_NUMBER_LENGTH:
        raise ValueError(f"a number has {len(number)} digits")


def _without_ignored(fields: dict[str, object]) -> dict[str, object]:
    """The fields that count; raises ApiError where one that is not supported asks for something."""
    kept = {}
    for name, value in fields.items():
        if name in IGNORED_FIELDS:
            continue
        if name not in NEUTRAL_VALUES:
            kept[name] = value
        elif not is_neutral(name, value):
            raise invalid_request(name, f"this value of {name} is not supported yet")
    return kept


def _first_fault(error: pydantic.ValidationError) -> ApiError:
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = list(fault["loc"])
    if where[:1] == ["messages"] and len(where) > 2 and where[2] in ROLES:
        del where[2]  # pydantic names the kind of message between its index and its field
    kind = fault["type"]
    if kind.startswith("union_tag"):
        where.append("role")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in where)
    param = param.removeprefix(".")
    if kind == "extra_forbidden":
        message = f"unknown field: {param}"
    elif kind == "missing":
        message = f"{param} is required"
    elif kind.startswith("union_tag"):
        message = f"{param} must be one of {', '.join(ROLES)}"
    else:
        message = f"{param}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
    return invalid_request(param, message)


def _shown(key: str) -> str:
    """A client's key, short enough for a message."""
    return key if len(key) <= 64 else f"{key[:64]}…"
