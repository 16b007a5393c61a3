"""`r1-cluster drain`: ends a service once its answers have ended."""

from __future__ import annotations

import argparse
import signal
import threading
from typing import Any

from r1_cluster.cli.stop import end_service


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

    def drain_first(name: str) -> None:
        from actors.cluster import drain

        drain(name, arguments.timeout, threading.Event())

    return end_service(arguments, signal.SIGTERM, drain_first)
