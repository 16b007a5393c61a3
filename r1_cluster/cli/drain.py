"""`r1-cluster drain`: ends a service once its answers have ended."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from typing import Any

from r1_cluster.cli.stop import wait_until_stopped


def add_parser(commands: Any) -> None:
    """Adds the `drain` command."""
    parser = commands.add_parser(
        "drain",
        help="stop a service once its answers have ended",
        description="Takes no new requests (503), waits until the answers under way have ended, then stops "
        "the service as `stop` does. SIGTERM to `r1-cluster serve` does the same.",
    )
    parser.add_argument("--service", help="which service, where several are running")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds to wait (default 1800)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Asks the `serve` command to drain, or drains a service on a shared cluster itself."""
    from r1_cluster.cli.running import find, forget

    running = find(arguments.service)
    if running.local:
        os.kill(running.pid, signal.SIGTERM)
        wait_until_stopped(running, arguments.timeout)
    else:
        from actors.cluster import attach, drain, remove_service

        with attach(running.address):
            drain(running.name, arguments.timeout, threading.Event())
            remove_service(running.name)
        forget(running.name)
    print(f"{running.name} is stopped.")
    return 0
