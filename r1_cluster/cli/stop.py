"""`r1-cluster stop`: ends a service."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from r1_cluster.cli.options import ServiceName
from r1_cluster.config import ConfigError

if TYPE_CHECKING:
    from r1_cluster.cli.running import Running


def stop(
    service: ServiceName = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds to wait.")] = 60.0,
) -> int:
    """Stops a service and all that it started.

    That is its deployments, its detached actors and placement groups and, where `serve` had started a local
    Ray cluster, that cluster.
    """
    return end_service(service, timeout, signal.SIGINT)


def end_service(
    service: str | None, timeout_s: float, asking: signal.Signals, first: Callable[[str], None] | None = None
) -> int:
    """Ends the service of that name, or the only one: by a signal to its `serve` command, or, on a shared
    cluster, itself, after it has done `first` with the service's name."""
    from r1_cluster.cli.running import ask, find, forget

    running = find(service)
    if running.local:
        ask(running, asking)
        wait_until_stopped(running, timeout_s)
    else:
        from actors.cluster import attach, remove_service

        with attach(running.address):
            if first is not None:
                first(running.name)
            remove_service(running.name)
        forget(running.name)
    print(f"{running.name} is stopped.")
    return 0


def wait_until_stopped(running: Running, timeout_s: float) -> None:
    """Returns when its `serve` command has ended; raises ConfigError if it has not in time."""
    from r1_cluster.cli.running import services

    deadline = time.monotonic() + timeout_s
    while any(other.pid == running.pid for other in services(running.name)):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{running.name} (process {running.pid}) has not stopped within {timeout_s:g} s"
            )
        time.sleep(0.1)
