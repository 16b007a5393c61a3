"""Where an engine's workers go: which share a node, what they ask of it, and whether the nodes have it.

Plain data, for `actors.cluster` to carry out. What is refused here could never be placed; a layout that is
not refused may still have to wait where others fill the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from r1_cluster.config import ConfigError, LayoutConfig, Service
from r1_cluster.planning.layout import Layout, WorkerSpec

ACCELERATORS = {"cuda": "GPU", "npu": "NPU"}
"""Ray's names for the devices of `layout.device`, of which a worker has one to itself."""

# What the Serve deployments ask for; the ingress and the engine's scheduler are light.
INGRESS_CPUS = 0.1
ENGINE_CPUS = 0.1

Resources = Mapping[str, float]
"""Amounts by Ray's names: of a node, or what is asked of one."""


class Seat(NamedTuple):
    """A place for one worker: a bundle of the engine's placement group for a failure domain."""

    domain: str
    bundle: int


class Group(NamedTuple):
    """A placement group: what each of its bundles asks of a node, and Ray's strategy for them."""

    bundles: list[dict[str, float]]
    strategy: str


def domain_of(worker: WorkerSpec) -> str:
    """The failure domain, and so the placement group, of a worker: stages with their routers, experts, or
    spares."""
    if not worker.roles:
        return "spares"
    return "experts" if worker.roles == ("experts",) else "stages"


def worker_resources(service: Service) -> dict[str, float]:
    """What one worker asks of a node."""
    resources = {"CPU": service.layout.cpus_per_worker}
    if accelerator := ACCELERATORS.get(service.layout.device):
        resources[accelerator] = 1.0
    return resources


def groups_of(service: Service, layout: Layout) -> tuple[dict[str, Group], dict[str, Seat]]:
    """(domain → group, worker → seat) of one engine.

    With `layout.spread` a bundle holds a stage's worker with its router, or an expert shard, each on a node
    of its own; without, all of a group's bundles are packed. Spares are spread where nodes are.
    """
    each = worker_resources(service)
    groups: dict[str, Group] = {}
    seats: dict[str, Seat] = {}
    workers = (*layout.workers, *layout.spares)
    for domain in dict.fromkeys(domain_of(worker) for worker in workers):
        members = [worker for worker in workers if domain_of(worker) == domain]
        anchors = [worker for worker in members if worker.stage is not None or domain != "stages"]
        bundles: list[dict[str, float]] = [{} for _ in anchors]
        for worker in members:
            index = next(
                i
                for i, anchor in enumerate(anchors)
                # A router apart from its stage sits with the first rank, which alone asks it.
                if anchor is worker
                or (worker.router is not None and worker.stage is None and anchor.stage == worker.router)
            )
            seats[worker.name] = Seat(domain, index)
            for key, amount in each.items():
                bundles[index][key] = bundles[index].get(key, 0) + amount
        strategy = "PACK"
        if service.layout.spread:
            strategy = "SPREAD" if domain == "spares" else "STRICT_SPREAD"
        groups[domain] = Group(bundles, strategy)
    return groups, seats


def check_placement(
    service: Service,
    layout: Layout,
    nodes: Sequence[Resources],
    build: Callable[[LayoutConfig], Layout],
) -> None:
    """Raises ConfigError, with the numbers and the nearest layout that fits, if `nodes` cannot hold a
    service. `build` makes the layout of another section `layout` on the same model, or raises ConfigError."""
    fault = _fault(service, layout, nodes)
    if fault is None:
        return
    asked = service.layout

    def fits(config: LayoutConfig) -> bool:
        changed = service.model_copy(update={"layout": config})
        try:
            return _fault(changed, build(config), nodes) is None
        except ConfigError:  # it does not divide the model
            return False

    ways = []
    if (nearest := nearest_layout(asked, fits)) is not None:
        lower = {key: getattr(nearest, key) for key in _smallest(asked)}
        lower = {key: value for key, value in lower.items() if value != getattr(asked, key)}
        ways.append(" with ".join(f"layout.{key}: {value}" for key, value in lower.items()))
    for share in _shares(service, layout, nodes):
        if fits(asked.model_copy(update={"cpus_per_worker": share})):
            ways.append(f"layout.cpus_per_worker: {share:g}")
            break
    if asked.spread and fits(asked.model_copy(update={"spread": False})):
        ways.append("layout.spread: false")
    advice = f"what fits is {', or '.join(ways)}" if ways else "no smaller one of its kind fits"
    raise ConfigError(f"{fault}; {advice}")


def nearest_layout(config: LayoutConfig, fits: Callable[[LayoutConfig], bool]) -> LayoutConfig | None:
    """The layout that `fits` and is nearest to one that does not: as few of its numbers are lowered as can
    be, and none further than it must. None where not even the smallest fits."""
    lowest, all_smallest = config, _smallest(config)
    for key, smallest in all_smallest.items():
        if _number(getattr(config, key)) > smallest:
            lowest = lowest.model_copy(update={key: smallest})
        if fits(lowest):
            break
    else:
        return None
    for key in reversed(all_smallest):  # and up again, one after the other
        value = getattr(config, key)
        for number in range(_number(value), _number(getattr(lowest, key)), -1):
            # Ranges that someone wrote down stay as they are, if they are as many.
            higher = lowest.model_copy(update={key: value if number == _number(value) else number})
            if fits(higher):
                lowest = higher
                break
    return lowest


def _smallest(config: LayoutConfig) -> dict[str, int]:
    """The numbers of a layout that may be lowered until it fits, those first that are missed least."""
    fewest = 2 if config.kind == "expert-parallel" else 1
    smallest = {"spares": 0, "redundant_experts": 0, "expert_shards": 1, "stages": 1}
    return smallest | {"data_parallel": fewest, "tensor_parallel": 1}


def _number(value: int | list[str]) -> int:
    return value if isinstance(value, int) else len(value)


def _shares(service: Service, layout: Layout, nodes: Sequence[Resources]) -> list[float]:
    """Lower shares of a CPU that might fit, the largest first: parts of a node, and an equal part of all."""
    count, cpus = _count(service, layout), [node.get("CPU", 0) for node in nodes]
    equal = (sum(cpus) - _cpus_of_deployments(service)) / count
    shares = {equal, *(cpu / parts for cpu in set(cpus) for parts in range(1, count + 1))}
    hundredths = {math.floor(100 * share + 1e-6) / 100 for share in shares}
    return sorted((s for s in hundredths if 0 < s < service.layout.cpus_per_worker), reverse=True)


def _count(service: Service, layout: Layout) -> int:
    return (len(layout.workers) + len(layout.spares)) * service.engine.replicas


def _cpus_of_deployments(service: Service) -> float:
    processes = service.engine.replicas + service.engine.standby
    return INGRESS_CPUS * service.serve.ingress_replicas + ENGINE_CPUS * processes


def _fault(service: Service, layout: Layout, nodes: Sequence[Resources]) -> str | None:
    """Why nodes cannot hold a service, in one clause with the numbers; None where they may."""
    where = "this machine" if service.cluster.address is None else "the Ray cluster"
    each, count = worker_resources(service), _count(service, layout)
    for name, amount in each.items():
        needed, workers = amount * count, f"{count} workers of {_amounts({name: amount})} each"
        if count == 1:
            workers = f"1 worker of {_amounts({name: amount})}"
        if name == "CPU":
            needed += _cpus_of_deployments(service)
            workers += ", with the engine and the ingress,"
        there = sum(node.get(name, 0) for node in nodes)
        if needed > there + 1e-6:
            need = "needs" if count == 1 else "need"
            return f"layout: {workers} {need} {_amounts({name: needed})}, {where} has {there:g}"
    groups, _ = groups_of(service, layout)
    for group in groups.values():
        if group.strategy == "STRICT_SPREAD" and (short := _short(group.bundles, nodes, most=1)):
            bundle, asked, places = short
            return (
                f"layout.spread: {asked} nodes with {_amounts(bundle)} are needed, one for each worker of a "
                f"stage or expert shard, {where} has {places:g}"
            )
    bundles = [bundle for group in groups.values() for bundle in group.bundles] * service.engine.replicas
    if short := _short(bundles, nodes):
        bundle, asked, places = short
        largest = {name: max(node.get(name, 0) for node in nodes) for name in bundle}
        return (
            f"layout: {asked} times {_amounts(bundle)} are needed, each on one node, {where} has room for "
            f"{places:g} on its {len(nodes)} nodes of up to {_amounts(largest)}"
        )
    return None


def _short(
    bundles: Sequence[Resources], nodes: Sequence[Resources], most: float = math.inf
) -> tuple[Resources, int, float] | None:
    """A bundle, how many are as large or larger, and for how few of these the nodes have room, `most` on
    each; None where no size is short of room. All bundles are multiples of what one worker asks."""
    sizes = {sum(bundle.values()): bundle for bundle in bundles}
    for size, bundle in sorted(sizes.items(), reverse=True):
        asked = sum(sum(other.values()) >= size for other in bundles)
        places = sum(min(_room(node, bundle), most) for node in nodes)
        if places < asked:
            return bundle, asked, places
    return None


def _room(node: Resources, bundle: Resources) -> float:
    """How many such bundles a node holds."""
    return min(
        (math.floor(node.get(name, 0) / amount + 1e-6) for name, amount in bundle.items() if amount),
        default=math.inf,
    )


def _amounts(amounts: Resources) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in amounts.items())
