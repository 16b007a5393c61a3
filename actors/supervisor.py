"""Creates an engine's workers, or adopts those that live, and links everybody."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import NAMESPACE, device_of, place, worker_name, worker_resources
from actors.workers import actor_class
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import TcpLink
from r1_cluster.comm.listener import Endpoint, connect
from r1_cluster.comm.wire import Header, Kind, pack
from r1_cluster.config import Service
from r1_cluster.engine.boot import ENGINE, Topology, WorkerBoot
from r1_cluster.engine.core import Pipeline
from r1_cluster.planning.layout import Layout

logger = logging.getLogger("r1_cluster.supervisor")
LOAD_TIMEOUT_S = 3600.0
PLACE_TIMEOUT_S = 60.0


@dataclass
class Member:
    """A worker as its engine sees it."""

    name: str
    actor: Any
    endpoint: Endpoint
    incarnation: str
    info: dict[str, Any]


class Supervisor:
    """The lives of one engine's workers."""

    def __init__(self, service: Service, layout: Layout, engine: str, secret: bytes) -> None:
        self.engine = engine
        self.layout = layout
        self._service = service
        self._secret = secret
        self.members: dict[str, Member] = {}

    def assemble(self) -> Pipeline:
        """Adopts the workers that live, creates the others, links all; returns the way to them."""
        seats = place(self._service, self.layout, self.engine)
        for group in {group.id: group for group, _ in seats.values()}.values():
            ray.get(group.ready(), timeout=PLACE_TIMEOUT_S)
        actors = {
            worker.name: self._actor(worker.name, *seats[worker.name]) for worker in self.layout.workers
        }
        infos = ray.get([actor.describe.remote() for actor in actors.values()], timeout=LOAD_TIMEOUT_S)
        for (name, actor), info in zip(actors.items(), infos):
            self.members[name] = Member(name, actor, info["endpoint"], info["incarnation"], info)
        epoch = 1 + max(member.info["epoch"] for member in self.members.values())
        return self._link(epoch)

    def describe(self) -> list[dict[str, Any]]:
        """One row per worker, freshly asked; a worker that does not answer in time says so."""
        refs = {member.actor.describe.remote(): member for member in self.members.values()}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=5.0)
        rows = []
        for ref, member in refs.items():
            row = {"name": member.name, "actor": worker_name(self.engine, member.name), "state": "silent"}
            if ref in ready:
                try:
                    row |= ray.get(ref) | {"state": "alive"}
                except ray.exceptions.RayActorError:
                    row["state"] = "dead"
            row.pop("endpoint", None)
            rows.append(row)
        return rows

    def _actor(self, name: str, group: Any, bundle: int) -> Any:
        worker = next(worker for worker in self.layout.workers if worker.name == name)
        ray_name = worker_name(self.engine, name)
        try:
            return ray.get_actor(ray_name, namespace=NAMESPACE)
        except ValueError:
            pass
        resources = worker_resources(self._service, device_of(self._service))
        options = ray.remote(actor_class(worker)).options(
            name=ray_name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
        )
        return options.remote(self._boot(name))

    def _boot(self, name: str) -> WorkerBoot:
        service = self._service
        device = device_of(service)
        deterministic = service.engine.deterministic
        return WorkerBoot(
            name=name,
            incarnation=secrets.token_hex(8),
            workers=self.layout.workers,
            checkpoint=service.model.path,
            dtype=service.model.dtype,
            device=device,
            deterministic=device == "cpu" if deterministic is None else deterministic,
            threads=service.engine.threads,
            page_size=service.engine.page_size,
            num_pages=service.engine.num_pages,
            lease_s=service.engine.lease_s,
            step_timeout_s=service.engine.step_timeout_s,
            host="",
            link_ports=service.cluster.link_ports,
            secret=self._secret,
        )

    def _link(self, epoch: int) -> Pipeline:
        links: dict[str, TcpLink] = {}
        for member in self.members.values():
            hello = Hello(ENGINE, self.engine, epoch, "control")
            links[member.name] = connect(member.endpoint, hello, self._secret)
        topology = Topology(
            epoch,
            {member.name: member.endpoint for member in self.members.values()},
            {member.name: member.incarnation for member in self.members.values()},
        )
        for link in links.values():
            link.send(Header(Kind.CONTROL, epoch), (), pack(topology))
        for link in links.values():
            link.recv(30.0)
        logger.info("%s: %d workers linked, epoch %d", self.engine, len(links), epoch)
        return Pipeline(links, self.layout.stages[0].name, epoch)
