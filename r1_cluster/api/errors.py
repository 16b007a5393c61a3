"""Errors as a client sees them: a status, and OpenAI's body with all four of its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

_NO_RETRY = {"x-should-retry": "false"}
"""What OpenAI's client libraries look at before they send a request again."""


class ApiError(Exception):
    """An answer that is an error. `message` is one sentence for the client: no class names, no paths."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type_
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Callable[..., ApiError], tuple[int, str]]:
        """By this an error passes between processes."""
        named: dict[str, Any] = {
            "type_": self.type,
            "param": self.param,
            "code": self.code,
            "headers": self.headers,
        }
        return partial(ApiError, **named), (self.status, self.message)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def invalid_request(
    param: str | None, message: str, *, status: int = 400, code: str | None = None
) -> ApiError:
    """A request that is wrong as it stands; `param` is the field that is at fault."""
    return ApiError(status, message, param=param, code=code)


def context_length_exceeded(
    max_model_len: int, num_prompt_tokens: int, max_tokens: int | None, *, at_least: bool = False
) -> ApiError:
    """Prompt and answer (None: at least one token) do not fit; all lengths in tokens. `at_least`: the prompt
    was not tokenized, and may be longer."""
    asked = "" if max_tokens is None else f" and {max_tokens} in the answer"
    message = (
        f"This model's maximum context length is {max_model_len} tokens, but the request asks for"
        f" {'at least ' * at_least}{num_prompt_tokens} in the messages{asked}."
    )
    return invalid_request("messages", message, code="context_length_exceeded")


def body_too_large(max_bytes: int) -> ApiError:
    """The body is longer than the service takes."""
    return ApiError(
        413, f"The body is longer than {max_bytes} bytes, which is the most that this service takes."
    )


def body_too_slow(timeout_s: float) -> ApiError:
    """The body did not come to its end in time; its connection is closed, as the rest might still come."""
    return ApiError(
        408, f"The body was not there whole within {timeout_s:g} s.", headers={"Connection": "close"}
    )


def unsupported_media_type(message: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """Something other than plain JSON was sent."""
    return ApiError(415, message, headers=headers)


def model_not_found(name: str) -> ApiError:
    """The request names a model that is not served."""
    message = f"The model {name[:100]!r} does not exist."
    return invalid_request("model", message, status=404, code="model_not_found")


def unauthorized() -> ApiError:
    """The API key is missing or wrong."""
    return ApiError(
        401,
        "A valid API key is needed, as `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def overloaded(retry_after_s: int) -> ApiError:
    """The queue is full."""
    return ApiError(
        429,
        "Too many requests are waiting; please try again shortly.",
        type_="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(retry_after_s)},
    )


def unavailable(message: str) -> ApiError:
    """No engine can answer now."""
    return ApiError(503, message, type_="server_error", code="service_unavailable")


def convicted() -> ApiError:
    """Workers die whenever this request runs. No client repeats a 400 by itself."""
    return ApiError(
        400,
        "Workers of the model died each time that they computed this request; it is refused for some minutes."
        " Please do not send it again.",
        code="request_convicted",
        headers=_NO_RETRY,
    )


def failed_row() -> ApiError:
    """The model's logits for this request are not numbers; they would be none again."""
    return ApiError(
        500,
        "The model computed no usable logits for this request; asking again would give the same.",
        type_="server_error",
        code="logits_not_finite",
        headers=_NO_RETRY,
    )


def unprepared() -> ApiError:
    """A process died, or took too long, over this body; the next might too."""
    return ApiError(
        500,
        "The request could not be read; please do not send it again.",
        type_="server_error",
        code="internal_error",
        headers=_NO_RETRY,
    )


def internal(error_id: str) -> ApiError:
    """Something that should not happen; `error_id` stands beside the cause in the log."""
    message = f"The server failed to answer this request. The log has the cause under {error_id}."
    return ApiError(500, message, type_="server_error", code="internal_error")
