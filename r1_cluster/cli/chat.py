"""`r1-cluster chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r1_cluster.cli.options import ServiceName
from r1_cluster.cli.terminal import accept_any_bytes, is_text
from r1_cluster.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_DIM, _PLAIN = "\033[2m", "\033[0m"


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number")
    return value


def chat(
    message: Annotated[list[str] | None, typer.Argument(help="Ask this one thing and end.")] = None,
    service: ServiceName = None,
    url: Annotated[
        str | None, typer.Option(help="An endpoint elsewhere, such as http://10.0.0.5:8000.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's served name (default: the first one served).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 to 2 (default: the service's).", callback=_finite)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
) -> int:
    """Talks to a service from the terminal. The thought is shown dimmed, the answer plain.

    An empty line or Ctrl-D ends the conversation.
    """
    import httpx

    from r1_cluster.cli.running import find

    url = (url or find(service).url).rstrip("/")
    fields = {
        name: value for name, value in {"temperature": temperature, "seed": seed}.items() if value is not None
    }
    try:
        with httpx.Client(base_url=url, timeout=httpx.Timeout(10, read=None)) as client:
            model = model or _first_model(client)
            messages: list[dict[str, str]] = []
            for question in [" ".join(message)] if message else _questions(model):
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": _answer(client, model, messages, fields)})
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url: {error}") from None
    except httpx.HTTPError as error:
        raise ConfigError(f"{url} does not answer ({error}); is the service running?") from None
    return 0


def _first_model(client: Any) -> str:
    response = client.get("/v1/models")
    if response.status_code != 200:
        raise ConfigError(_message_of(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ConfigError(f"{client.base_url} does not say which models it serves") from None


def _questions(model: str) -> Iterator[str]:
    print(f"Talking to {model}. An empty line ends it.")
    accept_any_bytes()
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            return
        if not question:
            return
        if is_text(question):
            yield question
        else:
            print("That is not valid UTF-8; please ask again.")


def _message_of(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}: {response.text[:200]}"


def _answer(client: Any, model: str, messages: list[dict[str, str]], fields: Mapping[str, Any]) -> str:
    body = {"model": model, "messages": messages, "stream": True, **fields}
    colour = sys.stdout.isatty()
    answer = ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise ConfigError(_message_of(response))
        thinking = False
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ConfigError(chunk["error"]["message"])
            delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
            thought, content = delta.get("reasoning_content") or "", delta.get("content") or ""
            if thought and not thinking:
                thinking = True
                print(_DIM if colour else "<think>", end="" if colour else "\n")
            if content and thinking:
                thinking = False
                print(_PLAIN if colour else "\n</think>", end="\n\n")
            print(thought + content, end="", flush=True)
            answer += content
    print(_PLAIN if colour else "")
    return answer
