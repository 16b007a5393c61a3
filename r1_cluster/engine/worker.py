"""A worker: the process that hosts roles, and the resident loop that feeds them.

The loop waits for whatever comes first: a plan from the engine, hidden states from the stage before, a
MoE request from a stage, dispatched rows from a router, a new link. It computes, passes on, and waits
again; Ray has no part in it. A worker holds a lease on its engine: it ends by itself when no engine has
spoken to it for `lease_s`. A spare is a worker without a role that waits in the same loop until it is
assigned one.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec
import torch

from kernels.devices import find_device, free_bytes
from kernels.ops import for_device
from r1_cluster.comm.dispatch import LinkDispatcher, handle
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import Link, LocalLink, Pollable, TcpLink, wait_any
from r1_cluster.comm.listener import Listener, connect
from r1_cluster.comm.process_group import ProcessGroups
from r1_cluster.comm.ranks import RankGroup, RanksLost
from r1_cluster.comm.transports import backend_for
from r1_cluster.comm.wakeup import Wakeup
from r1_cluster.comm.wire import (
    Flags,
    Header,
    Kind,
    LinkError,
    Message,
    Unsendable,
    WireError,
    only_tensor,
    pack,
    unpack,
)
from r1_cluster.engine.boot import Ready, StepLimits, Topology, WorkerBoot
from r1_cluster.engine.held import HeldSequences
from r1_cluster.engine.parts import load_parts, part_tensors
from r1_cluster.engine.roles import (
    OtherRanksRouter,
    RemoteRouter,
    Router,
    RouterRole,
    StageRole,
    local_dispatcher,
)
from r1_cluster.models.config import ModelConfig
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.fitting import check_fits, check_fp8
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel
from r1_cluster.planning.layout import Layout, WorkerSpec
from r1_cluster.planning.memory import check_room, worker_bytes
from r1_cluster.records import StepPlan, StepResult
from r1_cluster.weights.checkpoint import Checkpoint, tensors_here

logger = logging.getLogger(__name__)

FIRST_LEASE_S = 3600.0
"""How long a worker waits for its first engine, which links nobody before all have loaded their weights."""
BROADCAST_TOKENS = 64
"""Steps of so many tokens are broadcast to expert shards on devices: cheaper than to learn where they go."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Hidden(msgspec.Struct, frozen=True, array_like=True):
    """Travels with the hidden states from stage to stage."""

    plan: StepPlan
    compute_s: float


class Worker:
    """Hosts the roles that `boot.workers` gives to `boot.name`; none, for now, if it is not among them."""

    def __init__(self, boot: WorkerBoot) -> None:
        torch.set_num_threads(boot.threads)
        self.boot = boot
        self.epoch = 0
        self.office = 0  # the epoch under which the engine in charge introduced itself
        self.num_steps = 0
        self.stale_dropped = 0
        self._stopping = False
        self._control: TcpLink | None = None
        self._links: dict[str, Link] = {}
        self._incarnations: dict[str, str] = {}
        self.assign(boot.name)
        self._wakeup = Wakeup()
        self.listener = Listener(boot.name, boot.secret, boot.host, boot.link_ports)
        self._groups: ProcessGroups | None = None
        backend = backend_for(boot.transport, self.listener.address.host)
        if backend is not None:
            self._groups = ProcessGroups(backend, boot.step_timeout_s)

    def assign(self, name: str) -> None:
        """Takes the place called `name` and loads what belongs to it; `loaded` is False meanwhile."""
        self.loaded = False
        self.spec = next((w for w in self.boot.workers if w.name == name), WorkerSpec(name))
        self.experts: ExpertModel | None = None
        self.router: RouterRole | None = None
        self.stage: StageRole | None = None
        self._remote: RemoteRouter | None = None
        self._ranks: RankGroup | None = None
        self.kv_era = 0
        self.held = HeldSequences()
        started = time.monotonic()
        self.read_bytes, self.read_s = 0, 0.0
        if self.spec.roles:
            self._load()
        self.load_s = time.monotonic() - started
        if self.read_bytes:
            read = self.read_bytes / 1e9
            logger.info("%s: %.2f GB read in %.1f s, %.2f GB/s", name, read, self.read_s, read / self.read_s)
        self.loaded = True

    def _load(self) -> None:
        boot, spec = self.boot, self.spec
        config = load_config(boot.checkpoint)
        self.layout = Layout(boot.workers, config.num_hidden_layers)
        fp8_cache = boot.kv_cache_dtype == "fp8"
        shard = Shard(
            find_device(boot.device),
            _DTYPES[boot.dtype],
            boot.deterministic,
            fp8_cache,
            spec.rank,
            spec.ranks,
        )
        check_fits(config, shard.ops, shard.dtype, boot.page_size)
        check_fp8(config, shard.device, fp8_cache=fp8_cache)
        table = tensor_table(config)
        needed = {tensor.name for tensor in table}
        here = tensors_here(Path(boot.checkpoint))
        own = part_tensors(config, spec)
        if here is not None and not needed <= here:  # a folder with the files of some workers alone
            needed = set(own)
        began = time.monotonic()
        with Checkpoint(
            boot.checkpoint, table, config.fp8_block, config.int_format, needed=needed
        ) as checkpoint:
            if spec.ranks == 1:  # a rank reads parts of what it loads
                checkpoint.expect(own)
            loader = Loader.of(checkpoint, shard, table)
            self.experts, router, stage = load_parts(config, loader, spec)
            self.read_bytes, self.read_s = checkpoint.num_read, time.monotonic() - began
        if router is not None:
            self.router = RouterRole(router)
        if self.router is not None and self.experts is not None and self.layout.has_its_experts(spec):
            self.router.dispatcher = local_dispatcher(self.experts)
        if boot.limits is not None:
            self._check_memory(config, boot.limits, shard.device)
        if stage is not None:
            serving = self.layout.router_of(spec)
            if serving is not None and serving is not spec:
                # Longer than the router waits for its experts, so that each blames the one that is silent.
                self._remote = RemoteRouter(serving.name, boot.step_timeout_s + 0.5)
            moe: Router | None = self._remote or self.router
            if spec.ranks > 1:
                names = [rank.name for rank in self.layout.ranks_of(spec)]
                # Longer than the first rank waits for its router, so that each blames the one that is silent.
                self._ranks = RankGroup(names, spec.rank, self._links, boot.step_timeout_s + 1.0)
                moe = moe or OtherRanksRouter()
            self.stage = StageRole(
                stage, moe, self._ranks, num_pages=boot.num_pages, page_size=boot.page_size
            )
        if shard.device.type == "cuda" and boot.limits is not None:
            self._prepare(boot.limits, config)

    def _prepare(self, limits: StepLimits, config: ModelConfig) -> None:
        """Compiles, tunes and records before the first step, which has no time for it."""
        if self.stage is not None:
            self.stage.prepare(limits)
        elif self.router is not None:
            self.router.model.warm_up(limits.max_batch_tokens)
        elif self.experts is not None and config.moe is not None:
            top_k = config.moe.num_experts_per_tok
            self.experts.warm_up(limits.max_batch_tokens * top_k)
            self.experts.warm_up_shares(min(BROADCAST_TOKENS, limits.max_batch_tokens), top_k)

    def _check_memory(self, config: ModelConfig, limits: StepLimits, device: torch.device) -> None:
        """Once the weights are there, and before any page: whether what these roles need fits beside them."""
        free = free_bytes(device)
        if free is None:
            return
        parts = worker_bytes(
            config,
            self.layout,
            self.spec,
            num_pages=self.boot.num_pages,
            page_size=self.boot.page_size,
            max_num_seqs=limits.max_num_seqs,
            max_batch_tokens=limits.max_batch_tokens,
            max_context_len=min(limits.max_context_len, config.max_position_embeddings),
            fp8_cache=self.boot.kv_cache_dtype == "fp8",
        )
        check_room(parts, free)

    def _link_experts(self) -> None:
        """Gives the router a dispatcher over the expert shards to which links stand."""
        assert self.router is not None
        links: list[Link] = []
        spans: list[range] = []
        device = "cpu" if self._groups is None else self._groups.backend.device
        for shard in self.layout.shards:
            if shard is self.spec:
                links.append(LocalLink(shard.name, self._answer_experts, device))
            elif shard.name in self._links:
                links.append(self._links[shard.name])
            else:
                continue
            assert shard.experts is not None
            spans.append(range(*shard.experts))
        try:
            on_device = self._groups is not None and for_device(self.router.model.shard.device).HAS_MOE
            broadcast = BROADCAST_TOKENS if on_device and not self.boot.deterministic else 0
            self.router.dispatcher = LinkDispatcher(links, spans, self.boot.step_timeout_s, broadcast)
        except ValueError:  # somebody is missing; there will be another topology before the next step
            self.router.dispatcher = None

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
                ready = wait_any(sources, self.boot.lease_s if self.office else FIRST_LEASE_S)
                if not ready:
                    return
                for source in ready:
                    if source is self.listener:
                        self._accept()
                    elif source is not self._wakeup:
                        self._receive(cast(Link, source))
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
        for link in (*self._links.values(), self._control):
            if link is not None:
                link.close()
        if self._groups is not None:
            self._groups.close()
        # Their memory and descriptors go now, not when the circle of a worker and its links is collected.
        self._links.clear()
        self._groups = self._remote = self._ranks = self.stage = self.router = self.experts = None

    def _accept(self) -> None:
        hello, link = self.listener.accept(0)
        if hello.purpose != "control":
            with suppress(LinkError):  # whoever opened it says so to the engine
                self._keep(hello.peer, hello.incarnation, self._grouped(link, 1))
        elif hello.epoch <= max(self.office, self.epoch):
            link.close()  # an engine that was deposed, or that does not know yet who is in office
        else:
            if self._control is not None:
                # Should the former engine only have slept, it must not take this for our death.
                self._reply(self._control, Header(Kind.DEPOSED, hello.epoch), [], b"")
                self._control.close()
            self._control = link
            self.office = hello.epoch

    def _grouped(self, link: TcpLink, rank: int) -> Link:
        """The link itself, or, where tensors go another way than its socket, the group of its two ends."""
        return link if self._groups is None else self._groups.join(link, rank)

    def _keep(self, peer: str, incarnation: str, link: Link) -> None:
        former = self._links.get(peer)
        if former is not None:
            former.close()
        self._links[peer] = link
        self._incarnations[peer] = incarnation
        if self._remote is not None and peer == self._remote.name:
            self._remote.link = link

    def _receive(self, link: Link) -> None:
        try:
            message = link.recv(self.boot.step_timeout_s)
        except LinkError:
            link.close()
            if link is self._control:
                self._control = None
            elif self._links.get(link.peer) is link:  # its successor may be here already
                del self._links[link.peer]
            return
        if message.header.kind == Kind.HEARTBEAT:
            self._reply(link, message.header, [], b"")  # of any epoch: it is the engine's life that counts
        elif message.header.epoch < self.epoch:
            self.stale_dropped += 1
        else:
            try:
                self._handle(link, message)
            except WireError as error:  # as if it had come in pieces: whoever waits for an answer sees it
                logger.warning("%s sent what is no message of ours: %s", link.peer, error)
                link.close()

    def _handle(self, link: Link, message: Message) -> None:
        kind = message.header.kind
        self.epoch = message.header.epoch
        if kind == Kind.PLAN and self.stage is not None:
            plan = unpack(message.body, StepPlan)
            self.held.note(plan)
            self._step(plan, None, 0.0)
        elif kind == Kind.HIDDEN and self.stage is not None:
            hidden = unpack(message.body, Hidden)
            self._step(hidden.plan, only_tensor(message), hidden.compute_s, link)
        elif kind == Kind.MOE and self.router is not None:
            try:
                self._reply(link, *self.router.answer(message))
            except Unsendable as error:
                self._refuse(link, message.header._replace(kind=int(Kind.MOE_RESULT)), error)
        elif kind in (Kind.DISPATCH, Kind.BROADCAST) and self.experts is not None:
            reply = self._answer_experts(message)
            self._reply(link, reply.header, list(reply.tensors), reply.body)
        elif kind == Kind.REDUCE and self._ranks is not None:
            self._ranks.deliver(link.peer, message)
        elif kind == Kind.ASSIGN:
            self.assign(unpack(message.body, str))
            self._reply(link, message.header, [], b"")
        elif kind == Kind.CONTROL:
            topology = unpack(message.body, Topology)
            if topology.kv_era != self.kv_era:
                self.kv_era = topology.kv_era
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
        """Opens the links that this worker opens, but for those that stand already, and closes those to
        peers that are not there now; returns the peers that could not be reached."""
        unreachable = []
        for peer in self.layout.connects_to(self.spec):
            standing = self._links.get(peer)
            if standing is not None:
                if not standing.closed and self._incarnations[peer] == topology.incarnations.get(peer):
                    continue
                standing.close()
                del self._links[peer]
            if peer not in topology.endpoints:
                continue
            hello = Hello(self.spec.name, self.boot.incarnation, topology.epoch, "tensor")
            try:
                # Well before the engine gives up waiting for us, so that it hears who hangs.
                timeout_s = max(1.0, self.boot.step_timeout_s / 3)
                link = connect(topology.endpoints[peer], hello, self.boot.secret, timeout_s)
                link.peer = peer  # a spare still listens under the name that it had
                self._keep(peer, topology.incarnations[peer], self._grouped(link, 0))
            except LinkError:
                unreachable.append(peer)
        if self.router is not None and not self.layout.has_its_experts(self.spec) and not unreachable:
            self._link_experts()
        return unreachable

    def _step(
        self, plan: StepPlan, x_TD: torch.Tensor | None, compute_s: float, before: Link | None = None
    ) -> None:
        """Runs this stage's part of a step; `before` is the link over which its hidden states came."""
        assert self.stage is not None
        try:
            x_TD, tokens = self.stage.forward(plan, x_TD)
            compute_s += self.stage.compute_s
            self._pass_on(plan, x_TD, tokens, compute_s, before)
        except RanksLost as error:
            if lost := [*error.names, *self.stage.take_lost()]:
                self._give_result(plan, [], lost, compute_s)
        except Unsendable as error:
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
        result = StepResult(plan.epoch, plan.step, tokens, lost, compute_s)
        if self._control is not None:
            header = Header(Kind.RESULT, plan.epoch, plan.step, -1, plan.micro_batch)
            self._reply(self._control, header, [], pack(result))
