"""Stage, router and expert: what each computes in a step. Plain objects that know no Ray.

Each role is given its model part and the way to the next role; whether that way is a call in this
process or a link to another one is not the role's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

import torch

from kernels.devices import settle
from r1_cluster.comm.device_dispatch import DeviceDispatcher
from r1_cluster.comm.dispatch import Dispatcher, LocalDispatcher, StepTag
from r1_cluster.comm.exchange import Exchange
from r1_cluster.comm.links import Link, recv_epoch
from r1_cluster.comm.lockstep import Lockstep
from r1_cluster.comm.ranks import RankGroup
from r1_cluster.comm.wire import (
    Flags,
    Header,
    Kind,
    LinkClosed,
    LinkError,
    Message,
    Unsendable,
    WireError,
    only_tensor,
    pack_seconds,
    unpack_seconds,
)
from r1_cluster.engine.boot import StepLimits
from r1_cluster.engine.graphs import DecodeGraphs, Recorder, cuda_recorder, dummy_plan
from r1_cluster.engine.sampler import sample
from r1_cluster.models.batch import AttentionBatch, buckets
from r1_cluster.models.moe import ExpertModel, RouterModel
from r1_cluster.models.network import StageModel
from r1_cluster.records import StepPlan

BROADCAST_TOKENS = 64
"""Steps of so many tokens are broadcast to expert shards on devices: cheaper than to learn where they go."""


class Router(Protocol):
    """What a stage asks for at a layer with experts."""

    @property
    def idle_s(self) -> float:
        """Grows by the time in which `forward` waited and no operator of the model ran. What a device's links
        let their device wait is not seen."""

    @property
    def waited_s(self) -> float:
        """Grows by the time in which `forward` computed nothing in this process."""

    def forward(self, tag: StepTag, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Normed hidden states [T, D], the first `num_tokens` rows real → the MoE block's output [T, D].
        Raises Unsendable where a message of it does not fit a link."""

    def take_lost(self) -> list[str]:
        """Peers that went missing since the last call. Once the device has done all it was told: over a
        device's links a payload may still be lost after it was announced."""


class RouterRole:
    """Gate, shared experts, dispatch and combine. Stateless."""

    def __init__(self, model: RouterModel) -> None:
        self.model = model
        self.dispatcher: Dispatcher | None = None
        # See `Router`; of all dispatchers that it has had.
        self.idle_s = self.waited_s = 0.0

    def forward(self, tag: StepTag, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        assert self.dispatcher is not None, "a router is linked to its experts before it is asked"
        weights_TK, ids_TK = self.model.gate(tag.layer, x_TD)
        device, before = self.dispatcher.device, (self.dispatcher.idle_s, self.dispatcher.waited_s)
        self.dispatcher.dispatch(tag, x_TD.to(device), weights_TK.to(device), ids_TK.to(device), num_tokens)
        shared_TD = self.model.shared(tag.layer, x_TD)  # while the experts work
        y_TD = self.dispatcher.combine()
        self._count(self.dispatcher, *before)
        return y_TD.to(x_TD.device).add_(shared_TD)

    @property
    def exchange(self) -> Exchange | None:
        """Its way to experts, where that is an exchange with other ranks."""
        return self.dispatcher if isinstance(self.dispatcher, Exchange) else None

    def take_part(self, tag: StepTag, x_0D: torch.Tensor) -> None:
        """A mixture of other ranks' tokens, of which some go to the experts here; `x_0D` has no rows. Raises
        PeersLost, Unsendable."""
        exchange = self.exchange
        assert exchange is not None, "only an exchange goes on without tokens of one's own"
        before = exchange.idle_s, exchange.waited_s
        weights_01 = torch.zeros(0, 1, device=exchange.device)
        ids_01 = torch.zeros(0, 1, dtype=torch.int64, device=exchange.device)
        exchange.dispatch(tag, x_0D.to(exchange.device), weights_01, ids_01, 0)
        exchange.combine()
        self._count(exchange, *before)

    def _count(self, dispatcher: Dispatcher, idle_s: float, waited_s: float) -> None:
        self.idle_s += dispatcher.idle_s - idle_s
        self.waited_s += dispatcher.waited_s - waited_s

    def take_lost(self) -> list[str]:
        """See `Router.take_lost`."""
        lost = self.dispatcher.lost if self.dispatcher is not None else []
        taken = list(dict.fromkeys(lost))
        lost.clear()
        return taken

    def answer(self, message: Message) -> tuple[Header, list[torch.Tensor], bytes]:
        """Serves a stage in another process: its MOE message → header, tensors and body of the reply, which
        is how long the model's operators took, or who was lost. Raises Unsendable, and WireError for another
        message."""
        began, idle_s = time.perf_counter(), self.idle_s
        header = message.header
        tag = StepTag(header.epoch, header.step, header.layer, header.micro_batch)
        x_TD = only_tensor(message)
        y_TD = self.forward(tag, x_TD.to(self.model.shard.device), header.rows).to(x_TD.device)
        settle(y_TD.device)  # only then is it known who was lost meanwhile
        compute_s = time.perf_counter() - began - (self.idle_s - idle_s)
        reply = header._replace(kind=int(Kind.MOE_RESULT), flags=0)
        if lost := self.take_lost():
            return reply._replace(flags=Flags.TAINTED), [y_TD], "\n".join(lost).encode()
        return reply, [y_TD], pack_seconds(compute_s)


def local_dispatcher(experts: ExpertModel) -> Dispatcher:
    """For a router whose experts are all in its process, or whose rank adds these alone: on the device where
    it can, else by the host."""
    if experts.on_device:
        return DeviceDispatcher(experts.mixture, experts.shard.device)
    return LocalDispatcher(experts.forward, experts.num_experts, experts.experts)


class OtherRanksRouter:
    """In place of a router where the first rank of the stage asks it for all: this one adds nothing."""

    idle_s = waited_s = 0.0

    def forward(self, tag: StepTag, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """See `Router.forward`; zeros."""
        return torch.zeros_like(x_TD)

    def take_lost(self) -> list[str]:
        """See `Router.take_lost`."""
        return []


class Asked(NamedTuple):
    """What a stage asks of its router: normed hidden states [T, D], the first `num_tokens` rows real."""

    tag: StepTag
    x_TD: torch.Tensor
    num_tokens: int


class RemoteRouter:
    """A stage's way to the router `name` in another process, to which a link is found in `links`."""

    def __init__(self, name: str, links: Mapping[str, Link], timeout_s: float) -> None:
        """`timeout_s` is how long the router may take to answer."""
        self.name = name
        self.timeout_s = timeout_s
        self.idle_s = self.waited_s = 0.0
        self._links = links
        self._lost: list[str] = []

    def forward(self, tag: StepTag, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """See `Router.forward`; waits for the answer."""
        if self.name in self._lost:
            return torch.zeros_like(x_TD)
        asked = Asked(tag, x_TD, num_tokens)
        began = time.perf_counter()
        try:
            link = self.ask(asked)
            y_TD, compute_s = self.read(asked, recv_epoch(link, tag.epoch, self.timeout_s))
        except Unsendable:
            raise
        except LinkError:
            # The step is finished with zeros, so that everybody stays in lock-step, and then done again.
            self.hang_up()
            self._lost.append(self.name)
            return torch.zeros_like(x_TD)
        took_s = time.perf_counter() - began
        self.waited_s += took_s
        if not self._lost:
            self.idle_s += max(took_s - compute_s, 0.0)
        return y_TD

    def hang_up(self) -> None:
        """Closes the link, so that nothing late is taken for an answer."""
        link = self._links.get(self.name)
        if link is not None:
            link.close()

    def ask(self, asked: Asked) -> Link:
        """Sends a request; returns the link over which its answer will come. Raises LinkError."""
        link = self._links.get(self.name)
        if link is None:
            raise LinkClosed(f"there is no link to {self.name}")
        link.send(Header(Kind.MOE, *asked.tag, asked.num_tokens), [asked.x_TD.to(link.device)])
        return link

    def read(self, asked: Asked, reply: Message) -> tuple[torch.Tensor, float]:
        """What the router answered to a request: its output [T, D], and how many seconds the model's
        operators took. Whom it names as lost is for `take_lost` to say. Raises WireError for what is no
        answer to it, Unsendable where the router could not send one."""
        header, body = reply.header, reply.body
        if header[:5] != (Kind.MOE_RESULT, *asked.tag):
            raise WireError(f"{self.name} answered with {header} to {asked.tag}")
        if header.flags & Flags.REFUSED:
            raise Unsendable(f"{self.name}: {body.decode(errors='replace')}")
        x_TD = asked.x_TD
        y_TD = only_tensor(reply).to(x_TD.device)
        if y_TD.shape != x_TD.shape or y_TD.dtype != x_TD.dtype:
            raise WireError(f"{self.name} answered {y_TD.dtype} {tuple(y_TD.shape)} to {tuple(x_TD.shape)}")
        if header.flags & Flags.TAINTED:
            self._lost.extend(body.decode(errors="replace").split("\n"))
            return y_TD, 0.0
        return y_TD, unpack_seconds(body)

    def take_lost(self) -> list[str]:
        """See `Router.take_lost`."""
        link = self._links.get(self.name)
        if link is not None and link.closed:
            self._lost.append(self.name)
        lost, self._lost = self._lost, []
        return list(dict.fromkeys(lost))


Walk = Generator[Asked, torch.Tensor, tuple[torch.Tensor, list[int] | None]]
"""A stage's part of a step, cut where a mixture of experts is asked: is sent the mixture's output, returns
what `StageRole.forward` does."""


class Step:
    """A stage's part of a step, as far as it has come. `asked` is the mixture of experts for which it waits,
    None at its end; then `hidden_TD` and `tokens` are what `StageRole.forward` returns."""

    def __init__(self, walk: Walk, ranks: RankGroup | None) -> None:
        """Runs to the first mixture. Raises as `StageRole.forward`."""
        self.asked: Asked | None = None
        self.hidden_TD: torch.Tensor
        self.tokens: list[int] | None = None
        self.compute_s = 0.0
        self._walk = walk
        self._ranks = ranks
        self._run(None)

    def go_on(self, y_TD: torch.Tensor, compute_s: float) -> None:
        """Takes the output [T, D] of the mixture that it waited for, and how many seconds the model's
        operators took for that; runs to the next one. Raises as `StageRole.forward`."""
        self.compute_s += compute_s
        self._run(y_TD)

    def close(self) -> None:
        """Gives up the rest."""
        self._walk.close()

    def _run(self, y_TD: torch.Tensor | None) -> None:
        began, idle_s = time.perf_counter(), self._idle_s
        try:
            self.asked = next(self._walk) if y_TD is None else self._walk.send(y_TD)
        except StopIteration as end:
            self.asked = None
            self.hidden_TD, self.tokens = end.value
        self.compute_s += time.perf_counter() - began - (self._idle_s - idle_s)

    @property
    def _idle_s(self) -> float:
        return 0.0 if self._ranks is None else self._ranks.idle_s


class StageRole:
    """Some layers of the network with their KV pages; the first embeds, the last samples."""

    def __init__(
        self,
        model: StageModel,
        moe: Router | None,
        ranks: RankGroup | None = None,
        *,
        num_pages: int,
        page_size: int,
    ) -> None:
        """`ranks`: who divides the stage, where several do."""
        self.model = model
        self.moe = moe
        self.ranks = ranks
        self.page_size = page_size
        self.caches = model.new_cache(num_pages, page_size)
        self.graphs: DecodeGraphs | None = None
        self.compute_s = 0.0
        model.ranks = ranks

    @torch.inference_mode()
    def forward(self, plan: StepPlan, x_TD: torch.Tensor | None) -> tuple[torch.Tensor, list[int] | None]:
        """Runs this stage's layers of a step: `x_TD` are the hidden states of the stage before, None on
        the first. Returns the hidden states and, on the last stage, one token per `plan.samples`. By then
        the device has done its work, and `compute_s` is how long the model's operators took, in whatever
        process. Of several ranks the first has the tokens, the others an empty list. Raises Unsendable,
        PeersLost."""
        if not plan.seq_ids:
            return self._take_part(plan), []
        step = self.begin(plan, x_TD)
        while step.asked is not None:
            layer = step.asked.tag.layer
            assert self.moe is not None, f"layer {layer} has experts, but the layout gave its stage no router"
            began, idle_s = time.perf_counter(), self.moe.idle_s
            y_TD = self.moe.forward(*step.asked)
            step.go_on(y_TD, time.perf_counter() - began - (self.moe.idle_s - idle_s))
        self.compute_s = step.compute_s
        return step.hidden_TD, step.tokens

    def begin(self, plan: StepPlan, x_TD: torch.Tensor | None) -> Step:
        """`forward` as far as the first mixture of experts, for a caller that has others to serve while the
        router works; it sets inference mode."""
        for group in self._groups:
            group.begin(plan.epoch, plan.step, plan.micro_batch)
        batch = AttentionBatch.from_plan(plan, self.page_size, self.model.shard)
        return Step(self._walk(plan, batch, x_TD), self.ranks)

    def _walk(self, plan: StepPlan, batch: AttentionBatch, x_TD: torch.Tensor | None) -> Walk:
        if x_TD is not None:
            x_TD = x_TD.to(self.model.shard.device)
        graph = self.graphs.fitting(batch) if self.graphs is not None else None
        if graph is not None:
            segments = graph.segments(x_TD, batch)
        else:
            if x_TD is None:
                x_TD = self.model.embed(batch.token_ids_T)
            segments = self.model.segments(x_TD, batch, self.caches)
        with closing(segments):
            try:
                layer, normed_TD = next(segments)
                while True:
                    tag = StepTag(plan.epoch, plan.step, layer, plan.micro_batch)
                    layer, normed_TD = segments.send((yield Asked(tag, normed_TD, batch.num_tokens)))
            except StopIteration as end:
                out_TD: torch.Tensor = end.value
        if not self.model.is_last:
            settle(out_TD.device)
            # A graph's result is overwritten by the next step, perhaps while it is still being sent.
            return out_TD if graph is None else out_TD.clone(), None
        if not plan.samples:
            settle(out_TD.device)
            return out_TD, []
        if graph is not None:
            logits_SV = out_TD.index_select(0, batch.sample_rows)
        else:
            logits_SV = self.model.logits(out_TD, batch.sample_rows)
        if self.ranks is not None:
            columns = self.ranks.gather(logits_SV)
            if not columns:
                return out_TD, []
            logits_SV = torch.cat(columns, 1)
        return out_TD, sample(self.model.ops, logits_SV, plan.samples)

    def _take_part(self, plan: StepPlan) -> torch.Tensor:
        """A step in which other data ranks have tokens, and this one has none. Returns no hidden states."""
        assert isinstance(self.moe, RouterRole), "only with an exchange is a plan without sequences sent"
        for group in self._groups:
            group.begin(plan.epoch, plan.step, plan.micro_batch)
        began, idle_s = time.perf_counter(), self.moe.idle_s
        x_0D = self.model.hidden(0)
        for layer in self.model.config.moe_layers:
            self.moe.take_part(StepTag(plan.epoch, plan.step, layer, plan.micro_batch), x_0D)
        settle(x_0D.device)
        self.compute_s = time.perf_counter() - began - (self.moe.idle_s - idle_s)
        return x_0D

    def give_up(self, names: Sequence[str]) -> None:
        """Tells all who compute this step together with this stage that it ends without a result, because of
        whom."""
        for group in self._groups:
            group.give_up(names)

    @property
    def _groups(self) -> list[Lockstep]:
        """With whom this stage goes through a step side by side."""
        exchange = self.moe.exchange if isinstance(self.moe, RouterRole) else None
        return [group for group in (self.ranks, exchange) if group is not None]

    def prepare(self, limits: StepLimits, record: Recorder | None = None) -> None:
        """Compiles and tunes the kernels for every size of step, and records the decode steps. On a device
        alone, and before the first step: it writes to page 0."""
        router = self.moe if isinstance(self.moe, RouterRole) else None
        dispatcher = router.dispatcher if router is not None else None
        local = dispatcher if isinstance(dispatcher, DeviceDispatcher) else None
        moe = self._moe_of(dummy_plan([1], [1], self.page_size)) if local is not None else None
        # Ranks are not linked yet. Their steps are not recorded: a graph holds no sum over links.
        self.model.ranks = None
        reach = min(limits.max_context_len, self.model.config.max_position_embeddings)
        for num_tokens in buckets(limits.max_batch_tokens):
            # More tokens than one context holds come in several sequences.
            whole, rest = divmod(num_tokens, reach)
            lengths = [reach] * whole + [rest] * (rest > 0)
            plan = dummy_plan(lengths, lengths, self.page_size)
            batch = AttentionBatch.from_plan(plan, self.page_size, self.model.shard)
            x_TD = self.model.hidden(batch.num_rows)
            self.model.forward(x_TD, batch, self.caches, moe or _no_experts)
        if self.ranks is not None:
            self.model.ranks = self.ranks
            return
        self.graphs = DecodeGraphs(
            self.model,
            self.caches,
            self.page_size,
            max_num_seqs=limits.max_num_seqs,
            max_context_len=reach,
            local=moe,
            record=record or cuda_recorder(),
        )
        if local is not None:
            local.num_real = self.graphs.num_real
        self.graphs.capture()
        if local is not None:
            local.num_real = None

    def _moe_of(self, plan: StepPlan) -> Callable[[int, torch.Tensor, int], torch.Tensor]:
        def forward(layer: int, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
            assert self.moe is not None, f"layer {layer} has experts, but the layout gave its stage no router"
            return self.moe.forward(StepTag(plan.epoch, plan.step, layer, plan.micro_batch), x_TD, num_tokens)

        return forward

    @property
    def waited_s(self) -> float:
        """Grows by the time in which a step computed nothing in this process."""
        ranks_s = 0.0 if self.ranks is None else self.ranks.idle_s
        return ranks_s + (0.0 if self.moe is None else self.moe.waited_s)

    def take_lost(self) -> list[str]:
        """Peers that went missing since the last call."""
        of_ranks = [] if self.ranks is None else self.ranks.lost
        return of_ranks + ([] if self.moe is None else self.moe.take_lost())


def _no_experts(layer: int, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """In place of a router in another process, while a stage prepares by itself."""
    return torch.zeros_like(x_TD)
