"""CUDA graphs of a stage's decode steps: a step of some thousand launches becomes a few.

A graph covers what lies between two links. Where the experts are in this process that is the whole step,
from token ids to logits; where they are not, a step is cut at each mixture of experts, whose answer comes
over a link into a buffer that the next graph reads. No graph holds anything of a peer: replacing one
recaptures nothing.

A graph has fixed shapes, so there is one per bucket: numbers of sequences (powers of two) and the longest
context (powers of four), by which attention is cut into splits. A step takes the smallest that it fits; rows
without a sequence write no latents (slot -1), go to no expert, and are not sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from kernels import ROW_TILE
from kernels.ops import Cache, DeviceOps
from r1_cluster.models.batch import AttentionBatch, buckets
from r1_cluster.models.network import MoeCall, StageModel
from r1_cluster.records import StepPlan, pack_int32

logger = logging.getLogger(__name__)

_LEAST_REACH = 2048


class Graph(Protocol):
    """What torch.cuda.CUDAGraph is: recorded once, replayed over the same memory."""

    def replay(self) -> None: ...


Recorder = Callable[[], tuple[Graph, AbstractContextManager[None]]]
"""A new graph and the context that records into it. Graphs of one recorder share their scratch memory."""


def cuda_recorder() -> Recorder:
    """Graphs over one memory pool: they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def record() -> tuple[Graph, AbstractContextManager[None]]:
        graph = torch.cuda.CUDAGraph()
        return graph, cast(AbstractContextManager[None], torch.cuda.graph(graph, pool=pool))

    return record


def dummy_plan(num_new: Sequence[int], context_lens: Sequence[int], page_size: int) -> StepPlan:
    """A step over page 0 alone, before anybody's latents are there: sequence i brings `num_new[i]` tokens,
    the last ones of `context_lens[i]`."""
    num_pages = [-(-context_len // page_size) for context_len in context_lens]
    return StepPlan(
        epoch=0,
        step=0,
        micro_batch=0,
        seq_ids=[""] * len(num_new),
        num_cached=[context_len - new for context_len, new in zip(context_lens, num_new)],
        num_new=list(num_new),
        tokens=pack_int32(np.zeros(sum(num_new), dtype=np.int32)),
        num_pages=num_pages,
        pages=pack_int32(np.zeros(sum(num_pages), dtype=np.int32)),
        samples=[],
    )


@dataclass(frozen=True)
class _Segment:
    """A graph, what it leaves behind, and the layer whose mixture of experts comes next, None at the end."""

    graph: Graph
    layer: int | None
    out_TD: Tensor


class DecodeGraphs:
    """The graphs of one stage. `local` is its mixture of experts where that is in this process."""

    def __init__(
        self,
        stage: StageModel,
        caches: Sequence[Cache],
        page_size: int,
        *,
        max_num_seqs: int,
        max_context_len: int,
        local: MoeCall | None,
        record: Recorder,
    ) -> None:
        self.stage = stage
        self.caches = caches
        self.local = local
        self.num_real = torch.zeros(1, dtype=torch.int32, device=stage.shard.device)
        least = ROW_TILE if stage.shard.deterministic else 1
        sizes = buckets(-(-max_num_seqs // least) * least, least, 2)
        self.answer_TD = stage.hidden(sizes[-1])
        self.input_TD = None if stage.is_first else stage.hidden(sizes[-1])
        self.logits_SV = stage.empty_logits(sizes[-1]) if stage.is_last else None
        self._page_size = page_size
        self._record = record
        self._reaches = buckets(max_context_len, min(_LEAST_REACH, max_context_len), 4)
        self._sizes = sizes
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self.in_use = False

    @torch.inference_mode()
    def capture(self) -> None:
        """Records every bucket, the largest first, so that the others fit into its scratch memory."""
        for reach in reversed(self._reaches):
            for size in reversed(self._sizes):
                plan = dummy_plan([1] * size, [reach] * size, self._page_size)
                batch = AttentionBatch.from_plan(plan, self._page_size, self.stage.shard)
                self._graphs[size, reach] = DecodeGraph(self, batch, self._record)
        logger.info("captured decode steps of %s sequences × %s tokens", self._sizes, self._reaches)

    def fitting(self, batch: AttentionBatch) -> DecodeGraph | None:
        """The graph for a step, None if it is no decode step, larger than all of them, or if another step
        waits for its experts between two graphs: all graphs share the memory in which that one goes on."""
        if self.in_use:
            return None
        num_seqs, longest = len(batch.context_lens), max(batch.context_lens)
        if batch.num_tokens != num_seqs:
            return None
        size = next((size for size in self._sizes if size >= num_seqs), None)
        reach = next((reach for reach in self._reaches if reach >= longest), None)
        return None if size is None or reach is None else self._graphs[size, reach]


class DecodeGraph:
    """One bucket: `batch` holds the tensors that its graphs read."""

    def __init__(self, shared: DecodeGraphs, batch: AttentionBatch, record: Recorder) -> None:
        self._shared = shared
        self._batch = batch
        self._size = batch.num_rows
        self._segments: list[_Segment] = []
        # Compiles and tunes, which must not happen while a graph is recorded.
        walk = self._walk()
        step = next(walk)
        while step[0] is not None:
            step = next(walk)
        walk = self._walk()
        while not self._segments or self._segments[-1].layer is not None:
            graph, recording = record()
            with recording:
                layer, out_TD = next(walk)
            self._segments.append(_Segment(graph, layer, out_TD))

    def _walk(self) -> Generator[tuple[int | None, Tensor], None, None]:
        """The step over the static tensors, cut where a mixture of experts is asked over a link: by then its
        answer is in `answer_TD`. Ends with logits [S, V], or hidden states [S, D] where there is no head."""
        shared, batch = self._shared, self._batch
        if shared.input_TD is None:
            x_TD = shared.stage.embed(batch.token_ids_T)
        else:
            x_TD = shared.input_TD[: self._size]
        segments = shared.stage.segments(x_TD, batch, shared.caches)
        try:
            layer, normed_TD = next(segments)
            while True:
                if shared.local is not None:
                    answer_TD = shared.local(layer, normed_TD, self._size)
                else:
                    yield layer, normed_TD
                    answer_TD = shared.answer_TD[: self._size]
                layer, normed_TD = segments.send(answer_TD)
        except StopIteration as end:
            out_TD: Tensor = end.value
        if shared.logits_SV is not None:
            rows = torch.arange(self._size, device=out_TD.device)
            out_TD = shared.logits_SV[: self._size].copy_(shared.stage.logits(out_TD, rows))
        yield None, out_TD

    def segments(
        self, x_TD: Tensor | None, batch: AttentionBatch
    ) -> Generator[tuple[int, Tensor], Tensor, Tensor]:
        """A step, cut as `StageModel.segments` cuts it: hidden states of the stage before (None on the first)
        → logits of all its rows, or hidden states. The result is overwritten by the next step of any bucket.
        Its caller sets inference mode."""
        self._shared.in_use = True
        try:
            self._fill(x_TD, batch)
            num_rows = batch.num_rows
            for segment in self._segments:
                segment.graph.replay()
                if segment.layer is not None:
                    answer_TD = yield segment.layer, segment.out_TD[:num_rows]
                    self._shared.answer_TD[:num_rows].copy_(answer_TD)
            return self._segments[-1].out_TD[:num_rows]
        finally:
            self._shared.in_use = False

    def _fill(self, x_TD: Tensor | None, batch: AttentionBatch) -> None:
        shared, static, num_rows = self._shared, self._batch, batch.num_rows
        if shared.input_TD is not None:
            assert x_TD is not None
            shared.input_TD[:num_rows].copy_(x_TD)
        static.token_ids_T[:num_rows].copy_(batch.token_ids_T)
        static.positions_T[:num_rows].copy_(batch.positions_T)
        static.slots_T.fill_(-1)
        static.slots_T[: batch.num_tokens].copy_(batch.slots_T)
        shared.num_real.fill_(batch.num_tokens)
        cast(DeviceOps, shared.stage.ops).refill_(static.attention, batch.attention)
