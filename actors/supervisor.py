"""Creates an engine's workers, or adopts those that live, and brings a successor for whoever dies."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import NAMESPACE, actor_name, place, worker_actors
from actors.workers import actor_class
from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.listener import connect
from r1_cluster.comm.wire import LinkError
from r1_cluster.config import Service
from r1_cluster.engine.boot import ENGINE, TRANSPORTS, StepLimits, WorkerBoot
from r1_cluster.engine.pipeline import Deposed, Member, Pipeline, WorkerLost
from r1_cluster.planning.layout import Layout
from r1_cluster.planning.placement import Seat, worker_resources
from r1_cluster.records import HeldSequence

logger = logging.getLogger("r1_cluster.supervisor")
LOAD_TIMEOUT_S = 3600.0
PLACE_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 1.0
"""How soon a worker's Ray actor must say who it is, to be adopted."""
EPOCHS_PER_TERM = 1 << 20


class _Seated(NamedTuple):
    actor: Any
    seat: Seat


class Supervisor:
    """The lives of one engine's workers."""

    def __init__(
        self, service: Service, layout: Layout, engine: str, secret: bytes, in_office: Callable[[], bool]
    ) -> None:
        """`in_office()` is whether the workers are still this engine's."""
        self.engine = engine
        self.layout = layout
        self._service = service
        self._secret = secret
        self._in_office = in_office
        self._specs = {worker.name: worker for worker in (*layout.workers, *layout.spares)}
        self._actors: dict[str, _Seated] = {}

    def assemble(self, term: int) -> tuple[Pipeline, list[dict[str, HeldSequence]]]:
        """Adopts the workers that live, or in the first term creates all, and links them; returns the way to
        them, and the sequences whose KV they hold. Who is missing then is for the engine to replace, which
        holds its requests meanwhile.

        Epochs begin at the engine's term, so that they exceed all of its predecessors'.
        """
        infos = self._adopt()
        if not infos:
            groups, seats = place(self._service, self.layout, self.engine)
            if term == 1:
                infos = self._create_all(groups, seats)
        epoch = max([term * EPOCHS_PER_TERM, *(1 + info["epoch"] for info in infos.values())])
        members = {}
        for name, info in infos.items():
            try:
                members[name] = self._member(info, epoch)
            except LinkError as error:
                logger.warning("%s cannot be adopted: %s", name, error)
        pipeline = Pipeline(self.layout, members, epoch, self._service.engine.step_timeout_s)
        while True:
            # KV is of use only if every stage still has its part of the same.
            for data_rank in range(len(self.layout.first_stages)):
                eras = {
                    infos[rank.name]["kv_era"] if rank.name in members else 0
                    for stage in self.layout.stages
                    for rank in stage
                    if rank.data_rank == data_rank
                }
                whole = len(eras) == 1 and 0 not in eras
                pipeline.kv_eras[data_rank] = min(eras) if whole else epoch
            try:
                held = pipeline.link(epoch, read_back=True)
            except WorkerLost as error:
                logger.warning("%s cannot be adopted: %s", ", ".join(error.names), error)
                for name in error.names:
                    pipeline.drop(name)
                epoch += 1
                continue
            words = "%s: %d workers, epoch %d, %d sequences held"
            logger.info(words, self.engine, len(members), epoch, sum(map(len, held)))
            return pipeline, held

    def replace(
        self,
        name: str,
        spare: str | None,
        delay_s: float,
        epoch: int,
        arrived: Callable[[str, Member | Exception], None],
    ) -> None:
        """See `recovery.Replace`; reports the new worker, or why it could not be, by `arrived`."""
        former = self._actors.pop(name, None)
        if spare is not None:
            self._actors[name] = self._actors.pop(spare)
        successor = spare or name

        def work() -> None:
            try:
                if not self._in_office():
                    raise Deposed(f"{name} is the business of an engine that has taken over")
                if former is not None:
                    ray.kill(former.actor, no_restart=True)
                time.sleep(delay_s)
                began = time.monotonic()
                info = self._start(successor, former.seat if former is not None else None)
                member = self._member(info, epoch, time.monotonic() - began)
            except Deposed as error:
                arrived(successor, error)
            except Exception as error:
                logger.exception("%s could not be started", successor)
                arrived(successor, error)
            else:
                arrived(successor, member)

        threading.Thread(target=work, name=f"replace-{name}", daemon=True).start()

    def describe(self) -> list[dict[str, Any]]:
        """One row per worker, freshly asked; a worker that does not answer in time says so."""
        actors = dict(self._actors)
        if not actors:
            return []
        refs = {seated.actor.describe.remote(): name for name, seated in actors.items()}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=5.0)
        rows = []
        for ref, name in sorted(refs.items(), key=lambda item: list(self._specs).index(item[1])):
            row: dict[str, Any] = {"state": "silent"}
            if ref in ready:
                try:
                    row = ray.get(ref)
                    row["state"] = "alive" if row["loaded"] else "loading"
                except ray.exceptions.RayActorError:
                    row["state"] = "dead"
            row.pop("endpoint", None)
            rows.append(row | {"name": name})
        return rows

    def _adopt(self) -> dict[str, dict[str, Any]]:
        """The living workers that have loaded, by their places; the others are ended."""
        refs = {}
        for ray_name in worker_actors(f"{self.engine}/"):
            with contextlib.suppress(ValueError):  # it died just now
                actor = ray.get_actor(ray_name, namespace=NAMESPACE)
                refs[actor.describe.remote()] = actor
        if not refs:
            return {}
        ready, silent = ray.wait(list(refs), num_returns=len(refs), timeout=ANSWER_TIMEOUT_S)
        found: dict[str, tuple[dict[str, Any], Any]] = {}
        ending = [refs[ref] for ref in silent]
        for ref in ready:
            try:
                info = ray.get(ref)
            except ray.exceptions.RayActorError:
                continue
            rival = found.get(info["name"])
            of_use = info["loaded"] and info["name"] in self._specs
            if not of_use or (rival is not None and rival[0]["epoch"] >= info["epoch"]):
                ending.append(refs[ref])
                continue
            if rival:
                ending.append(rival[1])
            found[info["name"]] = (info, refs[ref])
        for actor in ending:
            ray.kill(actor, no_restart=True)
        self._actors = {name: _Seated(actor, Seat(*info["seat"])) for name, (info, actor) in found.items()}
        return {name: info for name, (info, _) in found.items()}

    def _create_all(
        self, groups: dict[str, PlacementGroup], seats: dict[str, Seat]
    ) -> dict[str, dict[str, Any]]:
        for group in groups.values():
            ray.get(group.ready(), timeout=PLACE_TIMEOUT_S)
        for name, seat in seats.items():
            self._actors[name] = _Seated(self._create(name, groups[seat.domain], seat), seat)
        refs = [seated.actor.ready.remote() for seated in self._actors.values()]
        return dict(zip(self._actors, ray.get(refs, timeout=LOAD_TIMEOUT_S)))

    def _start(self, name: str, seat: Seat | None) -> dict[str, Any]:
        """A worker in a former one's seat, or in one that is free; waits until it has loaded."""
        groups, seats = place(self._service, self.layout, self.engine)
        if seat is None:
            # Several workers may share a bundle.
            free = Counter(seats.values())
            free.subtract(seated.seat for seated in list(self._actors.values()))
            seat = max(free, key=lambda each: (free[each] > 0, each == seats[name]))
        actor = self._create(name, groups[seat.domain], seat)
        self._actors[name] = _Seated(actor, seat)
        info: dict[str, Any] = ray.get(actor.ready.remote(), timeout=LOAD_TIMEOUT_S)
        return info

    def _member(self, info: dict[str, Any], epoch: int, start_s: float = 0.0) -> Member:
        link = connect(info["endpoint"], Hello(ENGINE, self.engine, epoch, "control"), self._secret)
        link.peer = info["name"]  # a spare that took another's place listens under its first name
        return Member(link, info["endpoint"], info["incarnation"], start_s)

    def _create(self, name: str, group: Any, seat: Seat) -> Any:
        resources = worker_resources(self._service)
        incarnation = secrets.token_hex(4)
        options = ray.remote(actor_class(self._specs[name])).options(
            name=actor_name(self.engine, name, incarnation),
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=resources.pop("CPU"),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, seat.bundle),
        )
        return options.remote(self._boot(name, incarnation), tuple(seat))

    def _boot(self, name: str, incarnation: str) -> WorkerBoot:
        service = self._service
        device = service.layout.device
        deterministic = service.engine.deterministic
        return WorkerBoot(
            name=name,
            incarnation=incarnation,
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
            transport=TRANSPORTS[device],
            kv_cache_dtype=service.engine.kv_cache_dtype,
        )
