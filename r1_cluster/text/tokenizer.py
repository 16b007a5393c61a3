"""A checkpoint's tokenizer, in which control tokens come from the template alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeGuard

import tokenizers

# Each text is encoded by the thread that asks: the library's pool of threads would wait for nothing.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NFC_SHORTENS = 4
"""By how much NFC shortens text at most: seven bytes, U+1FBE U+0308 U+0341, become the two of U+0390."""
THINK_START, THINK_END = "<think>", "</think>"


class TokenizerError(Exception):
    """A tokenizer that cannot be used; the text names the file and what is wrong with it."""


class Piece(NamedTuple):
    """A stretch of a prompt. Only where `trusted` may its text stand for control tokens."""

    text: str
    trusted: bool


class _AddedToken(NamedTuple):
    id: int
    special: bool


class Tokenizer:
    """Byte-level BPE from a tokenizer.json.

    Text is encoded by an instance without any added tokens, so that nothing in it can become a control
    token; control tokens are found by us, in trusted text only. (`encode_special_tokens=True` of the
    tokenizers library is not enough: R1 adds `</think>` with special=False, which it leaves active.)
    """

    def __init__(
        self,
        definition: Mapping[str, object],
        *,
        bos_token: str | None,
        eos_token: str | None,
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`definition`: the parsed tokenizer.json. `eos_ids` are joined by the id of `eos_token`."""
        _check_byte_level(definition)
        self._added = _added_tokens(definition)
        stripped = {
            **definition,
            "added_tokens": [],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        try:
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(stripped))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer.json cannot be read: {error}") from None
        self._check_plain()
        vocabulary: dict[str, int] = self._plain.get_vocab(with_added_tokens=False)
        self._tokens = {token_id: token for token, token_id in vocabulary.items()}
        self._longest = _longest_token(stripped, vocabulary, self._added)
        self._bytes: dict[int, bytes] = {
            added.id: b"" if added.special else text.encode() for text, added in self._added.items()
        }
        longest_first = sorted(self._added, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.bos_token, self.eos_token = bos_token or "", eos_token or ""
        self.bos_id = self.token_id(self.bos_token)
        eos_id = self.token_id(self.eos_token)
        self.eos_ids = eos_ids if eos_id is None else eos_ids | {eos_id}
        if not self.eos_ids:
            raise TokenizerError("the checkpoint names no end-of-sequence token")
        self.think_start_id, self.think_end_id = self.token_id(THINK_START), self.token_id(THINK_END)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, and the ids and names of BOS and EOS from the three config files.

        Raises TokenizerError where tokenizer.json is missing, broken, or not byte-level BPE.
        """
        folder = Path(path)
        settings = read_json(folder / "tokenizer_config.json")
        eos_ids: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            value = read_json(folder / name).get("eos_token_id")
            eos_ids |= set(filter(_is_id, value if isinstance(value, list) else [value]))
        definition = read_json(folder / "tokenizer.json")
        if not definition:
            raise TokenizerError(f"there is no {folder / 'tokenizer.json'}")
        try:
            return cls(
                definition,
                bos_token=_token_text(settings.get("bos_token")),
                eos_token=_token_text(settings.get("eos_token")),
                eos_ids=frozenset(eos_ids),
            )
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from None

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that text never becomes."""
        return frozenset(added.id for added in self._added.values())

    def is_blank(self, token_id: int) -> bool:
        """Whether a token's text is white space alone. A token without text is not blank."""
        return self.decode((token_id,)).isspace()

    def blank_ids(self) -> frozenset[int]:
        """All blank tokens; looks at the whole vocabulary."""
        return frozenset(filter(self.is_blank, chain(self._tokens, self.control_ids)))

    def token_id(self, text: str) -> int | None:
        """The id of a control token by its text."""
        added = self._added.get(text)
        return None if added is None else added.id

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text: no control tokens, no BOS. The text must be free of surrogates."""
        # Of the library's ways this one computes no offsets, which nobody reads, and lets go of the GIL.
        (encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def at_least(self, pieces: Iterable[Piece]) -> int:
        """A number of tokens below which these pieces cannot stay, by the bytes of the longest token."""
        if self._longest is None:
            return 0
        return -(-sum(len(piece.text.encode()) for piece in pieces) // self._longest)

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Token ids of a prompt: control tokens where trusted text names them, all else as ordinary text.

        Text between two control tokens is encoded in one go, whoever wrote its parts, so that the ids are
        those of the whole text.
        """
        ids: list[int] = []
        for part in self._runs(pieces):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self.encode(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; nothing for special tokens and for ids that have no token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokens.get(token_id, "")
            known = self._bytes[token_id] = bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
        return known

    def decode(self, ids: Sequence[int]) -> str:
        """The text of whole token ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def _runs(self, pieces: Iterable[Piece]) -> Iterator[str | int]:
        run: list[str] = []
        for text, trusted in pieces:
            end = 0
            if trusted:
                for match in self._control.finditer(text):
                    run.append(text[end : match.start()])
                    yield "".join(run)
                    run.clear()
                    yield self._added[match.group()].id
                    end = match.end()
            run.append(text[end:])
        yield "".join(run)

    def _check_plain(self) -> None:
        """Some vocabularies list control tokens beside ordinary ones: make sure that no text reaches them."""
        control = self.control_ids
        for text in self._added:
            if control & set(self.encode(text)):
                raise TokenizerError(f"tokenizer.json: ordinary text can become the control token {text!r}")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file; empty where there is no such file. Raises TokenizerError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds no JSON object")
    return value


def _added_tokens(definition: Mapping[str, object]) -> dict[str, _AddedToken]:
    entries = definition.get("added_tokens") or []
    added: dict[str, _AddedToken] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not _is_name(entry.get("content")):
            raise TokenizerError(f"tokenizer.json: an added token is malformed: {str(entry)[:200]}")
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise TokenizerError(f"added token {entry['content']!r} wants lstrip, rstrip or single_word")
        added[entry["content"]] = _AddedToken(entry["id"], bool(entry.get("special")))
    return added


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _longest_token(
    definition: Mapping[str, object], vocabulary: Iterable[str], added: Iterable[str]
) -> int | None:
    """Bytes of text that one token stands for at most; None where a normalizer may shorten text at will."""
    normalizer = definition.get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else [normalizer]
    if any(step not in (None, {"type": "NFC"}) for step in steps):
        return None
    # The vocabulary of byte-level BPE writes each byte as one character.
    longest = max(chain(map(len, vocabulary), (len(text.encode()) for text in added)))
    return longest * (NFC_SHORTENS if {"type": "NFC"} in steps else 1)


def _check_byte_level(definition: Mapping[str, object]) -> None:
    decoder = definition.get("decoder")
    decoders = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    model = definition.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or "ByteLevel" not in [entry.get("type") for entry in decoders]
    ):
        raise TokenizerError("tokenizer.json is not byte-level BPE, as the tokenizers of the R1 family are")


def _token_text(value: object) -> str | None:
    """tokenizer_config.json names a token by its text or by an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _byte_characters() -> dict[str, int]:
    """The printable character by which byte-level BPE writes each byte (GPT-2's `bytes_to_unicode`)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return characters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()
