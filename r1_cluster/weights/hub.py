"""What the hub said of a file when it was downloaded: its hash, where huggingface_hub has left one.

A large file's etag is its SHA-256, a small one's is git's SHA-1 of it. A cache keeps files as links to
blobs/ETAG; a folder of one's own has .cache/huggingface/download/FILE.metadata, whose second line is the
etag (huggingface_hub: file_download.py, _local_folder.py).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hashlib import _Hash


class Published(NamedTuple):
    """A file's hash as the hub has it: "sha256", or "git" for git's SHA-1."""

    kind: str
    value: str

    def begin(self, num_bytes: int) -> _Hash:
        """A hash to feed the file's bytes to; its hexdigest is to be `value`."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)


def downloads(folder: Path) -> Path:
    """Where a folder of one's own keeps what is said of its files, and those that are under way."""
    return folder / ".cache" / "huggingface" / "download"


def metadata_of(path: Path) -> Path:
    """Where it is said what the hub said of a file in a folder of one's own."""
    return downloads(path.parent) / f"{path.name}.metadata"


def published(path: Path) -> Published | None:
    """The hash that the hub has for a file, None where it has left nothing that says so."""
    if path.is_symlink() and path.resolve().parent.name == "blobs":
        return from_etag(path.resolve().name)
    try:
        lines = metadata_of(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return from_etag(lines[1].strip().strip('"')) if len(lines) > 1 else None


def from_etag(etag: str) -> Published | None:
    """None for what is neither of the two hashes."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        return Published("sha256", etag)
    return Published("git", etag) if re.fullmatch("[0-9a-f]{40}", etag) else None
