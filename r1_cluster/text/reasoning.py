"""An answer's tokens → its thought and its content; and where stop strings end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from r1_cluster.text.detokenize import StreamDecoder
from r1_cluster.text.tokenizer import THINK_END, Tokenizer


class Split(NamedTuple):
    """New text of either kind."""

    reasoning: str
    content: str


class StopChecker:
    """Looks for stop strings in a stream of text; holds back what may be the beginning of one.

    The first string to be completed ends the text, the longest where several are at once: so the result
    does not depend on how the text was cut into increments. Knuth–Morris–Pratt: each character is looked
    at once per string, however long the strings are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._fallbacks = [_fallback_table(stop) for stop in stops]
        self._first = frozenset(stop[0] for stop in stops)
        self._matched = [0] * len(stops)
        self._held = ""
        self.found: str | None = None
        self.rest = ""

    def feed(self, text: str) -> str:
        """The text that is now certain to come before any stop string. Once one is found, `found` is that
        string and `rest` the text behind it."""
        # No stop string is under way, and none begins here: so it is for most of a text.
        if not self._held and self._first.isdisjoint(text):
            return text
        buffer = self._held + text
        for position, character in enumerate(text, len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None:
                self.found, self.rest, self._held = stop, buffer[position:], ""
                return buffer[: position - len(stop)]
        certain = len(buffer) - max(self._matched)
        self._held = buffer[certain:]
        return buffer[:certain]

    def flush(self) -> str:
        """What was held back; the search then starts anew."""
        text, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return text

    def _advance(self, character: str) -> str | None:
        found = None
        for i, stop in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != character:
                matched = self._fallbacks[i][matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                matched = self._fallbacks[i][matched - 1]
            self._matched[i] = matched
        return found


class ReasoningSplitter:
    """Splits at the first `</think>`; the tag and the white space around it reach neither side.

    Without the tag everything is reasoning. `num_reasoning_tokens` counts the tokens before the tag.
    Where the tokenizer has no token for the tag, it is looked for in the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool = True) -> None:
        """`thinking`: whether the prompt left the thought open."""
        self._decoder = StreamDecoder(tokenizer)
        self._end_id = tokenizer.think_end_id
        self._tag = StopChecker([THINK_END] if self._end_id is None else [])
        self._in_reasoning = thinking
        self._white_space = ""  # may turn out to stand before the tag
        self._content_started = False
        self.num_reasoning_tokens = 0

    def feed(self, ids: Sequence[int]) -> Split:
        """What these tokens add."""
        if not self._in_reasoning:
            return Split("", self._content(self._decoder.feed(ids)))
        if self._end_id in ids:
            at = ids.index(self._end_id)
            self.num_reasoning_tokens += at
            reasoning = self._reasoning(self._decoder.feed(ids[:at]) + self._decoder.flush())
            self._in_reasoning = False
            return Split(reasoning, self._content(self._decoder.feed(ids[at + 1 :])))
        self.num_reasoning_tokens += len(ids)
        return self._search(self._decoder.feed(ids))

    def finish(self) -> Split:
        """What was held back, once no further token comes."""
        text = self._decoder.flush()
        if not self._in_reasoning:
            return Split("", self._content(text))
        reasoning, content = self._search(text)
        if self._in_reasoning:
            reasoning += self._reasoning(self._tag.flush()) + self._white_space
            self._white_space = ""
        return Split(reasoning, content)

    def _search(self, text: str) -> Split:
        reasoning = self._reasoning(self._tag.feed(text))
        if self._tag.found is None:
            return Split(reasoning, "")
        self._in_reasoning = False
        return Split(reasoning, self._content(self._tag.rest))

    def _reasoning(self, text: str) -> str:
        text = self._white_space + text
        solid = text.rstrip()
        self._white_space = text[len(solid) :]
        return solid

    def _content(self, text: str) -> str:
        if not self._content_started:
            text = text.lstrip()
            self._content_started = bool(text)
        return text


def _fallback_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix too."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table
