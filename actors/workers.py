"""Ray shells around workers: one actor class per kind of role, so that Ray's own tools show who is who."""

from __future__ import annotations

import logging
import os
import threading
import time

import msgspec
import ray

from r1_cluster.engine.boot import WorkerBoot
from r1_cluster.planning.layout import WorkerSpec

logger = logging.getLogger("r1_cluster.worker")


class _Shell:
    """Loads the roles in its constructor and runs the resident loop in a thread.

    When the loop ends, for whatever reason, the process ends: a worker without a loop is of no use, and
    its memory belongs to its successor.
    """

    def __init__(self, boot: WorkerBoot) -> None:
        # The engine imports this module for the class alone; only the worker itself loads torch.
        from r1_cluster.engine.worker import Worker

        started = time.monotonic()
        self._boot = boot
        host = ray.util.get_node_ip_address()
        self._worker = Worker(msgspec.structs.replace(boot, host=host))
        self._load_s = time.monotonic() - started
        threading.Thread(target=self._run, name="resident-loop", daemon=True).start()

    def describe(self) -> dict[str, object]:
        """Where this worker listens, what it hosts, and where it runs."""
        return {
            "endpoint": self._worker.listener.address,
            "incarnation": self._boot.incarnation,
            "epoch": max(self._worker.epoch, self._worker.office),
            "roles": list(self._worker.spec.roles),
            "node": ray.get_runtime_context().get_node_id(),
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "load_s": self._load_s,
            "num_steps": self._worker.num_steps,
        }

    def _run(self) -> None:
        code = 1
        try:
            self._worker.run()
            code = 0
            logger.info("%s ends: its engine's lease is over", self._boot.name)
        except BaseException:
            logger.exception("%s failed", self._boot.name)
        finally:
            # A thread cannot end an actor by sys.exit, and the main thread serves Ray.
            os._exit(code)


class StageActor(_Shell):
    """Hosts a pipeline stage, and its router and experts where the layout joins them."""


class RouterActor(_Shell):
    """Hosts the router of a stage's MoE layers."""


class ExpertActor(_Shell):
    """Hosts a shard of the routed experts."""


def actor_class(worker: WorkerSpec) -> type[_Shell]:
    """The shell for a worker."""
    if worker.stage is not None:
        return StageActor
    return RouterActor if worker.router is not None else ExpertActor
