"""`r1-cluster stop`: ends a service."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from r1_cluster.config import ConfigError

if TYPE_CHECKING:
    from r1_cluster.cli.running import Running


def add_parser(commands: Any) -> None:
    """Adds the `stop` command."""
    parser = commands.add_parser(
        "stop",
        help="stop a service and all that it started",
        description="Stops a service: its deployments, its detached actors and placement groups and, where "
        "`serve` had started a local Ray cluster, that cluster.",
    )
    parser.add_argument("--service", help="which service, where several are running")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait (default 60)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Asks the `serve` command to stop, or takes the service off a shared cluster."""
    return end_service(arguments, signal.SIGINT)


def end_service(
    arguments: argparse.Namespace, asking: signal.Signals, first: Callable[[str], None] | None = None
) -> int:
    """Ends the service that the command line names: by a signal to its `serve` command, or, on a shared
    cluster, itself, after it has done `first` with the service's name."""
    from r1_cluster.cli.running import ask, find, forget

    running = find(arguments.service)
    if running.local:
        ask(running, asking)
        wait_until_stopped(running, arguments.timeout)
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
