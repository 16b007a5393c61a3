"""Dispatch and combine: tokens to the experts that the gate chose, and back.

    dispatch   sort the (token, k) rows by the shard and expert they go to, send each shard its rows
    combine    take each shard's rows back, un-sort, and sum over k in order, weighted

`LocalDispatcher` calls the experts in this process and is the oracle of `LinkDispatcher`, which has a link
to each expert shard; both sort, un-sort and sum with the same functions. A shard's answer depends on its
rows alone and the sum has a fixed order, so both give the same bits.

A shard that is lost in mid-step leaves zeros in its rows; the others are still heard, in lock-step, and
`lost` tells the caller that the step must be done again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from r1_cluster.comm.links import Link, recv_epoch
from r1_cluster.comm.wire import Flags, Header, Kind, LinkClosed, LinkError, LinkTimeout, Message, WireError
from r1_cluster.records import pack_int32, unpack_int32

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
# (layer, x_ND sorted by local expert, rows of each local expert) -> y_ND
ExpertsForward = Callable[[int, Tensor, Sequence[int]], Tensor]


class StepTag(NamedTuple):
    """Which part of which step a dispatch belongs to."""

    epoch: int
    step: int
    layer: int
    micro_batch: int


class Dispatcher(Protocol):
    """One dispatch is followed by its combine before the next. `lost` names the peers that went missing
    since the caller last cleared it (it is a list to clear); while it is not empty, the step's result must
    not be committed."""

    @property
    def lost(self) -> list[str]: ...

    def dispatch(self, tag: StepTag, x_TD: Tensor, expert_ids_TK: Tensor, num_tokens: int) -> None:
        """Starts the experts on the first `num_tokens` rows; the rest is padding and goes nowhere."""

    def combine(self, weights_TK: Tensor) -> Tensor:
        """y_TD in x's dtype: y[t] = Σ_k weights[t, k] · expert_k(x[t]), added in the order of k in float32;
        padding rows are zero."""


class RowOrder(NamedTuple):
    """The N = num_tokens · K rows of a step, sorted by owner and expert.

    `tokens_N[i]` is the token of sorted row i, `place_N[k · num_tokens + t]` the sorted row of (t, k),
    `counts_E` the rows of each expert. The first `num_orphans` sorted rows have no owner.
    """

    tokens_N: Tensor
    place_N: Tensor
    counts_E: IntArray
    num_orphans: int


def sort_rows(expert_ids_TK: Tensor, num_tokens: int, owner_E: IntArray) -> RowOrder:
    """Stable sort of the real tokens' rows by `owner_E[expert]` (-1: nobody), then by expert.

    Index arithmetic is the host's: which rows go where must be known to the host to be sent, so device
    tensors cost the one copy of the ids here.
    """
    num_experts = len(owner_E)
    ids_NK = expert_ids_TK[:num_tokens].cpu().numpy()
    top_k = ids_NK.shape[1]
    ids_N = ids_NK.ravel()
    counts_E = np.bincount(ids_N, minlength=num_experts)
    if len(counts_E) > num_experts:
        raise ValueError(f"the gate chose expert {len(counts_E) - 1} of {num_experts}")
    keys_E = owner_E * num_experts + np.arange(num_experts)
    order_N = np.argsort(keys_E[ids_N], kind="stable")
    place_N = np.empty_like(order_N)
    # Laid out by k first: the sum over k then adds whole blocks.
    place_N[(order_N % top_k) * num_tokens + order_N // top_k] = np.arange(len(order_N))
    device = expert_ids_TK.device
    return RowOrder(
        torch.from_numpy(order_N // top_k).to(device),
        torch.from_numpy(place_N).to(device),
        counts_E,
        int(counts_E[owner_E < 0].sum()),
    )


def sum_rows(y_ND: Tensor, order: RowOrder, weights_TK: Tensor, num_tokens: int) -> Tensor:
    """Sorted rows' outputs y_ND → y_TD with zeros for padding. The sum's order is that of k, one addition
    after the other, so it does not depend on who shares the batch."""
    num_rows, top_k = weights_TK.shape
    y_TD = y_ND.new_zeros((num_rows, y_ND.shape[1]))
    if num_tokens:
        y_KTD = y_ND[order.place_N].view(top_k, num_tokens, -1)
        weighted_KTD = y_KTD * weights_TK[:num_tokens].t().unsqueeze(2)
        sum_TD = weighted_KTD[0]
        for k in range(1, top_k):
            sum_TD += weighted_KTD[k]
        y_TD[:num_tokens] = sum_TD
    return y_TD


class LocalDispatcher:
    """The experts of all layers in this process, behind one function, whose errors are the caller's."""

    def __init__(self, experts: ExpertsForward, num_experts: int) -> None:
        self.lost: list[str] = []
        self._experts = experts
        self._owner_E = np.zeros(num_experts, dtype=np.int64)
        self._running: tuple[Tensor, RowOrder, int] | None = None

    def dispatch(self, tag: StepTag, x_TD: Tensor, expert_ids_TK: Tensor, num_tokens: int) -> None:
        order = sort_rows(expert_ids_TK, num_tokens, self._owner_E)
        x_ND = x_TD[order.tokens_N]
        y_ND = self._experts(tag.layer, x_ND, order.counts_E.tolist()) if num_tokens else x_ND
        self._running = (y_ND, order, num_tokens)

    def combine(self, weights_TK: Tensor) -> Tensor:
        if self._running is None:
            raise RuntimeError("combine without a dispatch")
        y_ND, order, num_tokens = self._running
        self._running = None
        return sum_rows(y_ND, order, weights_TK, num_tokens)


class ExpertMap:
    """Which link answers for which expert: the one table of it.

    `hosts[e]` are the links that hold expert e, the first choice first; `experts[i]` the experts of link
    i in its own order, which is the order of the counts it is sent.
    """

    def __init__(self, shards: Sequence[Sequence[int]]) -> None:
        """`shards[i]` are the experts of link i. Raises ValueError if experts 0 … max are not all there."""
        num_experts = 1 + max((expert for shard in shards for expert in shard), default=-1)
        self.experts = [np.array(shard, dtype=np.int64) for shard in shards]
        self.hosts: list[list[int]] = [[] for _ in range(num_experts)]
        for i, shard in enumerate(shards):
            if list(shard) != sorted(set(shard)):
                raise ValueError(f"shard {i} must name each of its experts once, in ascending order: {shard}")
            for expert in shard:
                self.hosts[expert].append(i)
        missing = [expert for expert, links in enumerate(self.hosts) if not links]
        if missing or not num_experts:
            raise ValueError(f"no shard holds the experts {missing}")

    def owners(self, dead: Sequence[bool]) -> IntArray:
        """The link to ask for each expert, [E]; -1 where all of its hosts are dead."""
        return np.array(
            [next((i for i in links if not dead[i]), -1) for links in self.hosts],
            dtype=np.int64,
        )


class _Sent(NamedTuple):
    """Rows first … last of a dispatch, for which link i owes an answer."""

    link: int
    first: int
    last: int


class LinkDispatcher:
    """One link to each expert shard; `shards[i]` are the experts behind `links[i]`.

    Every router sends to its shards in ascending order and receives after it has sent: with large
    messages that order is what keeps routers and shards from waiting for each other in a circle.

    `timeout_s` is how long a combine may take in all; the step's deadline, for the caller to set. A shard
    that is silent for so long, or gone, or answers nonsense, is lost: its link is closed and its experts
    are no longer asked (their rows are zero, and it is named in `lost` at each dispatch that needed it)
    until `replace_link`. An expert actor that raised answers TAINTED: it is named in `lost`, and in
    `errors` with what it said, but its link stands.
    """

    def __init__(self, links: Sequence[Link], shards: Sequence[Sequence[int]], timeout_s: float) -> None:
        if len(links) != len(shards):
            raise ValueError(f"{len(links)} links for {len(shards)} shards")
        self.errors: dict[str, str] = {}
        self.timeout_s = timeout_s
        self._lost: list[str] = []
        self._links = list(links)
        self._map = ExpertMap(shards)
        self._dead = [False] * len(links)
        self._choose_owners()
        self._tag = StepTag(0, 0, 0, 0)
        self._x_TD: Tensor | None = None
        self._order: RowOrder | None = None
        self._sent: list[_Sent] = []
        self._num_tokens = 0

    @property
    def lost(self) -> list[str]:
        # A link may have been closed since by someone who watches it (see ProcessGroupLink).
        for i, link in enumerate(self._links):
            if link.closed and not self._dead[i]:
                self._lose(i, LinkClosed(f"the link to {link.peer} was closed"))
        return self._lost

    def replace_link(self, i: int, link: Link) -> None:
        """A new link to shard i, which is asked again from the next dispatch on. Between steps only."""
        self._links[i].close()
        self._links[i] = link
        self._set_dead(i, False)

    def dispatch(self, tag: StepTag, x_TD: Tensor, expert_ids_TK: Tensor, num_tokens: int) -> None:
        order = sort_rows(expert_ids_TK, num_tokens, self._owner_E)
        x_ND = x_TD[order.tokens_N]
        self._tag, self._x_TD, self._order, self._num_tokens = tag, x_TD, order, num_tokens
        self._sent = []
        if order.num_orphans:
            self._report_orphans(order)
        first = order.num_orphans
        # A loss while sending makes a new list, and leaves this one, by which the rows were sorted, alone.
        for i, (experts, owned) in enumerate(self._asked):
            counts = order.counts_E[experts] * owned
            num_rows = int(counts.sum())
            if not num_rows:
                continue
            header = Header(Kind.DISPATCH, tag.epoch, tag.step, tag.layer, tag.micro_batch, num_rows)
            last = first + num_rows
            try:
                self._links[i].send(header, (x_ND[first:last],), pack_int32(counts.astype(np.int32)))
                self._sent.append(_Sent(i, first, last))
            except (LinkClosed, LinkTimeout) as error:
                self._lose(i, error)
            first = last

    def combine(self, weights_TK: Tensor) -> Tensor:
        x_TD, order = self._x_TD, self._order
        if x_TD is None or order is None:
            raise RuntimeError("combine without a dispatch")
        self._x_TD = self._order = None
        y_ND = x_TD.new_zeros((len(order.tokens_N), x_TD.shape[1]))
        deadline = time.monotonic() + self.timeout_s
        for sent in self._sent:
            try:
                answer = self._answer(sent, x_TD, max(deadline - time.monotonic(), 0.0))
                if answer is not None:
                    y_ND[sent.first : sent.last] = answer
            except LinkError as error:
                self._lose(sent.link, error)
        return sum_rows(y_ND, order, weights_TK, self._num_tokens)

    def _answer(self, sent: _Sent, x_TD: Tensor, timeout_s: float) -> Tensor | None:
        """The rows of one shard's answer; None if it says that it could not compute them."""
        link, tag = self._links[sent.link], self._tag
        message = recv_epoch(link, tag.epoch, timeout_s)
        header = message.header
        if header[:5] != (Kind.COMBINE, *tag):
            raise WireError(f"{link.peer} answered with {header} to {tag}")
        if header.flags & Flags.TAINTED:
            self._name_lost(link.peer)
            self.errors[link.peer] = message.body.decode(errors="replace")
            return None
        shape = (sent.last - sent.first, x_TD.shape[1])
        answers = message.tensors
        if len(answers) != 1 or answers[0].shape != shape or answers[0].dtype != x_TD.dtype:
            raise WireError(f"{link.peer} answered with other tensors than one {x_TD.dtype} of shape {shape}")
        return answers[0]

    def _lose(self, i: int, error: LinkError) -> None:
        link = self._links[i]
        logger.warning("lost expert shard %d (%s): %s", i, link.peer, error)
        link.close()
        self._name_lost(link.peer)
        self._set_dead(i, True)

    def _report_orphans(self, order: RowOrder) -> None:
        for expert in np.flatnonzero((self._owner_E < 0) & (order.counts_E > 0)):
            for i in self._map.hosts[expert]:
                self._name_lost(self._links[i].peer)

    def _name_lost(self, peer: str) -> None:
        if peer not in self._lost:
            self._lost.append(peer)

    def _set_dead(self, i: int, dead: bool) -> None:
        self._dead[i] = dead
        self._choose_owners()

    def _choose_owners(self) -> None:
        self._owner_E = self._map.owners(self._dead)
        # For each link its experts, and whether it is the one to ask for each of them now.
        self._asked = [(experts, self._owner_E[experts] == i) for i, experts in enumerate(self._map.experts)]


def handle(message: Message, experts: ExpertsForward) -> Message:
    """An expert shard's answer to one DISPATCH message, for the loop that owns its links to send back.

    If the experts raise, the answer is TAINTED, without rows and with the error as its body, so that the
    router's step stays in lock-step. Raises WireError for a message that is no dispatch.
    """
    header = message.header
    if header.kind != Kind.DISPATCH or len(message.tensors) != 1 or len(message.body) % 4:
        raise WireError(f"an expert shard was sent {header} with {len(message.tensors)} tensors")
    x_ND = message.tensors[0]
    counts: list[int] = unpack_int32(message.body).tolist()
    num_rows = sum(counts)
    if x_ND.dim() != 2 or not x_ND.shape[0] == header.rows == num_rows or min(counts, default=0) < 0:
        raise WireError(f"{header.rows} rows, a tensor of shape {tuple(x_ND.shape)}, {num_rows} counted")
    reply = header._replace(kind=int(Kind.COMBINE))
    try:
        y_ND = experts(header.layer, x_ND, counts)
    except Exception as error:
        logger.exception("experts failed in %s", header)
        words = f"{type(error).__name__}: {error}"[:1000]
        return Message(reply._replace(flags=header.flags | Flags.TAINTED, rows=0), (), words.encode())
    return Message(reply, (y_ND,))
