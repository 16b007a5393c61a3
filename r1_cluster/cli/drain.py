"""`r1-cluster drain`: ends a service once its answers have ended."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from r1_cluster.cli.options import ServiceName
from r1_cluster.cli.stop import end_service


def drain(
    service: ServiceName = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds to wait.")] = 1800.0,
) -> int:
    """Stops a service once its answers have ended.

    It takes no new requests (503), waits until the answers under way have ended, then stops the service as
    `stop` does. SIGTERM to `r1-cluster serve` does the same.
    """

    def drain_first(name: str) -> None:
        from actors import cluster

        cluster.drain(name, timeout, threading.Event())

    return end_service(service, timeout, signal.SIGTERM, drain_first)
