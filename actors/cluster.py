"""What of a service lives in Ray: names, placement groups, the shared secret; and how it is removed."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import serve
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from r1_cluster.config import ConfigError, LayoutConfig, Service
from r1_cluster.planning.layout import Layout
from r1_cluster.planning.placement import Seat, check_placement, groups_of

logger = logging.getLogger("r1_cluster.cluster")

NAMESPACE = "r1-cluster"
ENGINE_DEPLOYMENT = "Engine"
INGRESS_DEPLOYMENT = "Ingress"
_KV_NAMESPACE = NAMESPACE.encode()
DRAIN_LOOK_S = 0.5
DRAIN_LOOKS = 3


@contextlib.contextmanager
def attach(address: str) -> Iterator[None]:
    """A connection to a running cluster for the length of a `with` block."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ConfigError(f"there is no Ray cluster at {address} ({error})") from None
    try:
        yield
    finally:
        ray.shutdown()


def head_answers(timeout_s: float) -> bool:
    """Whether Ray's head (its GCS) is there: without it nobody who dies can be replaced."""
    client = ray._private.worker.global_worker.gcs_client
    node = ray._raylet.NodeID.from_hex(ray.get_runtime_context().get_node_id())
    try:
        return bool(client.check_alive([node], timeout=timeout_s)[0])
    except ray.exceptions.RpcError:
        return False


def secret() -> bytes:
    """The cluster's link secret, made by whoever asks first and kept in Ray's own key-value store."""
    key = b"link-secret"
    _internal_kv_put(key, secrets.token_bytes(32), overwrite=False, namespace=_KV_NAMESPACE)
    value = _internal_kv_get(key, namespace=_KV_NAMESPACE)
    assert value is not None
    return bytes(value)


def start_drain(service: str) -> None:
    """Tells a service's ingresses to take no new requests; they look within a second."""
    _internal_kv_put(_drain_key(service), b"1", namespace=_KV_NAMESPACE)


def drain(service: str, timeout_s: float, hurry: threading.Event) -> None:
    """No new requests from now on; returns when the answers under way have ended, or before if told so."""
    start_drain(service)
    deadline = time.monotonic() + timeout_s
    idle = 0
    while idle < DRAIN_LOOKS and time.monotonic() < deadline and not hurry.wait(DRAIN_LOOK_S):
        # Several looks: a request may be on its way from an ingress that has not seen the drain yet.
        idle = 0 if _is_busy(service) else idle + 1


def _is_busy(service: str) -> bool:
    """Whether an engine has requests in hand, or may have: one that hangs or is taking over cannot say."""
    try:
        states = [engine for engine in engines_status(service) if not engine["standby"]]
    except Exception as error:
        logger.warning("an engine does not say what it has in hand: %s: %s", type(error).__name__, error)
        return True
    return not states or any(engine["running"] + engine["waiting"] for engine in states)


def is_draining(service: str) -> bool:
    """Whether `start_drain` was called for a service that has not been removed since."""
    return _internal_kv_get(_drain_key(service), namespace=_KV_NAMESPACE) is not None


def _drain_key(service: str) -> bytes:
    return f"drain/{service}".encode()


def engine_name(service: str, index: int) -> str:
    """Name of a service's engine; its workers' and groups' names begin with it."""
    return f"{service}/engine-{index}"


def actor_name(engine: str, worker: str, incarnation: str) -> str:
    """Ray name of a worker's detached actor. What it hosts can change; `describe` tells. The incarnation
    lets a successor start before Ray has buried its predecessor."""
    return f"{engine}/{worker}.{incarnation}"


def check_capacity(service: Service, layout: Layout, build: Callable[[LayoutConfig], Layout]) -> None:
    """`check_placement` on the nodes of the connected cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    check_placement(service, layout, nodes, build)


def place(service: Service, layout: Layout, engine: str) -> tuple[dict[str, PlacementGroup], dict[str, Seat]]:
    """Makes the engine's placement groups, or finds those that stand; (domain → group, worker → seat)."""
    groups, seats = groups_of(service, layout)
    return {domain: _group(f"{engine}/{domain}", *group) for domain, group in groups.items()}, seats


def _group(name: str, bundles: list[dict[str, float]], strategy: str) -> PlacementGroup:
    try:
        return ray.util.get_placement_group(name)
    except ValueError:
        return placement_group(bundles, strategy=strategy, name=name, lifetime="detached")


def process_name(pid: int) -> str | None:
    """What a process of the cluster is, or was, to a person: a worker's name, the engine, the ingress, a part
    of Serve; None where Ray does not know."""
    try:
        rows = ray._private.state.actors().values()
    except Exception as error:  # whoever asks prints what Ray says, and must live on
        logger.warning("Ray does not say what process %d was: %s", pid, error)
        return None
    for row in rows:
        if row["Pid"] == pid:
            name = str(row["Name"])
            if "SERVE_PROXY" in name:
                return "Serve's proxy"
            if "SERVE_CONTROLLER" in name:
                return "Serve's controller"
            if name.startswith("SERVE_REPLICA"):
                return f"the {name.split('#')[-2].lower()}"
            return name.rpartition("/")[2].partition(".")[0] or None
    return None


def worker_actors(prefix: str) -> list[str]:
    """Names of the worker actors that Ray knows, of the engine or service whose names begin so."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(a["name"] for a in named if a["namespace"] == NAMESPACE and a["name"].startswith(prefix))


def remove_service(service: str) -> None:
    """Takes a service off the cluster: the Serve application, then actors and groups, by name."""
    with contextlib.suppress(Exception):
        serve.delete(service)
    _internal_kv_del(_drain_key(service), namespace=_KV_NAMESPACE)
    for key in _internal_kv_list(f"office/{service}/", namespace=_KV_NAMESPACE):
        _internal_kv_del(key, namespace=_KV_NAMESPACE)
    remove_workers(f"{service}/engine-")


def remove_workers(prefix: str) -> None:
    """Ends the workers, and frees the places, of all engines whose names begin so."""
    for name in worker_actors(prefix):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    for name in _groups(prefix):
        ray.util.remove_placement_group(ray.util.get_placement_group(name))


def engines_with_places(service: str) -> set[str]:
    """Names of the engines of a service for which placement groups stand."""
    return {name.rsplit("/", 1)[0] for name in _groups(f"{service}/engine-")}


def _groups(prefix: str) -> list[str]:
    rows: dict[str, Any] = placement_group_table()
    return [r["name"] for r in rows.values() if r["name"].startswith(prefix) and r["state"] != "REMOVED"]


def engines_status(service: str) -> list[dict[str, Any]]:
    """What each engine process of a service says of itself, standbys last, in the order of their names.

    A handle's calls go to replicas at random, so it asks until all have answered, or forty times.
    """
    replicas = serve.status().applications[service].deployments[ENGINE_DEPLOYMENT].replica_states
    handle = serve.get_deployment_handle(ENGINE_DEPLOYMENT, service)
    engines: dict[str, dict[str, Any]] = {}
    for _ in range(40):
        answer = handle.status.remote().result(timeout_s=10.0)
        engines[answer["replica"]] = answer
        if len(engines) == replicas.get("RUNNING", 0):
            break
    return sorted(engines.values(), key=lambda engine: (engine["standby"], engine["engine"]))
