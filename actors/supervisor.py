"""Creates an engine's workers, or adopts those that live, and links everybody."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import NAMESPACE, place, worker_name, worker_resources
from actors.workers import actor_class
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.listener import connect
from r1_cluster.config import Service
from r1_cluster.engine.boot import ENGINE, StepLimits, WorkerBoot
from r1_cluster.engine.pipeline import Member, Pipeline
from r1_cluster.planning.layout import Layout
from r1_cluster.records import HeldSequence

logger = logging.getLogger("r1_cluster.supervisor")
LOAD_TIMEOUT_S = 3600.0
PLACE_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 10.0


class Supervisor:
    """The lives of one engine's workers."""

    def __init__(self, service: Service, layout: Layout, engine: str, secret: bytes) -> None:
        self.engine = engine
        self.layout = layout
        self._service = service
        self._secret = secret
        self._actors: dict[str, Any] = {}

    def assemble(self) -> tuple[Pipeline, dict[str, HeldSequence]]:
        """Adopts the workers that live, creates the others, links all; returns the way to them, and the
        sequences whose KV they hold."""
        seats = place(self._service, self.layout, self.engine)
        for group in {group.id: group for group, _ in seats.values()}.values():
            ray.get(group.ready(), timeout=PLACE_TIMEOUT_S)
        adopted = set(self._living())
        actors = {
            worker.name: self._actor(worker.name, *seats[worker.name]) for worker in self.layout.workers
        }
        infos = ray.get([actor.describe.remote() for actor in actors.values()], timeout=LOAD_TIMEOUT_S)
        self._actors = actors
        epoch = 1 + max(info["epoch"] for info in infos)
        members = {name: self._member(info, epoch) for name, info in zip(actors, infos)}
        pipeline = Pipeline(self.layout, members, epoch)
        # KV is of use only if every stage still has its part.
        whole = all(stage.name in adopted for stage in self.layout.stages)
        held = pipeline.link(epoch, read_back=whole)
        logger.info(
            "%s: %d workers, epoch %d, %d sequences held", self.engine, len(members), epoch, len(held)
        )
        return pipeline, held

    def replace(self, name: str, epoch: int, arrived: Callable[[str, Member | Exception], None]) -> None:
        """Starts a worker anew in the background and reports it, or why it could not be, by `arrived`."""

        def work() -> None:
            try:
                arrived(name, self._replacement(name, epoch))
            except Exception as error:
                logger.exception("%s could not be replaced", name)
                arrived(name, error)

        threading.Thread(target=work, name=f"replace-{name}", daemon=True).start()

    def _replacement(self, name: str, epoch: int) -> Member:
        ray.kill(self._actors[name], no_restart=True)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while name in self._living():
            # Ray gives a name free when it has seen the death; nothing reports that moment.
            if time.monotonic() > deadline:
                raise TimeoutError(f"Ray has not ended it within {KILL_TIMEOUT_S:g} s")
            time.sleep(0.02)
        seat = place(self._service, self.layout, self.engine)[name]
        actor = self._actors[name] = self._actor(name, *seat)
        return self._member(ray.get(actor.describe.remote(), timeout=LOAD_TIMEOUT_S), epoch)

    def _member(self, info: dict[str, Any], epoch: int) -> Member:
        hello = Hello(ENGINE, self.engine, epoch, "control")
        return Member(connect(info["endpoint"], hello, self._secret), info["endpoint"], info["incarnation"])

    def _living(self) -> list[str]:
        prefix = worker_name(self.engine, "")
        named = ray.util.list_named_actors(all_namespaces=True)
        return [row["name"].removeprefix(prefix) for row in named if row["name"].startswith(prefix)]

    def describe(self) -> list[dict[str, Any]]:
        """One row per worker, freshly asked; a worker that does not answer in time says so."""
        refs = {actor.describe.remote(): name for name, actor in self._actors.items()}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=5.0)
        rows = []
        for ref, name in refs.items():
            row = {"name": name, "actor": worker_name(self.engine, name), "state": "silent"}
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
        resources = worker_resources(self._service)
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
        device = service.layout.device
        deterministic = service.engine.deterministic
        return WorkerBoot(
            name=name,
            incarnation=secrets.token_hex(8),
            workers=self.layout.workers,
            checkpoint=service.model.path,
            dtype=service.dtype,
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
            limits=StepLimits(
                service.engine.max_num_seqs,
                service.engine.max_batch_tokens,
                service.engine.max_model_len or service.engine.num_pages * service.engine.page_size,
            ),
        )
