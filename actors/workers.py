"""Ray shells around workers: one actor class per kind of role, so that Ray's own tools show who is who."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from actors.metrics import LinkTraffic
from r1_cluster.engine.boot import WorkerBoot
from r1_cluster.planning.layout import WorkerSpec

if TYPE_CHECKING:
    from r1_cluster.engine.worker import Worker

logger = logging.getLogger("r1_cluster.worker")

EXPORT_S = 5.0
"""How often a worker's totals are given to Ray's exporter, which shows them every 10 s."""


class _Shell:
    """Loads the roles and runs the resident loop in a thread, so that Ray's own can answer meanwhile.

    When the loop ends, for whatever reason, the process ends: a worker without a loop is of no use, and
    its memory belongs to its successor.
    """

    def __init__(self, boot: WorkerBoot, seat: tuple[str, int]) -> None:
        self._boot = boot
        self._seat = seat
        self._started = time.time()
        self._worker: Worker | None = None
        self._failure: Exception | None = None
        self._loaded = threading.Event()
        threading.Thread(target=self._run, name="resident-loop", daemon=True).start()

    def ready(self) -> dict[str, Any]:
        """`describe`, once the weights are there; raises what the load raised."""
        self._loaded.wait()
        if self._failure is not None:
            raise self._failure
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """Which place this worker has, whether it has loaded, where it listens and where it runs."""
        worker = self._worker
        info: dict[str, Any] = {
            "name": self._boot.name,
            "loaded": worker is not None and worker.loaded,
            "incarnation": self._boot.incarnation,
            "seat": self._seat,
            "started": self._started,
            "node": ray.get_runtime_context().get_node_id(),
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "epoch": 0,
        }
        if worker is not None:
            info |= {
                "name": worker.spec.name,
                "roles": list(worker.spec.roles),
                "endpoint": worker.listener.address,
                "epoch": max(worker.epoch, worker.office),
                "kv_era": worker.kv_era,
                "load_s": worker.load_s,
                "read_bytes": worker.read_bytes,
                "read_s": worker.read_s,
                "kv_cache_dtype": self._boot.kv_cache_dtype or self._boot.dtype,
                "num_steps": worker.num_steps,
                "stale_dropped": worker.stale_dropped,
                "traffic": {peer: asdict(traffic) for peer, traffic in worker.peers.traffic.copy().items()},
                "waited_s": worker.waited_s,
            }
        return info

    def _run(self) -> None:
        code = 1
        try:
            # The engine imports this module for the class alone; only the worker itself loads torch.
            from r1_cluster.engine.worker import Worker

            host = ray.util.get_node_ip_address()
            worker = Worker(msgspec.structs.replace(self._boot, host=host))
        except Exception as error:
            logger.exception("%s could not load", self._boot.name)
            self._failure = error
            self._loaded.set()
            threading.Event().wait(self._boot.lease_s)  # for whoever asks why
            os._exit(code)
        try:
            self._worker = worker
            self._loaded.set()
            threading.Thread(target=self._export, args=(worker,), name="metrics", daemon=True).start()
            worker.run()
            code = 0
            logger.info("%s ends: its engine's lease is over", self._boot.name)
        except BaseException:
            logger.exception("%s failed", self._boot.name)
        finally:
            # A thread cannot end an actor by sys.exit, and the main thread serves Ray.
            os._exit(code)

    def _export(self, worker: Worker) -> None:
        """Gives what the links have carried to Ray's exporter, for as long as the process lives."""
        exported = LinkTraffic()
        while True:
            time.sleep(EXPORT_S)
            exported.note(worker.spec.name, worker.peers.traffic.copy(), worker.waited_s)


class StageActor(_Shell):
    """Hosts a pipeline stage, and its router and experts where the layout joins them."""


class RouterActor(_Shell):
    """Hosts the router of a stage's MoE layers."""


class ExpertActor(_Shell):
    """Hosts a shard of the routed experts."""


class SpareActor(_Shell):
    """Hosts nothing yet: takes the place of whoever dies."""


def actor_class(worker: WorkerSpec) -> type[_Shell]:
    """The shell for a worker."""
    if not worker.roles:
        return SpareActor
    if worker.stage is not None:
        return StageActor
    return RouterActor if worker.router is not None else ExpertActor
