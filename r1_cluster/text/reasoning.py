"""An answer's tokens → its thought and its content; and where stop strings end it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from r1_cluster.text.detokenize import StreamDecoder
from r1_cluster.text.tokenizer import THINK_END, THINK_START, Tokenizer


class Thought(Enum):
    """How a prompt leaves the thought: open, closed before it began, or to the model, which may open one."""

    OPEN = "open"
    CLOSED = "closed"
    UNDECIDED = "undecided"


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

    Where the model itself decides whether it thinks (`Thought.UNDECIDED`), the first token that is not white
    space alone decides: `<think>` opens the thought and reaches neither side, nor does the white space around
    it; a `</think>` closes one that never began; anything else is content already, in which a tag is text.

    Without `</think>` all of a thought is reasoning. `num_reasoning_tokens` counts the tokens between the
    tags. Where the tokenizer has no token for a tag, it is looked for in the text.
    """

    def __init__(self, tokenizer: Tokenizer, thought: Thought) -> None:
        """`thought`: how the prompt left it."""
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._start_id, self._end_id = tokenizer.think_start_id, tokenizer.think_end_id
        self._tag = StopChecker([THINK_END])  # where it has no token
        self._thought = thought
        self._begun = thought is Thought.OPEN  # white space behind a tag is dropped
        self._white_space = ""  # may turn out to stand before the tag
        self._undecided = ""  # may turn out to begin with a tag that has no token
        self._starts: list[int] = []  # of each token in the thought's text, where its end is looked for there
        self._length = 0  # of that text
        self.num_reasoning_tokens = 0

    def feed(self, ids: Sequence[int]) -> Split:
        """What these tokens add."""
        reasoning = content = ""
        for token in ids:
            thought, said = self._take(token)
            reasoning, content = reasoning + thought, content + said
        return Split(reasoning, content)

    def finish(self) -> Split:
        """What was held back, once no further token comes."""
        text = self._decoder.flush()
        if self._thought is Thought.OPEN:
            reasoning = self._reasoning(self._tag.feed(text) + self._tag.flush()) + self._white_space
            self._white_space = ""
            return Split(reasoning, "")
        return Split("", self._without_lead(self._undecided + text))

    def _take(self, token: int) -> Split:
        if self._thought is Thought.CLOSED:
            return Split("", self._without_lead(self._decoder.feed((token,))))
        if token == self._end_id and not self._undecided:
            reasoning = self._reasoning(self._decoder.flush())
            self._begin(Thought.CLOSED)
            return Split(reasoning, "")
        if self._thought is Thought.OPEN:
            return self._think(self._decoder.feed((token,)))
        if token == self._start_id:
            self._begin(Thought.OPEN)
            return Split("", "")
        if self._start_id is None:
            return self._look_for_tag(self._decoder.feed((token,)))
        if self._tokenizer.is_blank(token):
            return Split("", "")
        self._begin(Thought.CLOSED)
        return self._take(token)

    def _look_for_tag(self, text: str) -> Split:
        """Decides by whether the text so far begins with `<think>`, or with `</think>` if that has no token
        either."""
        self._undecided = text = (self._undecided + text).lstrip()
        tags = {THINK_START: Thought.OPEN} | ({THINK_END: Thought.CLOSED} if self._end_id is None else {})
        if any(tag.startswith(text) for tag in tags if tag != text):
            return Split("", "")
        self._undecided = ""
        tag = next((tag for tag in tags if text.startswith(tag)), "")
        self._begin(tags.get(tag, Thought.CLOSED))
        rest = text.removeprefix(tag)
        if self._thought is Thought.CLOSED:
            return Split("", self._without_lead(rest))
        return self._think(rest) if rest else Split("", "")

    def _think(self, text: str) -> Split:
        """What a token of the thought adds, whose text this is."""
        self.num_reasoning_tokens += 1
        if self._end_id is not None:
            return Split(self._reasoning(text), "")
        self._starts.append(self._length)
        self._length += len(text)
        reasoning = self._reasoning(self._tag.feed(text))
        if self._tag.found is None:
            return Split(reasoning, "")
        # A token that the tag shares with the thought is the thought's.
        tag_at = self._length - len(self._tag.rest) - len(THINK_END)
        self.num_reasoning_tokens = bisect_left(self._starts, tag_at)
        self._begin(Thought.CLOSED)
        return Split(reasoning, self._without_lead(self._tag.rest))

    def _begin(self, thought: Thought) -> None:
        self._thought = thought
        self._begun = False
        self._white_space = ""

    def _reasoning(self, text: str) -> str:
        text = self._without_lead(self._white_space + text)
        solid = text.rstrip()
        self._white_space = text[len(solid) :]
        return solid

    def _without_lead(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
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
