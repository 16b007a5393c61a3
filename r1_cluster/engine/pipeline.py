"""The engine's side of its workers: who they are, and the control links to them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.listener import Endpoint
from r1_cluster.comm.wire import Header, Kind, LinkError, pack, unpack
from r1_cluster.engine.boot import Ready, Topology
from r1_cluster.planning.layout import Layout
from r1_cluster.records import HeldSequence, StepPlan, StepResult

LINK_TIMEOUT_S = 30.0
"""How long a worker may take to answer a topology: the longest step and the handshakes."""


class WorkerLost(Exception):
    """Workers are gone; `names` are theirs."""

    def __init__(self, names: Iterable[str], why: str) -> None:
        super().__init__(why)
        self.names = tuple(names)


@dataclass(frozen=True)
class Member:
    """A worker as its engine knows it: the control link, where it listens, which incarnation it is."""

    link: TcpLink
    endpoint: Endpoint
    incarnation: str


class Pipeline:
    """The engine's control links to its workers; plans go to the first stage, results come from the last
    one (or from one that could not pass its part on).

    `epoch` grows with every change among the workers; what comes under an older one is dropped.
    """

    def __init__(self, layout: Layout, members: dict[str, Member], epoch: int) -> None:
        self.layout = layout
        self.members = members
        self.epoch = epoch
        self.stale_dropped = 0
        self._first = layout.stages[0].name
        self._results = msgspec.msgpack.Decoder(StepResult)

    def link(self, epoch: int, *, read_back: bool = False) -> dict[str, HeldSequence]:
        """Tells every worker where the others are, under a new epoch; returns what the first stage holds.

        Stages first, then routers, then experts: a stage answers when it is between steps, so that when
        routers and experts come to the new epoch, nobody waits for them under the old one. Raises WorkerLost.
        """
        self.epoch = epoch
        topology = Topology(
            epoch,
            {name: member.endpoint for name, member in self.members.items()},
            {name: member.incarnation for name, member in self.members.items()},
            read_back,
        )
        held: dict[str, HeldSequence] = {}
        for role in ("stage", "router", "experts"):
            names = [worker.name for worker in self.layout.workers if worker.roles[0] == role]
            for name in names:
                self._send(name, Header(Kind.CONTROL, epoch), pack(topology))
            for name in names:
                ready = self._await_ready(name)
                if ready.unreachable:
                    raise WorkerLost(ready.unreachable, f"{name} cannot reach {', '.join(ready.unreachable)}")
                held |= ready.held
        return held

    def send(self, plan: StepPlan) -> None:
        """Sends a plan to the first stage; raises WorkerLost."""
        self._send(self._first, Header(Kind.PLAN, plan.epoch, plan.step, -1, plan.micro_batch), pack(plan))

    def heartbeat(self) -> None:
        """Renews every worker's lease; raises WorkerLost."""
        for name in self.members:
            self._send(name, Header(Kind.HEARTBEAT, self.epoch), b"")

    def silent(self, timeout_s: float) -> list[str]:
        """The workers that do not answer a heartbeat in time, be it that they hang in a step."""
        self.heartbeat()
        deadline = time.monotonic() + timeout_s
        waiting = {member.link: name for name, member in self.members.items()}
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for link in wait_any(list(waiting), left_s):
                try:
                    answered = link.recv(1.0).header.kind == Kind.HEARTBEAT
                except LinkError:
                    continue  # gone: it stays among the silent
                if answered:
                    del waiting[link]
        return list(waiting.values())

    def receive(self, link: TcpLink) -> StepResult | None:
        """What a worker sent; None for an answered heartbeat or what is out of date. Raises WorkerLost."""
        try:
            message = link.recv(1.0)
        except LinkError as error:
            raise WorkerLost([link.peer], str(error)) from None
        if message.header.kind != Kind.RESULT:
            return None
        if message.header.epoch != self.epoch:
            self.stale_dropped += 1
            return None
        return self._results.decode(message.body)

    def drop(self, name: str) -> None:
        """Closes the link to a worker that is lost."""
        member = self.members.pop(name, None)
        if member is not None:
            member.link.close()

    def close(self) -> None:
        """Closes the control links; the workers' lease starts to run out."""
        for member in self.members.values():
            member.link.close()

    def _await_ready(self, name: str) -> Ready:
        try:
            while True:
                message = self.members[name].link.recv(LINK_TIMEOUT_S)
                if message.header.kind == Kind.CONTROL and message.header.epoch == self.epoch:
                    return unpack(message.body, Ready)
        except LinkError as error:
            raise WorkerLost([name], str(error)) from None

    def _send(self, name: str, header: Header, body: bytes) -> None:
        try:
            self.members[name].link.send(header, (), body)
        except LinkError as error:
            raise WorkerLost([name], str(error)) from None
