"""What the ranks of one stage do together: sums and gathers of tensors, over a link between each two of them.

Every rank gets every other's part and adds them in the order of ranks, in float32, so that all have the same
bits, run after run. A rank that loses another gives the step up and tells the rest, which would else wait for
it: one rank's death is the stage's, and nobody is left in a sum that never ends.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from r1_cluster.comm.links import Link, recv_epoch
from r1_cluster.comm.wire import Flags, Header, Kind, LinkError, Message, StaleEpoch, Unsendable, WireError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

AT_ONCE_BYTES = 1 << 16
"""A message of so many bytes fits what sockets buffer: all send, and only then receive. With longer ones each
two ranks take turns, the lower one sends first, pair after pair in the order of ranks: nobody waits in a
circle."""


class RanksLost(Exception):
    """A step was given up because of other ranks; `names` are those that are gone or silent, none where this
    rank itself was behind."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"ranks of this stage were lost: {', '.join(names)}")
        self.names = list(names)


class RankGroup:
    """The ranks `names` of a stage as the one at `rank` sees them; among `links` are those to its peers, by
    name. `timeout_s` is how long a rank may keep the others waiting. `idle_s` grows by the time that is spent
    here."""

    def __init__(self, names: Sequence[str], rank: int, links: Mapping[str, Link], timeout_s: float) -> None:
        self.rank = rank
        self.idle_s = 0.0
        self._names = list(names)
        self._links = links
        self._timeout_s = timeout_s
        self._early: defaultdict[str, deque[Message]] = defaultdict(deque)
        self._header = Header(Kind.REDUCE)

    @property
    def _peers(self) -> list[str]:
        return [name for name in self._names if name != self._names[self.rank]]

    def begin(self, epoch: int, step: int, micro_batch: int) -> None:
        """What follows belongs to this step. Within an epoch, steps go up."""
        self._header = Header(Kind.REDUCE, epoch, step, 0, micro_batch)

    def deliver(self, peer: str, message: Message) -> None:
        """A REDUCE message that came before this rank asked for it."""
        self._early[peer].append(message)

    def add(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in its dtype. Raises RanksLost, Unsendable."""
        began = time.perf_counter()
        parts = {self._names[self.rank]: x} | self._exchange(x)
        first, second, *others = (parts[name] for name in self._names)
        total = first.float() + second.float()
        for part in others:
            total += part
        self.idle_s += time.perf_counter() - began
        return total.to(x.dtype)

    def gather(self, x: Tensor) -> list[Tensor]:
        """All ranks' `x`, in the order of ranks, on the first of them; nothing on the others. Raises
        RanksLost, Unsendable."""
        began = time.perf_counter()
        header = self._next(x)
        parts: list[Tensor] = []
        if self.rank:
            self._send(self._names[0], header, x)
        else:
            deadline = time.monotonic() + self._timeout_s
            parts = [x, *(self._receive(peer, header, x, deadline) for peer in self._peers)]
        self.idle_s += time.perf_counter() - began
        return parts

    def _exchange(self, x: Tensor) -> dict[str, Tensor]:
        header = self._next(x)
        deadline = time.monotonic() + self._timeout_s
        if x.nbytes <= AT_ONCE_BYTES:
            for peer in self._peers:
                self._send(peer, header, x)
            return {peer: self._receive(peer, header, x, deadline) for peer in self._peers}
        parts = {}
        for other, peer in enumerate(self._names):
            if other < self.rank:
                parts[peer] = self._receive(peer, header, x, deadline)
                self._send(peer, header, x)
            elif other > self.rank:
                self._send(peer, header, x)
                parts[peer] = self._receive(peer, header, x, deadline)
        return parts

    def _next(self, x: Tensor) -> Header:
        header = self._header._replace(rows=len(x))
        self._header = self._header._replace(layer=self._header.layer + 1)
        return header

    def _send(self, peer: str, header: Header, x: Tensor) -> None:
        link = self._links.get(peer)
        if link is None:
            self._give_up([peer])
        try:
            link.send(header, [x.to(link.device)])
        except Unsendable:
            raise
        except LinkError as error:
            self._lose(link, error)

    def _receive(self, peer: str, header: Header, x: Tensor, deadline: float) -> Tensor:
        """A peer's part; its columns may be others than x's."""
        link = self._links.get(peer)
        if link is None:
            self._give_up([peer])
        try:
            message = self._message(link, header, deadline)
            found = message.header
            if found.flags & Flags.TAINTED:
                raise RanksLost(message.body.decode(errors="replace").split("\n") if message.body else [])
            if found != header or len(message.tensors) != 1:
                raise WireError(f"{peer} sent {found} where {header} was due")
            (part,) = message.tensors
            if part.dtype != x.dtype or part.ndim != x.ndim or len(part) != len(x):
                raise WireError(
                    f"{peer} sent {part.dtype} {list(part.shape)}, {x.dtype} {list(x.shape)} was due"
                )
            return part.to(x.device)
        except StaleEpoch:  # whoever was linked anew has given this step up
            raise RanksLost([]) from None
        except LinkError as error:
            self._lose(link, error)

    def _message(self, link: Link, header: Header, deadline: float) -> Message:
        """The next message that belongs to this step or to none before it."""
        early = self._early[link.peer]
        while True:
            if early:
                message = early.popleft()
                if message.header.epoch > header.epoch:
                    raise StaleEpoch(f"{link.peer} is at epoch {message.header.epoch}")
            else:
                message = recv_epoch(link, header.epoch, max(deadline - time.monotonic(), 0.0))
            if message.header.epoch == header.epoch and message.header.step >= header.step:
                return message

    def _lose(self, link: Link, error: LinkError) -> NoReturn:
        # As text: see `LinkDispatcher`.
        logger.warning("lost rank %s: %s", link.peer, str(error))
        link.close()
        self._give_up([link.peer])

    def _give_up(self, names: list[str]) -> NoReturn:
        header = self._header._replace(rows=0, flags=Flags.TAINTED)
        for peer in self._peers:
            link = self._links.get(peer)
            if link is not None and peer not in names:
                with suppress(LinkError):  # it will be noticed when something is due from it
                    link.send(header, (), "\n".join(names).encode())
        raise RanksLost(names)
