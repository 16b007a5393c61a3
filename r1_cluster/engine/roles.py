"""Stage, router and expert: what each computes in a step. Plain objects that know no Ray.

Each role is given its model part and the way to the next role; whether that way is a call in this
process or a link to another one is not the role's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from r1_cluster.comm.dispatch import Dispatcher, StepTag
from r1_cluster.comm.links import Link, recv_epoch
from r1_cluster.comm.wire import Flags, Header, Kind, LinkError, Message
from r1_cluster.engine.sampler import sample
from r1_cluster.models.batch import AttentionBatch
from r1_cluster.models.network import RouterModel, StageModel
from r1_cluster.records import StepPlan


class MoE(Protocol):
    """What a stage asks for at a layer with experts."""

    lost: list[str]

    def forward(self, tag: StepTag, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Normed hidden states [T, D], the first `num_tokens` rows real → the MoE block's output [T, D]."""


class RouterRole:
    """Gate, shared experts, dispatch and combine. Stateless."""

    def __init__(self, model: RouterModel) -> None:
        self.model = model
        self.dispatcher: Dispatcher | None = None
        self.lost: list[str] = []

    def forward(self, tag: StepTag, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        assert self.dispatcher is not None, "a router is linked to its experts before it is asked"
        weights_TK, ids_TK = self.model.gate(tag.layer, x_TD)
        self.dispatcher.dispatch(tag, x_TD, ids_TK, num_tokens)
        shared_TD = self.model.shared(tag.layer, x_TD)  # while the experts work
        y_TD = self.dispatcher.combine(weights_TK)
        if self.dispatcher.lost:
            self.lost.extend(self.dispatcher.lost)
            self.dispatcher.lost.clear()
        return y_TD.add_(shared_TD)

    def answer(self, message: Message) -> tuple[Header, list[torch.Tensor], bytes]:
        """Serves a stage in another process: its MOE message → header, tensors and body of the reply."""
        header = message.header
        tag = StepTag(header.epoch, header.step, header.layer, header.micro_batch)
        y_TD = self.forward(tag, message.tensors[0], header.rows)
        lost, self.lost = self.lost, []
        flags = int(Flags.TAINTED) if lost else 0
        body = "\n".join(dict.fromkeys(lost)).encode()
        return header._replace(kind=Kind.MOE_RESULT, flags=flags), [y_TD], body


class RemoteRouter:
    """A stage's way to a router in another process."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name = name
        self.link: Link | None = None
        self.lost: list[str] = []
        self._timeout_s = timeout_s

    def forward(self, tag: StepTag, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        if self.link is None or self.name in self.lost:
            self.lost.append(self.name)
            return torch.zeros_like(x_TD)
        header = Header(Kind.MOE, tag.epoch, tag.step, tag.layer, tag.micro_batch, num_tokens)
        try:
            self.link.send(header, [x_TD])
            reply = recv_epoch(self.link, tag.epoch, self._timeout_s)
        except LinkError:
            # The step is finished with zeros, so that everybody stays in lock-step, and then done again.
            self.link.close()
            self.lost.append(self.name)
            return torch.zeros_like(x_TD)
        if reply.header.flags & Flags.TAINTED:
            self.lost.extend(reply.body.decode().split("\n"))
        return reply.tensors[0]


class StageRole:
    """Some layers of the network with their KV pages; the first embeds, the last samples."""

    def __init__(self, model: StageModel, moe: MoE | None, *, num_pages: int, page_size: int) -> None:
        self.model = model
        self.moe = moe
        self.page_size = page_size
        self.caches = model.new_cache(num_pages, page_size)

    def forward(self, plan: StepPlan, x_TD: torch.Tensor | None) -> tuple[torch.Tensor, list[int] | None]:
        """Runs this stage's layers of a step: `x_TD` are the hidden states of the stage before, None on
        the first. Returns the hidden states and, on the last stage, one token per `plan.samples`."""
        batch = AttentionBatch.from_plan(plan, self.page_size, self.model)
        if x_TD is None:
            x_TD = self.model.embed(batch.token_ids_T)
        x_TD = self.model.forward(x_TD, batch, self.caches, self._moe_of(plan))
        if not self.model.is_last:
            return x_TD, None
        if not plan.samples:
            return x_TD, []
        return x_TD, sample(self.model.ops, self.model.logits(x_TD, batch.sample_rows), plan.samples)

    def _moe_of(self, plan: StepPlan) -> Callable[[int, torch.Tensor, int], torch.Tensor]:
        def forward(layer: int, x_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
            assert self.moe is not None, f"layer {layer} has experts, but the layout gave its stage no router"
            return self.moe.forward(StepTag(plan.epoch, plan.step, layer, plan.micro_batch), x_TD, num_tokens)

        return forward

    def take_lost(self) -> list[str]:
        """Peers that went missing since the last call."""
        if self.moe is None or not self.moe.lost:
            return []
        lost = list(dict.fromkeys(self.moe.lost))
        self.moe.lost.clear()
        return lost
