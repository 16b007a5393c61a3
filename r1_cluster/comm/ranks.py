"""What the ranks of one stage do together: sums and gathers of tensors.

Every rank gets every other's part and adds them in the order of ranks, in float32, so that all have the same
bits, run after run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from r1_cluster.comm.links import Link
from r1_cluster.comm.lockstep import Lockstep, Outgoing
from r1_cluster.comm.wire import Header, Kind

if TYPE_CHECKING:
    from torch import Tensor


class RankGroup(Lockstep):
    """The ranks `names` of a stage as the one at `rank` sees them: see `Lockstep`."""

    def __init__(self, names: Sequence[str], rank: int, links: Mapping[str, Link], timeout_s: float) -> None:
        super().__init__(Kind.REDUCE, names, rank, links, timeout_s)

    def add(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in its dtype. Raises PeersLost, Unsendable."""
        began = time.perf_counter()
        header = self._next(x)
        messages = {peer: Outgoing(x) for peer in self.peers}
        parts = self._swap(header, messages, lambda peer: self._part(peer, header, x))
        parts[self._names[self.place]] = x
        first, second, *others = (parts[name] for name in self._names)
        total = first.float() + second.float()
        for part in others:
            total += part
        self.idle_s += time.perf_counter() - began
        return total.to(x.dtype)

    def gather(self, x: Tensor) -> list[Tensor]:
        """All ranks' `x`, in the order of ranks, on the first of them; nothing on the others. Raises
        PeersLost, Unsendable."""
        began = time.perf_counter()
        header = self._next(x)
        parts: list[Tensor] = []
        if self.place:
            self._send(self._names[0], header, Outgoing(x))
        else:
            parts = [x, *(self._part(peer, header, x) for peer in self.peers)]
        self.idle_s += time.perf_counter() - began
        return parts

    def _next(self, x: Tensor) -> Header:
        header = self._header._replace(rows=len(x))
        self._header = self._header._replace(layer=self._header.layer + 1)
        return header

    def _part(self, peer: str, header: Header, x: Tensor) -> Tensor:
        """A peer's part; its columns may be others than x's."""
        tensors = self._receive(peer, header).tensors
        if len(tensors) != 1:
            self._refuse(peer, f"{len(tensors)} tensors came where one was due")
        (part,) = tensors
        if part.dtype != x.dtype or part.ndim != x.ndim or len(part) != len(x):
            self._refuse(
                peer, f"{part.dtype} {list(part.shape)} came where {x.dtype} {list(x.shape)} was due"
            )
        return part.to(x.device)
