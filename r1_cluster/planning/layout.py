"""From a service's `layout` section and a model's sizes to the list of workers.

A worker is a process; it hosts a stage, a router, an expert shard, or several of them. Who must be
linked with whom follows from who hosts what, so that a further layout is one more function here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from r1_cluster.config import ConfigError, LayoutConfig

if TYPE_CHECKING:
    from r1_cluster.models.config import ModelConfig

Span = tuple[int, int]
"""Half-open range [first, end)."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """One worker process. `stage` and `router` are layer spans, `experts` a span of routed experts; a spare
    has none of them."""

    name: str
    stage: Span | None = None
    router: Span | None = None
    experts: Span | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role in ("stage", "router", "experts") if getattr(self, role) is not None)


@dataclass(frozen=True)
class Layout:
    """All workers of one engine, stages first, in pipeline order."""

    workers: tuple[WorkerSpec, ...]
    num_layers: int
    spares: tuple[WorkerSpec, ...] = ()

    @property
    def stages(self) -> tuple[WorkerSpec, ...]:
        return tuple(worker for worker in self.workers if worker.stage is not None)

    @property
    def shards(self) -> tuple[WorkerSpec, ...]:
        return tuple(worker for worker in self.workers if worker.experts is not None)

    def can_do_without(self, missing: Collection[str]) -> bool:
        """Whether a step needs none of the workers named: each is an expert shard with another host."""
        spans = {worker.experts for worker in self.shards if worker.name not in missing}
        lost = [worker for worker in self.workers if worker.name in missing]
        return all(worker.roles == ("experts",) and worker.experts in spans for worker in lost)

    def router_of(self, stage: WorkerSpec) -> WorkerSpec | None:
        """The worker whose router serves `stage`; None where the stage has dense layers only."""
        return next((w for w in self.workers if w.router is not None and w.router == stage.stage), None)

    def connects_to(self, worker: WorkerSpec) -> tuple[str, ...]:
        """Names of the workers to which `worker` opens a link (a link has one opener)."""
        targets: list[str] = []
        if worker.stage is not None:
            stages = self.stages
            index = stages.index(worker)
            if index + 1 < len(stages):
                targets.append(stages[index + 1].name)
            router = self.router_of(worker)
            if router is not None and router != worker:
                targets.append(router.name)
        if worker.router is not None:
            targets.extend(shard.name for shard in self.shards if shard != worker)
        return tuple(targets)


def build_layout(config: LayoutConfig, model: ModelConfig) -> Layout:
    """The layout of a service on a model; raises ConfigError with the numbers where it cannot be."""
    num_layers, moe_layers = model.num_hidden_layers, model.moe_layers
    stages = _spans(config.stages, num_layers, "layout.stages", "layers")
    shards: list[Span] = []
    if model.moe is None:
        _refuse_experts(config)
    else:
        num_experts = model.moe.n_routed_experts
        shards = _spans(config.expert_shards, num_experts, "layout.expert_shards", "experts")
    spares = tuple(WorkerSpec(f"spare-{i}") for i in range(config.spares))
    if config.kind == "colocated":
        if len(stages) > 1 or len(shards) > 1:
            raise ConfigError(
                f"layout.kind: colocated puts everything in one worker, but {len(stages)} stages and "
                f"{len(shards)} expert shards are asked for: use kind: disaggregated, or leave both out"
            )
        only = WorkerSpec("stage-0", stages[0])
        if moe_layers:
            only = WorkerSpec("stage-0", stages[0], stages[0], shards[0])
        if config.redundant_experts:
            raise ConfigError(
                "layout.redundant_experts: expert shards have further hosts in kind: disaggregated alone"
            )
        return Layout((only,), num_layers, spares)
    workers = [WorkerSpec(f"stage-{i}", stage=span) for i, span in enumerate(stages)]
    workers += [WorkerSpec(f"router-{i}", router=s) for i, s in enumerate(stages) if s[1] > moe_layers.start]
    workers += [WorkerSpec(f"experts-{i}", experts=span) for i, span in enumerate(shards)]
    for copy in range(1, config.redundant_experts + 1):
        workers += [WorkerSpec(f"experts-{i}-copy-{copy}", experts=span) for i, span in enumerate(shards)]
    return Layout(tuple(workers), num_layers, spares)


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
