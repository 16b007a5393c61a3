"""The engine's side of its workers: who they are, and the control links to them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.listener import Endpoint
from r1_cluster.comm.wire import (
    Flags,
    Header,
    Kind,
    LinkError,
    Message,
    Unsendable,
    WireError,
    pack,
    unpack,
    unpack_seconds,
)
from r1_cluster.engine.boot import Ready, Topology
from r1_cluster.engine.held import common
from r1_cluster.planning.layout import Layout
from r1_cluster.records import HeldSequence, StepPlan, StepResult

RENEW_S = 0.5
LINK_SLACK_S = 2.0
"""How much longer than a step may last a worker may take to answer a topology: the handshakes."""


class WorkerLost(Exception):
    """Workers are gone, or (`accused`) so say their peers; `names` are theirs."""

    def __init__(self, names: Iterable[str], why: str, *, accused: bool = False) -> None:
        super().__init__(why)
        self.names = tuple(names)
        self.accused = accused


class EngineFailed(Exception):
    """The engine cannot go on; the text is why."""


class Deposed(Exception):
    """Another engine is in charge of the workers."""


@dataclass(frozen=True)
class Member:
    """A worker as its engine knows it: the control link, where it listens, which incarnation it is, how long
    its process took to start and load."""

    link: TcpLink
    endpoint: Endpoint
    incarnation: str
    start_s: float = 0.0


class Pipeline:
    """The engine's control links to its workers; plans go to the first stage of each data rank, results come
    from the last one (or from one that could not pass its part on).

    `epoch` grows with every change among the workers; what comes under an older one is dropped.

    A message that is Unsendable, here or between workers, is nobody's death: doing it again with another
    worker would give the same. EngineFailed says so.
    """

    def __init__(self, layout: Layout, members: dict[str, Member], epoch: int, step_timeout_s: float) -> None:
        """`members` are all workers of the layout that live, and the spares."""
        self.layout = layout
        self.members = members
        self.epoch = epoch
        self.stale_dropped = 0
        self.kv_eras = [epoch] * len(layout.first_stages)  # see `Topology`
        self.assigned: set[str] = set()  # spares that are loading what a lost worker hosted
        self.on_busy: Callable[[str, float], None] = lambda name, busy_s: None  # told with every heartbeat
        self.answer_timeout_s = step_timeout_s + LINK_SLACK_S
        self._unanswered: dict[str, int] = {}
        self._first = [[rank.name for rank in ranks] for ranks in layout.first_stages]

    @property
    def spares(self) -> list[str]:
        """Members that wait for a role."""
        return [spare.name for spare in self.layout.spares if spare.name in self.members]

    def link(self, epoch: int, *, read_back: bool = False) -> list[dict[str, HeldSequence]]:
        """Tells every worker where the others are, under a new epoch; returns what each data rank's first
        stage holds.

        Stages first, then routers, then experts: a stage answers when it is between steps, so that when
        routers and experts come to the new epoch, nobody waits for them under the old one. The last stage is
        the first: it opens no link to a stage that is itself about to open one, and so on. Workers that are
        missing, or still loading, are left out. Raises WorkerLost, EngineFailed.
        """
        self.epoch = epoch
        there = {name: member for name, member in self.members.items() if name not in self.assigned}
        topology = Topology(
            epoch,
            {name: member.endpoint for name, member in there.items()},
            {name: member.incarnation for name, member in there.items()},
            self.kv_eras,
            read_back,
        )
        held: dict[str, dict[str, HeldSequence]] = {}
        # Of ranks the last comes first, for the same reason.
        stages = [[rank.name] for stage in reversed(self.layout.stages) for rank in reversed(stage)]
        others = [
            [w.name for w in self.layout.workers if w.roles[0] == role] for role in ("router", "experts")
        ]
        for group in (*stages, *others):
            names = [name for name in group if name in there]
            for name in names:
                self._send(name, Header(Kind.CONTROL, epoch), pack(topology))
            for name in names:
                ready = self._await_ready(name)
                if ready.unreachable:
                    peers = ", ".join(ready.unreachable)
                    raise WorkerLost(ready.unreachable, f"{name} cannot reach {peers}", accused=True)
                held[name] = ready.held
        return [common([held[name] for name in names if name in held]) for names in self._first]

    def send(self, plan: StepPlan) -> None:
        """Sends a plan to all ranks of its data rank's first stage; raises WorkerLost, EngineFailed."""
        header, body = Header(Kind.PLAN, plan.epoch, plan.step, -1, plan.micro_batch), pack(plan)
        for name in self._first[plan.data_rank]:
            self._send(name, header, body)

    def heartbeat(self) -> None:
        """Renews every worker's lease; raises WorkerLost."""
        for name in list(self.members):
            self._unanswered[name] = self._unanswered.get(name, 0) + 1
            self._send(name, Header(Kind.HEARTBEAT, self.epoch), b"")

    def silent(self, num_heartbeats: int) -> list[str]:
        """Members from which nothing came for so many heartbeats, but for those that are loading. Counted,
        not timed, so that an engine that slept itself does not take its workers for dead."""
        members = self.members.keys() - self.assigned
        return sorted(name for name in members if self._unanswered.get(name, 0) > num_heartbeats)

    def probe(self, names: Iterable[str], timeout_s: float) -> list[str]:
        """Those of `names` that are gone or do not answer a heartbeat in time, be it that they hang in a
        step. Results that come meanwhile are dropped: whoever probes has given up the step."""
        asked = [name for name in names if name in self.members]
        silent = set(asked)
        waiting = {}
        for name in asked:
            try:
                self._send(name, Header(Kind.HEARTBEAT, self.epoch), b"")
                waiting[self.members[name].link] = name
            except WorkerLost:
                continue
        deadline = time.monotonic() + timeout_s
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for link in wait_any(list(waiting), left_s):
                try:
                    message = link.recv(1.0)
                    self._take_note(link, message)
                except LinkError:
                    del waiting[link]
                    continue
                if message.header.kind == Kind.HEARTBEAT:
                    silent.discard(waiting.pop(link))
        return sorted(silent)

    def assign(self, spare: str, name: str) -> None:
        """Gives a lost worker's place to a spare, which is `assigned` until `receive` says that it has
        loaded. Raises WorkerLost, of `name`, if the spare is gone as well."""
        member = self.members.pop(spare)
        member.link.peer = name
        self.members[name] = member
        self._unanswered.pop(name, None)
        self.assigned.add(name)
        self._send(name, Header(Kind.ASSIGN, self.epoch), pack(name))

    def receive(self, link: TcpLink) -> StepResult | None:
        """What a worker sent; None but for a result that is up to date. Raises WorkerLost, Deposed,
        EngineFailed."""
        member = self.members.get(link.peer)
        if member is None or member.link is not link:
            return None  # lost meanwhile
        try:
            message = link.recv(1.0)
            self._take_note(link, message)
        except LinkError as error:
            raise WorkerLost([link.peer], str(error)) from None
        if message.header.kind != Kind.RESULT:
            return None
        if message.header.epoch != self.epoch:
            self.stale_dropped += 1
            return None
        try:
            return unpack(message.body, StepResult)
        except WireError as error:
            raise WorkerLost([link.peer], str(error)) from None

    def _take_note(self, link: TcpLink, message: Message) -> None:
        self._unanswered.pop(link.peer, None)
        kind = message.header.kind
        if kind == Kind.DEPOSED:
            raise Deposed(f"an engine of epoch {message.header.epoch} has taken over")
        if kind == Kind.ASSIGN:
            self.assigned.discard(link.peer)
        if kind == Kind.HEARTBEAT:
            self.on_busy(link.peer, unpack_seconds(message.body))
        if message.header.flags & Flags.REFUSED and message.header.epoch == self.epoch:
            raise EngineFailed(f"{link.peer}: {message.body.decode(errors='replace')}")

    def drop(self, name: str) -> None:
        """Closes the link to a worker that is lost."""
        member = self.members.pop(name, None)
        self._unanswered.pop(name, None)
        self.assigned.discard(name)
        if member is not None:
            member.link.close()

    def close(self) -> None:
        """Closes the control links; the workers' lease starts to run out."""
        for member in self.members.values():
            member.link.close()

    def _await_ready(self, name: str) -> Ready:
        deadline = time.monotonic() + self.answer_timeout_s
        try:
            while True:
                if not wait_any([self.members[name].link], RENEW_S) and time.monotonic() < deadline:
                    self._renew_leases()
                    continue
                message = self.members[name].link.recv(0)
                self._take_note(self.members[name].link, message)
                if message.header.kind == Kind.CONTROL and message.header.epoch == self.epoch:
                    return unpack(message.body, Ready)
        except LinkError as error:
            raise WorkerLost([name], str(error)) from None

    def _renew_leases(self) -> None:
        """While one worker is waited for, the others must not take their engine for dead."""
        for member in self.members.values():
            with contextlib.suppress(LinkError):  # noticed when its turn comes
                member.link.send(Header(Kind.HEARTBEAT, self.epoch))

    def _send(self, name: str, header: Header, body: bytes) -> None:
        try:
            self.members[name].link.send(header, (), body)
        except Unsendable as error:
            raise EngineFailed(f"what {name} is to be told does not fit a message: {error}") from None
        except LinkError as error:
            raise WorkerLost([name], str(error)) from None
