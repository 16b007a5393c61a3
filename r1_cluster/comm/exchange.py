"""Dispatch and combine where every rank has a router and experts: all tokens change places, and come back.

    dispatch   each rank sends every other one the rows for its experts, be they none
    combine    computes the experts that are here on the rows of all, sends each rank its answers, takes its
               own back and sums them

All ranks do so at every mixture of a step, also those that have no tokens in it, so that each knows for what
it must wait, and reads its experts' weights once for all. Rows are sorted and summed by the functions of
`dispatch`, and a row's answer depends on that row alone, so that the bits are those of one process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from r1_cluster.comm.dispatch import ExpertsForward, IntArray, RowOrder, StepTag, sort_rows, sum_rows
from r1_cluster.comm.links import Link
from r1_cluster.comm.lockstep import Lockstep, Outgoing, PeersLost
from r1_cluster.comm.wire import Header, Kind, Message
from r1_cluster.records import pack_int32, unpack_int32

if TYPE_CHECKING:
    from r1_cluster.comm.links import Device

logger = logging.getLogger(__name__)


class ExpertSpan(NamedTuple):
    """Experts that a rank can compute: which, and by what."""

    experts: range
    forward: ExpertsForward


class _Rows(NamedTuple):
    """Of one rank, sorted by expert: its rows, and how many are for each expert here."""

    x_ND: Tensor
    counts: IntArray


@dataclass
class _Under:
    """A dispatch that is under way. The sorted rows of rank i are `bounds[i]` to `bounds[i + 1]`."""

    tag: StepTag
    x_TD: Tensor
    weights_TK: Tensor
    num_tokens: int
    order: RowOrder
    bounds: list[int]
    rows: dict[str, _Rows] = field(default_factory=dict)


class Exchange(Lockstep):
    """A `Dispatcher` among ranks; see `Lockstep`. `hosts[i]` are the spans of experts that rank i holds; of
    those that have several hosts the first in turn computes them, and `own` are the ones that are here.
    Whoever is lost ends the step by `PeersLost`."""

    def __init__(
        self,
        names: Sequence[str],
        place: int,
        links: Mapping[str, Link],
        timeout_s: float,
        *,
        num_experts: int,
        hosts: Sequence[Sequence[range]],
        own: Sequence[ExpertSpan],
        device: Device,
    ) -> None:
        """`hosts[i]` begins with the span that is computed by rank i while it is there; `device` is where
        tensors are taken. Experts that nobody here holds are others': their rows are zero."""
        super().__init__(Kind.DISPATCH, names, place, links, timeout_s)
        self.device = device
        self._owner_E = np.full(num_experts, -1, dtype=np.int64)
        # In the order of choice: every rank's own, then every rank's first copy, and so on.
        for choice in range(max(map(len, hosts))):
            for rank, spans in enumerate(hosts):
                for expert in spans[choice] if choice < len(spans) else ():
                    if self._owner_E[expert] < 0:
                        self._owner_E[expert] = rank
        self._experts_of = [np.flatnonzero(self._owner_E == rank) for rank in range(len(names))]
        mine = self._experts_of[place]
        self._own = [span for span in own if self._owner_E[span.experts.start] == place]
        self._own.sort(key=lambda span: span.experts.start)
        assert [e for span in self._own for e in span.experts] == mine.tolist(), "a span has one owner"
        self._under: _Under | None = None

    def dispatch(
        self, tag: StepTag, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, num_tokens: int
    ) -> None:
        """See `Dispatcher.dispatch`. Raises PeersLost, Unsendable."""
        began = time.perf_counter()
        self.begin(tag.epoch, tag.step, tag.micro_batch)
        order = sort_rows(expert_ids_TK, num_tokens, self._owner_E)
        num_rows = [int(order.counts_E[experts].sum()) for experts in self._experts_of]
        bounds = list(accumulate(num_rows, initial=order.num_orphans))
        under = self._under = _Under(tag, x_TD, weights_TK, num_tokens, order, bounds)
        x_ND = x_TD.index_select(0, order.tokens_N)
        messages = {}
        for rank, name in enumerate(self._names):
            rows = x_ND[bounds[rank] : bounds[rank + 1]]
            counts = order.counts_E[self._experts_of[rank]]
            if rank == self.place:
                under.rows[name] = _Rows(rows, counts)
            else:
                body = pack_int32(counts.astype(np.int32))
                messages[name] = Outgoing(rows if len(rows) else None, body)
        header = Header(Kind.DISPATCH, *tag)
        if not self._sent_at_once(header, messages):
            under.rows |= self._swap(header, messages, lambda peer: self._rows_of(peer, under))
        self.idle_s += time.perf_counter() - began

    def combine(self) -> Tensor:
        """See `Dispatcher.combine`. Raises PeersLost, Unsendable."""
        if self._under is None:
            raise RuntimeError("combine without a dispatch")
        under, self._under = self._under, None
        began = time.perf_counter()
        for peer in self.peers:
            if peer not in under.rows:
                under.rows[peer] = self._rows_of(peer, under)
        computing = time.perf_counter()
        answers = self._compute(under)
        self.idle_s -= time.perf_counter() - computing
        own = self._names[self.place]
        messages = {name: Outgoing(y if len(y) else None) for name, y in answers.items() if name != own}
        header = Header(Kind.COMBINE, *under.tag)
        parts = self._swap(header, messages, lambda peer: self._answer_of(peer, under))
        parts[own] = answers[own]
        y_ND = torch.cat(
            [under.x_TD.new_zeros(under.bounds[0], under.x_TD.shape[1])]
            + [parts[name] for name in self._names]
        )
        self.idle_s += time.perf_counter() - began
        return sum_rows(y_ND, under.order, under.weights_TK, under.num_tokens)

    def _compute(self, under: _Under) -> dict[str, Tensor]:
        """The answers to every rank's rows: of each expert here the rows of all together. Raises PeersLost
        where the experts fail: to the others this rank is lost."""
        of_ranks = [under.rows[name] for name in self._names]
        counts_RE = np.stack([rows.counts for rows in of_ranks])
        x_ND = torch.cat([rows.x_ND for rows in of_ranks])
        experts_N = np.repeat(np.tile(np.arange(counts_RE.shape[1]), len(of_ranks)), counts_RE.ravel())
        order_N = torch.from_numpy(np.argsort(experts_N, kind="stable")).to(x_ND.device)
        counts_E = counts_RE.sum(0)
        sorted_ND, y_ND = x_ND.index_select(0, order_N), torch.empty_like(x_ND)
        parts, expert, row = [], 0, 0
        try:
            for span in self._own:
                counts = counts_E[expert : expert + len(span.experts)].tolist()
                rows = sorted_ND[row : row + sum(counts)]
                parts.append(span.forward(under.tag.layer, rows, counts) if len(rows) else rows)
                expert, row = expert + len(counts), row + len(rows)
        except Exception as error:
            logger.exception("experts failed in %s", under.tag)
            name = self._names[self.place]
            self.give_up([name])
            raise PeersLost([name]) from error
        y_ND[order_N] = torch.cat(parts) if parts else sorted_ND
        return dict(zip(self._names, torch.split(y_ND, counts_RE.sum(1).tolist())))

    def _rows_of(self, peer: str, under: _Under) -> _Rows:
        """A peer's rows for the experts here."""
        message = self._receive(peer, Header(Kind.DISPATCH, *under.tag))
        counts = unpack_int32(message.body) if len(message.body) % 4 == 0 else np.array([-1], dtype=np.int32)
        num_experts = len(self._experts_of[self.place])
        if len(counts) != num_experts or (num_experts and counts.min() < 0):
            self._refuse(peer, f"{len(message.body)} bytes of counts came for {num_experts} experts")
        return _Rows(self._tensor(peer, message, under, int(counts.sum())), counts.astype(np.int64))

    def _answer_of(self, peer: str, under: _Under) -> Tensor:
        """A peer's answer to the rows that it was sent."""
        message = self._receive(peer, Header(Kind.COMBINE, *under.tag))
        rank = self._names.index(peer)
        return self._tensor(peer, message, under, under.bounds[rank + 1] - under.bounds[rank])

    def _tensor(self, peer: str, message: Message, under: _Under, num_rows: int) -> Tensor:
        """The rows of a message, of which there must be so many."""
        if not num_rows and not message.tensors:
            return under.x_TD[:0]
        shape, dtype = (num_rows, under.x_TD.shape[1]), under.x_TD.dtype
        if (
            len(message.tensors) != 1
            or message.tensors[0].shape != shape
            or message.tensors[0].dtype != dtype
        ):
            found = [f"{x.dtype} {list(x.shape)}" for x in message.tensors]
            self._refuse(peer, f"{found} came where {dtype} {list(shape)} was due")
        return message.tensors[0].to(under.x_TD.device)
