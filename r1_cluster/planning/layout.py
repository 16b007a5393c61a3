"""From a service's `layout` section and a model's sizes to the list of workers.

A worker is a process; it hosts a stage, a router, an expert shard, or several of them. Who must be
linked with whom follows from who hosts what, so that a further layout is one more function here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from r1_cluster.config import ConfigError, LayoutConfig
from r1_cluster.models.config import GqaShape

if TYPE_CHECKING:
    from r1_cluster.models.config import ModelConfig

Span = tuple[int, int]
"""Half-open range [first, end)."""


LEAST_DECODES = 32
"""So many sequences decode in a step before a further one is sent at the same time, unless a service file
asks for micro-batches: fewer cost more in two steps than in one (docs/layouts.md)."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """One worker process. `stage` and `router` are layer spans, `experts` a span of routed experts; a spare
    has none of them. By tensor parallelism it is the `rank` of so many `ranks` that divide its stage and
    what else is there with that. With data parallelism its stage computes the sequences of `data_rank`, and
    `copies` are spans of routed experts that it holds for the death of others."""

    name: str
    stage: Span | None = None
    router: Span | None = None
    experts: Span | None = None
    rank: int = 0
    ranks: int = 1
    data_rank: int = 0
    copies: tuple[Span, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role in ("stage", "router", "experts") if getattr(self, role) is not None)


@dataclass(frozen=True)
class Layout:
    """All workers of one engine, stages first, in pipeline order, each one's ranks one after the other."""

    workers: tuple[WorkerSpec, ...]
    num_layers: int
    spares: tuple[WorkerSpec, ...] = ()

    @cached_property
    def stages(self) -> tuple[tuple[WorkerSpec, ...], ...]:
        """The ranks of each stage, those of a data rank one after the other."""
        of_stages = [worker for worker in self.workers if worker.stage is not None]
        groups = itertools.groupby(of_stages, lambda worker: (worker.data_rank, worker.stage))
        return tuple(tuple(ranks) for _, ranks in groups)

    @cached_property
    def first_stages(self) -> tuple[tuple[WorkerSpec, ...], ...]:
        """The ranks of each data rank's first stage, who are sent its plans."""
        return tuple(ranks for ranks in self.stages if ranks[0].stage is not None and not ranks[0].stage[0])

    def whole_data_ranks(self, missing: Collection[str]) -> list[int]:
        """Those that can compute without the workers named."""
        broken = {worker.data_rank for worker in self.workers if worker.name in missing and worker.stage}
        return [rank for rank in range(len(self.first_stages)) if rank not in broken]

    def exchange_of(self, worker: WorkerSpec) -> tuple[WorkerSpec, ...]:
        """Those with whom a worker exchanges rows at every mixture, it among them, by data rank; none where
        its experts are asked in another way."""
        if len(self.first_stages) == 1:
            return ()
        return tuple(other for other in self.workers if other.rank == worker.rank)

    def micro_batches(self, device: str) -> int:
        """How many steps may be in flight where a service file does not say it: one for each stage, and at
        least two where a stage and its router are apart, so that one attends while the other's experts work.
        On a device a stage keeps the graphs of one step alone, between whose parts there is no other."""
        apart = any(worker.router is not None and worker.stage is None for worker in self.workers)
        if device != "cpu" and apart:
            return 1
        return max(len(self.stages) // len(self.first_stages), 2 if apart else 1)

    def ranks_of(self, worker: WorkerSpec) -> tuple[WorkerSpec, ...]:
        """All ranks of a worker's stage, it among them."""
        return next(ranks for ranks in self.stages if worker in ranks)

    def has_its_experts(self, worker: WorkerSpec) -> bool:
        """Whether all experts that a worker's router asks are in the same process; with ranks, those that it
        adds to the mixture."""
        both = worker.router is not None and worker.experts is not None and not self.exchange_of(worker)
        return both and (worker.ranks > 1 or self.shards == (worker,))

    @property
    def shards(self) -> tuple[WorkerSpec, ...]:
        return tuple(worker for worker in self.workers if worker.experts is not None)

    def can_do_without(self, missing: Collection[str]) -> bool:
        """Whether a step needs none of the workers named: their experts have another host, and a data rank is
        left that can compute. One that lacks a worker takes no part with its others either."""
        whole = self.whole_data_ranks(missing)
        lost = [worker for worker in self.workers if worker.name in missing]
        spans = {span for w in self.takes_part(missing) for span in (w.experts, *w.copies)}
        replaced = all(shard.experts in spans for shard in self.shards)
        return bool(whole) and replaced and all(worker.experts is not None for worker in lost)

    def takes_part(self, missing: Collection[str]) -> list[WorkerSpec]:
        """The workers of a step without those named."""
        whole = self.whole_data_ranks(missing)
        return [
            worker
            for worker in self.workers
            if worker.name not in missing and (worker.stage is None or worker.data_rank in whole)
        ]

    def router_of(self, stage: WorkerSpec) -> WorkerSpec | None:
        """The worker whose router serves `stage`: itself, where it has one. None where the stage has dense
        layers only, and where another rank asks for all."""
        if stage.router is not None:
            return stage
        if stage.rank:
            return None
        return next((w for w in self.workers if w.router is not None and w.router == stage.stage), None)

    def connects_to(self, worker: WorkerSpec) -> tuple[str, ...]:
        """Names of the workers to which `worker` opens a link (a link has one opener)."""
        targets: list[str] = []
        if worker.stage is not None:
            ranks = self.ranks_of(worker)
            targets.extend(other.name for other in ranks[worker.rank + 1 :])
            targets.extend(o.name for o in self.exchange_of(worker) if o.data_rank > worker.data_rank)
            if following := self.following(worker):
                targets.append(following)
            router = self.router_of(worker)
            if router is not None and router != worker:
                targets.append(router.name)
        if worker.router is not None and not self.has_its_experts(worker) and not self.exchange_of(worker):
            targets.extend(shard.name for shard in self.shards if shard != worker)
        return tuple(targets)

    def following(self, worker: WorkerSpec) -> str | None:
        """Whom a stage's worker gives hidden states: the same rank of the next stage. None of the last."""
        stages = [ranks for ranks in self.stages if ranks[0].data_rank == worker.data_rank]
        index = stages.index(self.ranks_of(worker))
        return stages[index + 1][worker.rank].name if index + 1 < len(stages) else None


def build_layout(config: LayoutConfig, model: ModelConfig) -> Layout:
    """The layout of a service on a model; raises ConfigError with the numbers where it cannot be."""
    num_layers, moe_layers = model.num_hidden_layers, model.moe_layers
    spares = tuple(WorkerSpec(f"spare-{i}") for i in range(config.spares))
    if config.kind == "expert-parallel":
        return Layout(tuple(_expert_parallel(config, model)), num_layers, spares)
    if config.data_parallel > 1:
        raise ConfigError(
            f"layout.data_parallel: {config.data_parallel} data ranks are those of kind: expert-parallel; "
            f"for engines side by side, which share nothing, use engine.replicas: {config.data_parallel}"
        )
    _check_ranks(config.tensor_parallel, model)
    stages = _spans(config.stages, num_layers, "layout.stages", "layers")
    shards: list[Span] = []
    if model.moe is None:
        _refuse_experts(config)
    else:
        num_experts = model.moe.n_routed_experts
        shards = _spans(config.expert_shards, num_experts, "layout.expert_shards", "experts")
    if config.kind == "colocated":
        if len(stages) > 1 or len(shards) > 1:
            raise ConfigError(
                f"layout.kind: colocated puts everything in one worker, but {len(stages)} stages and "
                f"{len(shards)} expert shards are asked for: use kind: disaggregated, or leave both out"
            )
        num_ranks = config.tensor_parallel
        only = _ranks("stage-0", stages[0], num_ranks)
        if moe_layers:
            own = _spans(num_ranks, shards[0][1], "layout.tensor_parallel", "experts")
            only = [
                msgspec.structs.replace(rank, router=stages[0], experts=span) for rank, span in zip(only, own)
            ]
        if config.redundant_experts:
            raise ConfigError(
                "layout.redundant_experts: in kind: colocated all experts are in one place; they have"
                " further hosts in disaggregated and expert-parallel"
            )
        return Layout(tuple(only), num_layers, spares)
    workers = [
        rank for i, span in enumerate(stages) for rank in _ranks(f"stage-{i}", span, config.tensor_parallel)
    ]
    workers += [WorkerSpec(f"router-{i}", router=s) for i, s in enumerate(stages) if s[1] > moe_layers.start]
    workers += [WorkerSpec(f"experts-{i}", experts=span) for i, span in enumerate(shards)]
    for copy in range(1, config.redundant_experts + 1):
        workers += [WorkerSpec(f"experts-{i}-copy-{copy}", experts=span) for i, span in enumerate(shards)]
    return Layout(tuple(workers), num_layers, spares)


def _expert_parallel(config: LayoutConfig, model: ModelConfig) -> list[WorkerSpec]:
    """Workers with every role. Experts are divided among the ranks of tensor parallelism, and each one's
    among the data ranks: a rank sends tokens to its peers of the same rank, and adds up with the others."""
    data_ranks, ranks, copies = config.data_parallel, config.tensor_parallel, config.redundant_experts
    if model.moe is None:
        raise ConfigError(
            "layout.kind: expert-parallel divides experts, and the model has none: use colocated, with "
            "tensor_parallel where one device is not enough, or engine.replicas for more requests"
        )
    if config.stages != 1 or config.expert_shards != 1:
        raise ConfigError(
            "layout.stages and layout.expert_shards: in kind: expert-parallel every data rank has all layers "
            "and its part of the experts, as data_parallel says: leave them out"
        )
    _check_ranks(ranks, model)
    num_experts = model.moe.n_routed_experts
    if data_ranks < 2 or data_ranks * ranks > num_experts:
        most = num_experts // ranks
        words = (
            f"at least 2 data ranks, and at most {most}" if most > 1 else "at least 2 data ranks, too many"
        )
        raise ConfigError(
            f"layout.data_parallel: {data_ranks} data ranks of {ranks} workers are asked for; "
            f"kind: expert-parallel has {words} for {num_experts} experts"
        )
    if copies >= data_ranks:
        raise ConfigError(
            f"layout.redundant_experts: {copies} further hosts of each part of the experts are asked for, "
            f"but there are only {data_ranks - 1} other data ranks"
        )
    spans = _spans(data_ranks * ranks, num_experts, "layout.data_parallel", "experts")
    layers = (0, model.num_hidden_layers)
    workers = []
    for data_rank in range(data_ranks):
        for each in _ranks(f"dp-{data_rank}", layers, ranks):
            own = spans[each.rank * data_ranks : (each.rank + 1) * data_ranks]
            further = tuple(sorted(own[(data_rank + i) % data_ranks] for i in range(1, copies + 1)))
            workers.append(
                msgspec.structs.replace(
                    each, router=layers, experts=own[data_rank], data_rank=data_rank, copies=further
                )
            )
    return workers


def _ranks(stage: str, span: Span, num_ranks: int) -> list[WorkerSpec]:
    if num_ranks == 1:
        return [WorkerSpec(stage, span)]
    return [WorkerSpec(f"{stage}-rank-{r}", span, rank=r, ranks=num_ranks) for r in range(num_ranks)]


def _check_ranks(num_ranks: int, model: ModelConfig) -> None:
    """Raises ConfigError for a number of ranks that cannot divide a model, with the nearest that can."""
    if num_ranks == 1:
        return
    shape = model.attention
    heads = shape.num_attention_heads
    kv_heads = shape.num_key_value_heads if isinstance(shape, GqaShape) else heads
    inner = [model.intermediate_size]
    if model.moe is not None:
        inner.append(model.moe.shared_intermediate_size)

    def fits(ranks: int) -> bool:
        shared = kv_heads % ranks == 0 or ranks % kv_heads == 0
        return heads % ranks == 0 and shared and ranks <= min(*inner, model.vocab_size)

    if not fits(num_ranks):
        nearest = max(ranks for ranks in range(1, num_ranks) if fits(ranks))
        keys = f" and {kv_heads} heads of keys" if kv_heads != heads else ""
        raise ConfigError(
            f"layout.tensor_parallel: {num_ranks} ranks cannot divide {heads} attention heads{keys}, with "
            f"{' and '.join(map(str, inner))} hidden units; the next smaller number that can is {nearest}"
        )


def _refuse_experts(config: LayoutConfig) -> None:
    """Raises ConfigError where a layout divides the experts of a model that has none."""
    asked = [
        f"layout.{key}: {value!r}"
        for key, value, none in (
            ("expert_shards", config.expert_shards, 1),
            ("redundant_experts", config.redundant_experts, 0),
        )
        if value != none
    ]
    if asked:
        raise ConfigError(f"{' and '.join(asked)}, but the model has no experts: leave it out")


def _spans(wanted: int | list[str], total: int, key: str, what: str) -> list[Span]:
    if isinstance(wanted, int):
        if wanted > total:
            raise ConfigError(f"{key}: {wanted} parts are asked for, but the model has only {total} {what}")
        bounds = [total * i // wanted for i in range(wanted + 1)]
        return list(itertools.pairwise(bounds))
    spans: list[Span] = []
    expected = 0
    for text in wanted:
        match = re.fullmatch(r"(\d+)-(\d+)", text)
        if match is None or int(match[1]) > int(match[2]):
            raise ConfigError(
                f'{key}: {text!r} is no range; write the first and last of the {what}, as "0-3"'
            )
        first, last = int(match[1]), int(match[2])
        if first != expected:
            raise ConfigError(
                f"{key}: {text!r} should start at {expected}: the ranges must cover {what} 0 to {total - 1} "
                "in order, without gap or overlap"
            )
        spans.append((first, last + 1))
        expected = last + 1
    if expected != total:
        raise ConfigError(f"{key}: the ranges cover {expected} {what}, but the model has {total}")
    return spans
