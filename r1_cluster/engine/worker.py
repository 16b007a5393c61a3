"""A worker: the process that hosts roles, and the resident loop that feeds them.

The loop waits for whatever comes first: a plan from the engine, hidden states from the stage before, a
MoE request from a stage, dispatched rows from a router, a new link. It computes, passes on, and waits
again; Ray has no part in it. A worker holds a lease on its engine: it ends by itself when no engine has
spoken to it for `lease_s`. A spare is a worker without a role that waits in the same loop until it is
assigned one.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from typing import cast

import msgspec
import torch

from r1_cluster.comm.dispatch import handle
from r1_cluster.comm.links import Link, Pollable, TcpLink, wait_any
from r1_cluster.comm.listener import Listener
from r1_cluster.comm.lockstep import PeersLost
from r1_cluster.comm.wakeup import Wakeup
from r1_cluster.comm.wire import (
    Flags,
    Header,
    Kind,
    LinkError,
    LinkTimeout,
    Message,
    Unsendable,
    WireError,
    only_tensor,
    pack,
    pack_seconds,
    unpack,
)
from r1_cluster.engine.boot import ENGINE, Ready, Topology, WorkerBoot
from r1_cluster.engine.held import HeldSequences
from r1_cluster.engine.loading import load_roles
from r1_cluster.engine.peers import Peers
from r1_cluster.engine.roles import RemoteRouter, RouterRole, StageRole
from r1_cluster.engine.turns import Turn, Turns
from r1_cluster.models.moe import ExpertModel
from r1_cluster.planning.layout import Layout, WorkerSpec
from r1_cluster.records import StepPlan, StepResult

logger = logging.getLogger(__name__)

ACCEPT_S = 0.25
"""How long a step waits for a link that was opened; one of a peer that has died since never comes."""
FIRST_LEASE_S = 3600.0
"""How long a worker waits for its first engine, which links nobody before all have loaded their weights."""
_STEP_KINDS = frozenset({Kind.PLAN, Kind.HIDDEN, Kind.MOE, Kind.MOE_RESULT, Kind.DISPATCH, Kind.BROADCAST})


class Hidden(msgspec.Struct, frozen=True, array_like=True):
    """Travels with the hidden states from stage to stage."""

    plan: StepPlan
    compute_s: float


class Worker:
    """Hosts the roles that `boot.workers` gives to `boot.name`; none, for now, if it is not among them."""

    layout: Layout  # where it hosts any

    def __init__(self, boot: WorkerBoot) -> None:
        torch.set_num_threads(boot.threads)
        self.boot = boot
        self.epoch = 0
        self.office = 0  # the epoch under which the engine in charge introduced itself
        self.num_steps = 0
        self.stale_dropped = 0
        self.busy_s = 0.0  # with steps, but for what they waited for others
        self._stopping = False
        self._control: TcpLink | None = None
        self._links: dict[str, Link] = {}
        self.assign(boot.name)
        self._wakeup = Wakeup()
        self.listener = Listener(boot.name, boot.secret, boot.host, boot.link_ports)
        self.peers = Peers(boot, self._links, self.listener.address.host)

    def assign(self, name: str) -> None:
        """Takes the place called `name` and loads what belongs to it; `loaded` is False meanwhile."""
        self.loaded = False
        self.spec = next((w for w in self.boot.workers if w.name == name), WorkerSpec(name))
        self.experts: ExpertModel | None = None
        self._copies: tuple[ExpertModel, ...] = ()
        self.router: RouterRole | None = None
        self.stage: StageRole | None = None
        self.turns: Turns | None = None
        self.kv_era = 0
        self.held = HeldSequences()
        started = time.monotonic()
        self.read_bytes, self.read_s = 0, 0.0
        if self.spec.roles:
            loaded = load_roles(self.boot, self.spec, self._links)
            self.layout, self.router, self.stage = loaded.layout, loaded.router, loaded.stage
            self.experts, self._copies = loaded.experts, loaded.copies
            self.read_bytes, self.read_s = loaded.read_bytes, loaded.read_s
            # Ranks add up in lock-step; the router of one's own process is a call.
            if self.spec.ranks == 1 and self.stage is not None and isinstance(self.stage.moe, RemoteRouter):
                self.turns = Turns(self.stage.moe, self._end_step, self._refuse_step)
        self.load_s = time.monotonic() - started
        if self.read_bytes:
            read = self.read_bytes / 1e9
            logger.info("%s: %.2f GB read in %.1f s, %.2f GB/s", name, read, self.read_s, read / self.read_s)
        self.loaded = True

    @torch.inference_mode()
    def run(self) -> None:
        """The resident loop; returns when the worker was stopped or its lease ended.

        A living engine sends heartbeats, so a worker to which nobody spoke for `lease_s` has none, once it
        had one. Time spent in a step does not count: what came meanwhile is read before the lease is judged.
        """
        try:
            while not self._stopping:
                sources: list[Pollable] = [self._wakeup, self.listener, *self._links.values()]
                if self._control is not None:
                    sources.append(self._control)
                lease_s = self.boot.lease_s if self.office else FIRST_LEASE_S
                patience_s = math.inf
                if self.turns is not None:
                    patience_s = max(self.turns.deadline - time.monotonic(), 0.0)
                ready = wait_any(sources, min(lease_s, patience_s))
                if not ready and lease_s <= patience_s:
                    return
                now = time.monotonic()
                for source in ready:
                    if source is self.listener:
                        self._accept()
                    elif source is not self._wakeup:
                        self._receive(cast(Link, source))
                # Of what was asked before this wait: an answer that was there has been read.
                if self.turns is not None and self.turns.deadline <= now:
                    self.turns.lose()
        finally:
            self.close()

    def stop(self) -> None:
        """Ends the loop from another thread."""
        self._stopping = True
        self._wakeup.set()

    def close(self) -> None:
        """Closes every link; peers notice at once."""
        self.listener.close()
        self._wakeup.close()
        if self._control is not None:
            self._control.close()
        self.peers.close()
        # Their memory and descriptors go now, not when the circle of a worker and its links is collected.
        self.turns = self.stage = self.router = self.experts = None
        self._copies = ()

    def _take_links(self) -> None:
        """A plan may be faster than the links that peers have opened for it: they stand when the engine hears
        so from those who opened them."""
        until = time.monotonic() + ACCEPT_S
        with suppress(LinkTimeout):
            while self.peers.awaited:
                self._accept(max(until - time.monotonic(), 0.0))

    def _accept(self, timeout_s: float = 0.0) -> None:
        hello, link = self.listener.accept(timeout_s)
        if hello.purpose != "control":
            with suppress(LinkError):  # whoever opened it says so to the engine
                self.peers.accept(hello, link)
        elif hello.epoch <= max(self.office, self.epoch):
            link.close()  # an engine that was deposed, or that does not know yet who is in office
        else:
            if self._control is not None:
                # Should the former engine only have slept, it must not take this for our death.
                self._reply(self._control, Header(Kind.DEPOSED, hello.epoch), [], b"")
                self._control.close()
            self._control = link
            self.peers.count(ENGINE, link)
            self.office = hello.epoch

    @property
    def waited_s(self) -> float:
        """For how long this worker's stage or router, since it has it, waited for others within steps."""
        role = self.stage or self.router
        return 0.0 if role is None else role.waited_s

    def _receive(self, link: Link) -> None:
        try:
            message = link.recv(self.boot.step_timeout_s)
        except LinkError:
            link.close()
            if link is self._control:
                self._control = None
            else:
                self.peers.drop(link)
                if self.turns is not None and self.turns.router.name not in self._links:
                    self.turns.lose()
            return
        if message.header.kind == Kind.HEARTBEAT:
            # Of any epoch: it is the engine's life that counts.
            self._reply(link, message.header, [], pack_seconds(self.busy_s))
        elif message.header.epoch < self.epoch:
            self.stale_dropped += 1
        else:
            began, waited_s = time.perf_counter(), self.waited_s
            try:
                self._handle(link, message)
            except WireError as error:  # as if it had come in pieces: whoever waits for an answer sees it
                logger.warning("%s sent what is no message of ours: %s", link.peer, error)
                link.close()
            if message.header.kind in _STEP_KINDS:
                self.busy_s += time.perf_counter() - began - (self.waited_s - waited_s)

    def _handle(self, link: Link, message: Message) -> None:
        kind = message.header.kind
        if self.turns is not None and message.header.epoch > self.epoch:
            self.turns.drop()  # whatever is still wanted of them is planned again
        self.epoch = message.header.epoch
        if kind == Kind.PLAN and self.stage is not None:
            plan = unpack(message.body, StepPlan)
            self.held.note(plan)
            self._take_links()
            self._step(plan, None, 0.0)
        elif kind == Kind.HIDDEN and self.stage is not None:
            hidden = unpack(message.body, Hidden)
            self._step(hidden.plan, only_tensor(message), hidden.compute_s, link)
        elif kind == Kind.MOE_RESULT and self.turns is not None and link.peer == self.turns.router.name:
            self.turns.take(message)
        elif kind == Kind.MOE and self.router is not None:
            try:
                self._reply(link, *self.router.answer(message))
            except Unsendable as error:
                self._refuse(link, message.header._replace(kind=int(Kind.MOE_RESULT)), error)
        elif kind in (Kind.DISPATCH, Kind.COMBINE) and self.router is not None and self.router.exchange:
            self.router.exchange.deliver(link.peer, message)
        elif kind in (Kind.DISPATCH, Kind.BROADCAST) and self.experts is not None:
            reply = self._answer_experts(message)
            self._reply(link, reply.header, list(reply.tensors), reply.body)
        elif kind == Kind.REDUCE and self.stage is not None and self.stage.ranks is not None:
            self.stage.ranks.deliver(link.peer, message)
        elif kind == Kind.ASSIGN:
            self.assign(unpack(message.body, str))
            self._reply(link, message.header, [], b"")
        elif kind == Kind.CONTROL:
            topology = unpack(message.body, Topology)
            if topology.kv_eras[self.spec.data_rank] != self.kv_era:
                self.kv_era = topology.kv_eras[self.spec.data_rank]
                self.held = HeldSequences()
            ready = Ready(self._connect(topology), self.held.all() if topology.read_back else {})
            self._reply(link, message.header, [], pack(ready))
        else:
            raise WireError(f"{message.header} is nothing for {'+'.join(self.spec.roles) or 'a spare'}")

    def _answer_experts(self, message: Message) -> Message:
        assert self.experts is not None
        share = self.experts.share if self.experts.on_device else None
        return handle(message, self.experts.forward, share)

    def _reply(self, link: Link, header: Header, tensors: list[torch.Tensor], body: bytes) -> None:
        try:
            link.send(header, tensors, body)
        except Unsendable as error:
            self._refuse(link, header, error)
        except LinkError:
            link.close()  # the next wait finds it closed and drops it

    def _refuse(self, link: Link, header: Header, error: Unsendable) -> None:
        """Says why there is no answer: nobody is lost, and whoever asked would get the same from another."""
        logger.error("step %d cannot be computed: %s", header.step, error)
        refused = header._replace(flags=Flags.REFUSED, rows=0)
        self._reply(link, refused, [], str(error)[:1000].encode())

    def _connect(self, topology: Topology) -> list[str]:
        """Links this worker to its peers; returns those that could not be reached."""
        unreachable = self.peers.connect(topology, self.layout, self.spec)
        if self.router is None or unreachable or self.layout.has_its_experts(self.spec):
            return unreachable
        if self.layout.exchange_of(self.spec):
            assert self.experts is not None
            own = [self.experts, *self._copies]
            self.peers.exchange(self.router, topology, self.layout, self.spec, own)
        else:
            self.peers.link_experts(self.router, self.layout, self.spec, self._answer_experts)
        return unreachable

    def _step(
        self, plan: StepPlan, x_TD: torch.Tensor | None, before_s: float, before: Link | None = None
    ) -> None:
        """Begins this stage's part of a step and, where its mixtures of experts are asked for here, ends it.
        `before` is the link over which its hidden states came."""
        assert self.stage is not None
        try:
            if self.turns is not None:
                self.turns.add(Turn(plan, self.stage.begin(plan, x_TD), before, before_s))
                return
            x_TD, tokens = self.stage.forward(plan, x_TD)
            self._pass_on(plan, x_TD, tokens, before_s + self.stage.compute_s, before)
        except PeersLost as error:
            if error.names:  # else others were ahead, who know why
                self.stage.give_up(error.names)
            if lost := [*error.names, *self.stage.take_lost()]:
                self._give_result(plan, [], lost, before_s)
        except Unsendable as error:
            self._refuse_step(plan, error)

    def _end_step(self, turn: Turn, lost: list[str]) -> None:
        """Of a step that took turns."""
        compute_s = turn.before_s + turn.step.compute_s
        if lost:
            self._give_result(turn.plan, [], lost, compute_s)
            return
        try:
            self._pass_on(turn.plan, turn.step.hidden_TD, turn.step.tokens, compute_s, turn.before)
        except Unsendable as error:
            self._refuse_step(turn.plan, error)

    def _refuse_step(self, plan: StepPlan, error: Unsendable) -> None:
        if self.stage is not None:
            self.stage.take_lost()
        if self._control is not None:
            header = Header(Kind.RESULT, plan.epoch, plan.step, -1, plan.micro_batch)
            self._refuse(self._control, header, error)

    def _pass_on(
        self,
        plan: StepPlan,
        x_TD: torch.Tensor,
        tokens: list[int] | None,
        compute_s: float,
        before: Link | None,
    ) -> None:
        """Gives a step to the next stage or, at its end, whichever that is, to the engine. Raises
        Unsendable."""
        assert self.stage is not None
        lost = self.stage.take_lost()
        if before is not None and before.closed:  # before they were whole, perhaps
            lost.append(before.peer)
        self.num_steps += 1
        # A spoiled step ends here: its other stages might only wait for the same lost peer.
        if tokens is None and not lost:
            following = self.layout.following(self.spec)
            assert following is not None
            header = Header(Kind.HIDDEN, plan.epoch, plan.step, -1, plan.micro_batch, len(x_TD))
            try:
                link = self._links[following]
                link.send(header, [x_TD.to(link.device)], pack(Hidden(plan, compute_s)))
                return
            except Unsendable:
                raise
            except (LinkError, KeyError):
                lost = [following]
        if lost or not self.spec.rank:  # the first rank has the tokens, and speaks for all
            self._give_result(plan, tokens or [], lost, compute_s)

    def _give_result(self, plan: StepPlan, tokens: list[int], lost: list[str], compute_s: float) -> None:
        result = StepResult(plan.epoch, plan.step, tokens, lost, compute_s, plan.data_rank)
        if self._control is not None:
            header = Header(Kind.RESULT, plan.epoch, plan.step, -1, plan.micro_batch)
            self._reply(self._control, header, [], pack(result))
