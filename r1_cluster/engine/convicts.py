"""Requests in whose steps workers died again and again: what they were, for a while, so that they are refused
when they come again.

A client repeats what failed, and each repetition would cost two starts of a worker before it is found out.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections import OrderedDict

from r1_cluster.records import Request

REMEMBERED_S = 300.0
MAX_REMEMBERED = 1024


class Convicts:
    """The fingerprints of convicted requests. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def convict(self, request: Request) -> None:
        """Remembers a request for `REMEMBERED_S`; of more than `MAX_REMEMBERED` the oldest is forgotten."""
        fingerprint = _fingerprint(request)
        with self._lock:
            self._until[fingerprint] = time.monotonic() + REMEMBERED_S
            self._until.move_to_end(fingerprint)
            if len(self._until) > MAX_REMEMBERED:
                self._until.popitem(last=False)

    def __contains__(self, request: Request) -> bool:
        now = time.monotonic()
        with self._lock:
            while self._until and next(iter(self._until.values())) < now:
                self._until.popitem(last=False)
            return bool(self._until) and _fingerprint(request) in self._until


def _fingerprint(request: Request) -> bytes:
    """Of the prompt and how it is sampled, but for the seed: the ingress draws one for each repetition."""
    sampling = request.sampling
    how = repr((sampling.temperature, sampling.top_p, sampling.top_k))
    return hashlib.blake2b(how.encode() + array("i", request.prompt).tobytes(), digest_size=16).digest()
