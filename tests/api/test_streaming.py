"""Frames as bytes."""

import json

import httpx
import pytest

from r1_cluster.api.streaming import ChunkFrames


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d", "plain", "日本\n\r", "\\u2028 as typed"])
@pytest.mark.parametrize("kind", ["content", "reasoning"])
def test_a_frame_is_one_line_for_every_client(kind, text):
    """httpx and others end lines at Unicode's own ends of lines, too."""
    frame = getattr(ChunkFrames("id", 0, "model", include_usage=False), kind)(text)
    (line, end) = httpx.Response(200, content=frame).iter_lines()
    assert end == ""
    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
    assert set(delta.values()) == {text}
