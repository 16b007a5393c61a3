"""Text to and from a terminal, whose bytes need not be valid UTF-8 and whose encoding may lack characters."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from r1_cluster.config import ConfigError


def is_text(text: str) -> bool:
    """Whether it can be encoded. Bytes that were no text when they were read have become lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_text(arguments: Sequence[str]) -> None:
    """Raises ConfigError where an argument of the command line is no text."""
    for argument in arguments:
        if not is_text(argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise ConfigError(f"the argument '{shown[:64]}' is not valid UTF-8")


def show_what_cannot_be_shown() -> None:
    """What the terminal's encoding lacks is written as an escape from here on, as Python does on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def accept_any_bytes() -> None:
    """What is no text on stdin becomes lone surrogates from here on, for `is_text` to find."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
