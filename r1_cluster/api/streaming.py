"""A streamed answer as bytes: server-sent events, each a chunk in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from r1_cluster.api.errors import ApiError

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip; proxies that cut silent connections see that something comes."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Without the second, nginx gathers a whole stream before it passes it on."""
_encode = msgspec.json.encode
_LINE_ENDS = [(end.encode(), b"\\u%04x" % ord(end)) for end in "\x85\u2028\u2029"]


class ChunkFrames:
    """Builds the frames of one stream. All but the delta is the same in each and is encoded once."""

    def __init__(self, completion_id: str, created: int, model: str, *, include_usage: bool) -> None:
        """`created`: Unix time in s. With `include_usage` every chunk has a `usage`, null but in the last."""
        head = _encode(
            {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model}
        )
        self._start = b"data: " + head[:-1] + b',"choices":['
        self._delta = self._start + b'{"index":0,"delta":'
        self._reason = b',"logprobs":null,"finish_reason":'
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._rest = self._reason + b"null}" + self._end

    def role(self) -> bytes:
        """The first chunk."""
        return self._delta + b'{"role":"assistant","content":""}' + self._rest

    def reasoning(self, text: str) -> bytes:
        """A piece of the thought, under both names."""
        encoded = _encode_text(text)
        return b"".join(
            (self._delta, b'{"reasoning_content":', encoded, b',"reasoning":', encoded, b"}", self._rest)
        )

    def content(self, text: str) -> bytes:
        """A piece of the answer."""
        return b"".join((self._delta, b'{"content":', _encode_text(text), b"}", self._rest))

    def finish(self, reason: str) -> bytes:
        """The chunk that says why the answer ended."""
        return b"".join((self._delta, b"{}", self._reason, _encode(reason), b"}", self._end))

    def usage(self, usage: Mapping[str, object]) -> bytes:
        """The last chunk, where it was asked for."""
        return b"".join((self._start, b'],"usage":', _encode(usage), b"}\n\n"))


def _encode_text(text: str) -> bytes:
    """As JSON on one line, also to clients that take Unicode's own ends of lines for some."""
    encoded = _encode(text)
    if text.isascii():
        return encoded
    for raw, escaped in _LINE_ENDS:
        encoded = encoded.replace(raw, escaped)
    return encoded


def error_frame(error: ApiError) -> bytes:
    """An error after the headers were sent."""
    return b"".join((b"data: ", _encode(error.body()), b"\n\n"))
