"""Token ids → text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from r1_cluster.text.tokenizer import Tokenizer

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """Gives out text as soon as its characters are whole; the increments join to `Tokenizer.decode`.

    A token of byte-level BPE stands for fixed bytes, so that each costs its own length and never a look
    back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = _new_utf8_decoder("replace")

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; bytes of an unfinished character are held back."""
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def flush(self) -> str:
        """What was held back, as U+FFFD; the decoder then starts anew."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
