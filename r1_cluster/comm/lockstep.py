"""Workers that go through a step side by side, with a link between each two of them.

Each knows what it must get from every other one, and when. One that loses another gives the step up and tells
the rest, which would else wait for it: one's death is all's, and nobody is left in a step that never ends.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

from r1_cluster.comm.links import Link, recv_epoch, stay_awake
from r1_cluster.comm.wire import (
    AT_ONCE_BYTES,
    Flags,
    Header,
    Kind,
    LinkError,
    Message,
    StaleEpoch,
    Unsendable,
    WireError,
)

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PeersLost(Exception):
    """A step was given up because of others; `names` are those that are gone or silent, none where this
    worker itself was behind."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"lost in a step that is computed together: {', '.join(names)}")
        self.names = list(names)


class Outgoing(NamedTuple):
    """What one peer is sent: rows of a tensor, None for none, and a body."""

    rows: Tensor | None
    body: bytes = b""


class Lockstep:
    """The workers `names` as the one at `place` among them sees them; among `links` are those to the others,
    by name. `timeout_s` is how long a step may take in all. `idle_s` grows by the time that is spent
    here and in which no operator of the model runs."""

    def __init__(
        self, kind: Kind, names: Sequence[str], place: int, links: Mapping[str, Link], timeout_s: float
    ) -> None:
        """`kind` is that of the message which tells that a step was given up."""
        self.place = place
        self.idle_s = 0.0
        self._names = list(names)
        self._links = links
        self._timeout_s = timeout_s
        self._early: defaultdict[str, deque[Message]] = defaultdict(deque)
        self._header = Header(kind)
        self._began_at = time.monotonic()

    @property
    def waited_s(self) -> float:
        """The same: nothing that others compute is subtracted."""
        return self.idle_s

    @property
    def lost(self) -> list[str]:
        """Those whose links have been closed meanwhile. Over a device's links a payload may still be lost
        after it was announced: see `Router.take_lost`."""
        links = ((peer, self._links.get(peer)) for peer in self.peers)
        return [peer for peer, link in links if link is None or link.closed]

    @property
    def peers(self) -> list[str]:
        """The names of the others."""
        return [name for name in self._names if name != self._names[self.place]]

    def begin(self, epoch: int, step: int, micro_batch: int) -> None:
        """What follows belongs to this step, whose time begins. Within an epoch, steps go up."""
        if (epoch, step) != (self._header.epoch, self._header.step):
            self._began_at = time.monotonic()
        self._header = Header(self._header.kind, epoch, step, 0, micro_batch)

    def deliver(self, peer: str, message: Message) -> None:
        """A message that came before this worker asked for it."""
        self._early[peer].append(message)

    def give_up(self, names: Sequence[str]) -> None:
        """Tells the others that this step ends without a result, because of whom."""
        header = self._header._replace(layer=-1, rows=0, flags=Flags.TAINTED)
        for peer in self.peers:
            link = self._links.get(peer)
            if link is not None and peer not in names:
                with suppress(LinkError):  # it will be noticed when something is due from it
                    link.send(header, (), "\n".join(names).encode())

    def _swap(
        self, header: Header, messages: Mapping[str, Outgoing], receive: Callable[[str], T]
    ) -> dict[str, T]:
        """Sends each peer its message, and takes what it sends. Raises PeersLost, Unsendable.

        Whoever has short messages alone sends all, and only then receives. With longer ones each two take
        turns, the lower one sends first, pair after pair in the order of the names: there is always a least
        pair that both have come to, so nobody waits in a circle.
        """
        if self._sent_at_once(header, messages):
            return {peer: receive(peer) for peer in messages}
        taken = {}
        for other, peer in enumerate(self._names):
            if other < self.place:
                taken[peer] = receive(peer)
                self._send(peer, header, messages[peer])
            elif other > self.place:
                self._send(peer, header, messages[peer])
                taken[peer] = receive(peer)
        return taken

    def _sent_at_once(self, header: Header, messages: Mapping[str, Outgoing]) -> bool:
        """Sends all of them, if all are so short that nobody need receive meanwhile."""
        if any(m.rows is not None and m.rows.nbytes > AT_ONCE_BYTES for m in messages.values()):
            return False
        for peer, message in messages.items():
            self._send(peer, header, message)
        return True

    def _send(self, peer: str, header: Header, message: Outgoing) -> None:
        """Raises PeersLost, Unsendable."""
        link = self._links.get(peer)
        if link is None:
            self._lose(peer, None, "there is no link to it")
        tensors = [] if message.rows is None else [message.rows.to(link.device)]
        try:
            link.send(header._replace(rows=len(tensors and tensors[0])), tensors, message.body)
        except Unsendable:
            raise
        except LinkError as error:
            self._lose(peer, link, str(error))

    @property
    def _deadline(self) -> float:
        """When this step's time is over; what is there already may still be taken."""
        return self._began_at + self._timeout_s

    def _receive(self, peer: str, due: Header) -> Message:
        """A peer's next message: it is what was `due`, but for the number of rows. Raises PeersLost."""
        link = self._links.get(peer)
        if link is None:
            self._lose(peer, None, "there is no link to it")
        try:
            message = self._message(link, due)
            header = message.header
            if header.flags & Flags.TAINTED:
                raise PeersLost(message.body.decode(errors="replace").split("\n") if message.body else [])
            if header._replace(rows=due.rows) != due:
                raise WireError(f"{peer} sent {header} where {due} was due")
            return message
        except StaleEpoch:  # whoever was linked anew has given this step up
            raise PeersLost([]) from None
        except LinkError as error:
            self._lose(peer, link, str(error))

    def _message(self, link: Link, due: Header) -> Message:
        """The next message that belongs to this step or to none before it."""
        early = self._early[link.peer]
        while True:
            if early:
                message = early.popleft()
                if message.header.epoch > due.epoch:
                    raise StaleEpoch(f"{link.peer} is at epoch {message.header.epoch}")
            else:
                stay_awake(link)
                message = recv_epoch(link, due.epoch, max(self._deadline - time.monotonic(), 0.0))
            if message.header.epoch == due.epoch and message.header.step >= due.step:
                return message

    def _refuse(self, peer: str, why: str) -> NoReturn:
        """What a peer sent cannot be used: it is lost."""
        self._lose(peer, self._links.get(peer), why)

    def _lose(self, peer: str, link: Link | None, why: str) -> NoReturn:
        # As text: see `LinkDispatcher`.
        logger.warning("lost %s in a step that is computed together: %s", peer, why)
        if link is not None:
            link.close()
        self.give_up([peer])
        raise PeersLost([peer])
