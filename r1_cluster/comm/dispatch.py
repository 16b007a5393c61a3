"""Dispatch and combine: tokens to the experts that the gate chose, and back.

    dispatch   sort the (token, k) rows by the shard and expert they go to, send each shard its rows
    combine    take each shard's rows back, un-sort, and sum over k in order, weighted

`LocalDispatcher` calls the experts in this process and is the oracle of `LinkDispatcher`, which has a link
to each expert shard; both sort, un-sort and sum with the same functions. A shard's answer depends on its
rows alone and the sum has a fixed order, so both give the same bits.

Small steps on devices may be *broadcast* instead: every shard gets all tokens with their experts, and answers
the weighted sum of its own ones. Nothing is sorted and no index reaches the host; the sum's order differs.

A shard that is lost in mid-step leaves zeros in its rows; the others are still heard, in lock-step, and
`lost` tells the caller that the step must be done again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from r1_cluster.comm import wire
from r1_cluster.comm.links import Link, recv_epoch, wait_any
from r1_cluster.comm.wire import (
    Flags,
    Header,
    Kind,
    LinkClosed,
    LinkError,
    LinkTimeout,
    Message,
    Unsendable,
    WireError,
)
from r1_cluster.records import pack_int32, unpack_int32

if TYPE_CHECKING:
    from r1_cluster.comm.links import Device

logger = logging.getLogger(__name__)

SUM_BYTES = 2 << 20
"""On the CPU rows are weighted and summed so many bytes of float32 at a time: about what fits a core's cache,
and little enough for malloc to keep: the kernel's page faults are most of what a large sum costs."""

IntArray = npt.NDArray[np.int64]
# (layer, x_ND sorted by local expert, rows of each local expert) -> y_ND
ExpertsForward = Callable[[int, Tensor, Sequence[int]], Tensor]
# (layer, x_TD, weights_TK, expert_ids_TK, which of the own experts are asked, None for all) -> y_TD
ShareForward = Callable[[int, Tensor, Tensor, Tensor, Sequence[bool] | None], Tensor]


class StepTag(NamedTuple):
    """Which part of which step a dispatch belongs to."""

    epoch: int
    step: int
    layer: int
    micro_batch: int


class Dispatcher(Protocol):
    """One dispatch is followed by its combine before the next. `lost` names the peers that went missing
    since the caller last cleared it (it is a list to clear); while it is not empty, the step's result must
    not be committed. `device` is where it takes its tensors, and where its results are. `idle_s` grows by the
    time in which nobody computed: links, and waits that the experts' own operators do not explain; `waited_s`
    by all in which the caller itself did not, whoever else computed then."""

    @property
    def idle_s(self) -> float: ...

    @property
    def waited_s(self) -> float: ...

    @property
    def device(self) -> Device: ...

    @property
    def lost(self) -> list[str]: ...

    def dispatch(
        self, tag: StepTag, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, num_tokens: int
    ) -> None:
        """Starts the experts on the first `num_tokens` rows; the rest is padding and goes nowhere."""

    def combine(self) -> Tensor:
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
    (num_rows, top_k), width = weights_TK.shape, y_ND.shape[1]
    y_TD = y_ND.new_zeros((num_rows, width))
    places_KT = order.place_N.view(top_k, num_tokens)
    most = max(SUM_BYTES // (top_k * width * 4), 1) if y_ND.device.type == "cpu" else num_tokens
    for first in range(0, num_tokens, most):
        last = min(first + most, num_tokens)
        places_N = places_KT[:, first:last].reshape(-1)
        y_KTD = y_ND.index_select(0, places_N).view(top_k, last - first, width).float()
        y_KTD *= weights_TK[first:last].t().unsqueeze(2)
        sum_TD = y_KTD[0]
        for k in range(1, top_k):
            sum_TD += y_KTD[k]
        y_TD[first:last] = sum_TD
    return y_TD


class LocalDispatcher:
    """The experts of all layers in this process, behind one function, whose errors are the caller's. Or the
    experts `own` of them: combined are these alone, and other ranks add theirs."""

    def __init__(self, experts: ExpertsForward, num_experts: int, own: range | None = None) -> None:
        self.device: Device = "cpu"
        self.lost: list[str] = []
        self.idle_s = self.waited_s = 0.0
        self._experts = experts
        self._own = own or range(num_experts)
        self._owner_E = np.full(num_experts, -1, dtype=np.int64)
        self._owner_E[self._own] = 0
        self._running: tuple[Tensor, RowOrder, Tensor, int] | None = None

    def dispatch(
        self, tag: StepTag, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, num_tokens: int
    ) -> None:
        order = sort_rows(expert_ids_TK, num_tokens, self._owner_E)
        x_ND = x_TD.index_select(0, order.tokens_N[order.num_orphans :])
        counts = order.counts_E[self._own].tolist()
        y_ND = self._experts(tag.layer, x_ND, counts) if len(x_ND) else x_ND
        y_ND = F.pad(y_ND, (0, 0, order.num_orphans, 0)) if order.num_orphans else y_ND
        self._running = (y_ND, order, weights_TK, num_tokens)

    def combine(self) -> Tensor:
        if self._running is None:
            raise RuntimeError("combine without a dispatch")
        running, self._running = self._running, None
        return sum_rows(*running)


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


class _Piece(NamedTuple):
    """Tokens of a step that are dispatched together; see `Dispatcher.dispatch`."""

    x_TD: Tensor
    weights_TK: Tensor
    expert_ids_TK: Tensor
    num_tokens: int


class _Asked(NamedTuple):
    """A piece that is under way: what it was given, how its rows were sorted (None: broadcast), and the
    rows [first, last) that each link owes."""

    tag: StepTag
    x_TD: Tensor
    weights_TK: Tensor
    num_tokens: int
    order: RowOrder | None
    rows_of_link: dict[int, tuple[int, int]]


class LinkDispatcher:
    """One link to each expert shard; `shards[i]` are the experts behind `links[i]`.

    Every router sends to its shards in ascending order, and once it has sent it takes the answers as they
    come. With messages larger than a socket's buffers that keeps routers and shards from waiting for each
    other in a circle: a shard that waits for a router to read waits for one that sends to a later shard.

    `timeout_s` is how long a combine may take in all; the step's deadline, for the caller to set. A shard
    that is silent for so long, or gone, or answers nonsense, is lost: its link is closed and its experts
    are no longer asked (their rows are zero, and it is named in `lost` at each dispatch that needed it).
    An expert actor that raised answers TAINTED: it is named in `lost`, and in `errors` with what it said,
    but its link stands.

    Steps of up to `broadcast_tokens` are broadcast, while every expert has a living host.

    A step whose rows might not fit one message, were they all for one shard, goes in pieces, each of some
    tokens. The next is sent when all answers to the one before are here: the order above holds for each. What
    is Unsendable all the same is raised, and nobody counts as lost for it.
    """

    def __init__(
        self,
        links: Sequence[Link],
        shards: Sequence[Sequence[int]],
        timeout_s: float,
        broadcast_tokens: int = 0,
    ) -> None:
        if len(links) != len(shards):
            raise ValueError(f"{len(links)} links for {len(shards)} shards")
        self.errors: dict[str, str] = {}
        self.timeout_s = timeout_s
        self.broadcast_tokens = broadcast_tokens
        self._lost: list[str] = []
        self._links = list(links)
        self._map = ExpertMap(shards)
        self._dead = [False] * len(links)
        self._choose_owners()
        self.idle_s = self.waited_s = 0.0
        self._pieces: deque[_Piece] = deque()
        self._asked: _Asked | None = None
        self._num_padding = 0
        self._linked_s = 0.0

    @property
    def device(self) -> Device:
        return self._links[0].device

    @property
    def lost(self) -> list[str]:
        # A link may have been closed since by someone who watches it (see ProcessGroupLink).
        for i, link in enumerate(self._links):
            if link.closed and not self._dead[i]:
                self._lose(i, LinkClosed(f"the link to {link.peer} was closed"))
        return self._lost

    def dispatch(
        self, tag: StepTag, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, num_tokens: int
    ) -> None:
        row_bytes = expert_ids_TK.shape[1] * x_TD.shape[1] * x_TD.itemsize
        most = max(wire.MAX_PAYLOAD_BYTES // row_bytes, 1)
        self._pieces.clear()  # of a step that was given up
        if num_tokens <= most:
            self._num_padding = 0  # the piece has its own
            self._pieces.append(_Piece(x_TD, weights_TK, expert_ids_TK, num_tokens))
        else:
            self._num_padding = len(x_TD) - num_tokens
            parts = [torch.split(x[:num_tokens], most) for x in (x_TD, weights_TK, expert_ids_TK)]
            self._pieces.extend(_Piece(x, weights, ids, len(x)) for x, weights, ids in zip(*parts))
        self._ask(tag, may_broadcast=num_tokens <= self.broadcast_tokens)

    def _ask(self, tag: StepTag, *, may_broadcast: bool = False) -> None:
        """Sends the next piece."""
        x_TD, weights_TK, expert_ids_TK, num_tokens = self._pieces.popleft()
        self._linked_s = 0.0
        asked = _Asked(tag, x_TD, weights_TK, num_tokens, None, {})
        if may_broadcast and num_tokens and self._owner_E.min() >= 0:
            self._broadcast(asked, expert_ids_TK)
        else:
            asked = asked._replace(order=sort_rows(expert_ids_TK, num_tokens, self._owner_E))
            self._send_rows(asked)
        self._asked = asked

    def _broadcast(self, asked: _Asked, expert_ids_TK: Tensor) -> None:
        num_tokens = asked.num_tokens
        tensors = [x[:num_tokens] for x in (asked.x_TD, asked.weights_TK, expert_ids_TK)]
        header = Header(Kind.BROADCAST, *asked.tag, num_tokens)
        for i, (_, owned) in enumerate(self._shares):
            if owned.any() and self._sent(i, header, tensors, owned):
                asked.rows_of_link[i] = (0, num_tokens)

    def _send_rows(self, asked: _Asked) -> None:
        order = asked.order
        assert order is not None
        x_ND = asked.x_TD.index_select(0, order.tokens_N)
        if order.num_orphans:
            self._report_orphans(order)
        first = order.num_orphans
        # A loss while sending makes a new list, and leaves this one, by which the rows were sorted, alone.
        for i, (experts, owned) in enumerate(self._shares):
            counts = order.counts_E[experts] * owned
            num_rows = int(counts.sum())
            if num_rows:
                header = Header(Kind.DISPATCH, *asked.tag, num_rows)
                rows = x_ND[first : first + num_rows]
                if self._sent(i, header, [rows], counts):
                    asked.rows_of_link[i] = (first, first + num_rows)
                first += num_rows

    def _sent(self, i: int, header: Header, tensors: Sequence[Tensor], numbers: npt.NDArray[Any]) -> bool:
        """Sends to link i; whether it was there to be sent to."""
        began = time.perf_counter()
        try:
            self._links[i].send(header, tensors, pack_int32(numbers.astype(np.int32)))
        except (LinkClosed, LinkTimeout) as error:
            self._lose(i, error)
            return False
        finally:
            self._linked_s += time.perf_counter() - began
        return True

    def combine(self) -> Tensor:
        if self._asked is None:
            raise RuntimeError("combine without a dispatch")
        tag = self._asked.tag
        deadline = time.monotonic() + self.timeout_s
        parts = [self._collect(deadline)]
        while self._pieces:
            self._ask(tag)
            parts.append(self._collect(deadline))
        return parts[0] if len(parts) == 1 else F.pad(torch.cat(parts), (0, 0, 0, self._num_padding))

    def _collect(self, deadline: float) -> Tensor:
        """The outputs of the piece that was sent."""
        asked, self._asked = self._asked, None
        assert asked is not None
        began = time.perf_counter()
        answers, seconds = {}, {}
        for i, rows, compute_s in self._answers(asked, deadline):
            answers[i], seconds[i] = rows, compute_s
        linked_s = self._linked_s + time.perf_counter() - began
        self.waited_s += linked_s
        self.idle_s += max(linked_s - self._explained(seconds), 0.0)
        num_tokens = asked.num_tokens
        if asked.order is not None:
            y_ND = asked.x_TD.new_zeros((len(asked.order.tokens_N), asked.x_TD.shape[1]))
            for i, answer in answers.items():
                first, last = asked.rows_of_link[i]
                y_ND[first:last] = answer
            return sum_rows(y_ND, asked.order, asked.weights_TK, num_tokens)
        y_TD = torch.zeros_like(asked.x_TD)
        if answers:
            shares = [answers[i].float() for i in sorted(answers)]
            y_TD[:num_tokens] = reduce(torch.Tensor.add_, shares)
        return y_TD

    def _explained(self, seconds: dict[int, float]) -> float:
        """How long experts took, by link, → for how long they kept us: shards of other processes work side by
        side, those of this one while they are sent to."""
        here = [s for i, s in seconds.items() if self._links[i].fileno() < 0]
        elsewhere = [s for i, s in seconds.items() if self._links[i].fileno() >= 0]
        return sum(here) + max(elsewhere, default=0.0)

    def _answers(self, asked: _Asked, deadline: float) -> Iterator[tuple[int, Tensor, float]]:
        """(link, its rows, seconds that it computed), as they come; nothing of those that are lost or could
        not compute theirs."""
        waiting = {self._links[i]: i for i in asked.rows_of_link}
        while waiting:
            left_s = max(deadline - time.monotonic(), 0.0)
            ready = wait_any(list(waiting), left_s) if len(waiting) > 1 else []
            for link in ready or list(waiting):
                i = waiting.pop(link)
                try:
                    answer = self._answer(asked, i, max(deadline - time.monotonic(), 0.0))
                except Unsendable:
                    raise
                except LinkError as error:
                    self._lose(i, error)
                    continue
                if answer is not None:
                    yield i, *answer

    def _answer(self, asked: _Asked, i: int, timeout_s: float) -> tuple[Tensor, float] | None:
        """The rows of one shard's answer, and the time they took; None if it says that it could not compute
        them. Raises Unsendable if it says that it could not send them."""
        link, tag = self._links[i], asked.tag
        message = recv_epoch(link, tag.epoch, timeout_s)
        header = message.header
        if header[:5] != (Kind.COMBINE, *tag):
            raise WireError(f"{link.peer} answered with {header} to {tag}")
        if header.flags & Flags.REFUSED:
            raise Unsendable(f"{link.peer}: {message.body.decode(errors='replace')}")
        if header.flags & Flags.TAINTED:
            self._name_lost(link.peer)
            self.errors[link.peer] = message.body.decode(errors="replace")
            return None
        first, last = asked.rows_of_link[i]
        shape, dtype = (last - first, asked.x_TD.shape[1]), asked.x_TD.dtype
        answers = message.tensors
        if len(answers) != 1 or answers[0].shape != shape or answers[0].dtype != dtype:
            raise WireError(f"{link.peer} answered with other tensors than one {dtype} of shape {shape}")
        return answers[0], wire.unpack_seconds(message.body)

    def _lose(self, i: int, error: LinkError) -> None:
        link = self._links[i]
        # As text: whoever keeps log records would keep the error's frames, and with them a step's tensors.
        logger.warning("lost expert shard %d (%s): %s", i, link.peer, str(error))
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
        self._shares = [(experts, self._owner_E[experts] == i) for i, experts in enumerate(self._map.experts)]


def handle(message: Message, experts: ExpertsForward, share: ShareForward | None = None) -> Message:
    """An expert shard's answer to one DISPATCH or BROADCAST message (the latter only where it has `share`),
    for the loop that owns its links to send back; its body says how long the experts took.

    If the experts raise, the answer is TAINTED, without rows and with the error as its body, so that the
    router's step stays in lock-step. Raises WireError for a message that is neither.
    """
    header = message.header
    if header.kind == Kind.DISPATCH:
        compute = partial(experts, header.layer, *_check_dispatch(message))
    elif header.kind == Kind.BROADCAST and share is not None:
        compute = partial(share, header.layer, *_check_broadcast(message))
    else:
        raise WireError(f"an expert shard was sent {header}")
    reply = header._replace(kind=int(Kind.COMBINE))
    began = time.perf_counter()
    try:
        y_ND = compute()
        return Message(reply, (y_ND,), wire.pack_seconds(time.perf_counter() - began))
    except Exception as error:
        logger.exception("experts failed in %s", header)
        words = f"{type(error).__name__}: {error}"[:1000]
        return Message(reply._replace(flags=header.flags | Flags.TAINTED, rows=0), (), words.encode())


def _check_dispatch(message: Message) -> tuple[Tensor, list[int]]:
    """(x_ND, rows of each local expert). Raises WireError."""
    header = message.header
    if len(message.tensors) != 1 or len(message.body) % 4:
        raise WireError(f"a dispatch of {len(message.tensors)} tensors and {len(message.body)} bytes")
    x_ND = message.tensors[0]
    counts: list[int] = unpack_int32(message.body).tolist()
    num_rows = sum(counts)
    if x_ND.dim() != 2 or not x_ND.shape[0] == header.rows == num_rows or min(counts, default=0) < 0:
        raise WireError(f"{header.rows} rows, a tensor of shape {tuple(x_ND.shape)}, {num_rows} counted")
    return x_ND, counts


def _check_broadcast(message: Message) -> tuple[Tensor, Tensor, Tensor, list[bool] | None]:
    """(x_TD, weights_TK, expert_ids_TK, which local experts are asked, None for all). Raises WireError."""
    tensors = message.tensors
    if len(tensors) != 3 or len(message.body) % 4 or any(x.dim() != 2 for x in tensors):
        raise WireError(f"a broadcast of {len(tensors)} tensors and {len(message.body)} bytes")
    x_TD, weights_TK, ids_TK = tensors
    if not message.header.rows == len(x_TD) == len(weights_TK) or weights_TK.shape != ids_TK.shape:
        raise WireError(f"a broadcast of tensors of shapes {[tuple(x.shape) for x in tensors]}")
    asked: list[bool] = (unpack_int32(message.body) != 0).tolist()
    return x_TD, weights_TK, ids_TK, None if all(asked) else asked
