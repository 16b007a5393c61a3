"""What an engine tells a worker before the first step. Light: the engine imports it, and no torch."""

from __future__ import annotations

import msgspec

from r1_cluster.comm.listener import Endpoint
from r1_cluster.planning.layout import WorkerSpec

ENGINE = "engine"
"""The engine's name in its handshakes with workers."""


class WorkerBoot(msgspec.Struct, frozen=True):
    """All that a worker must know to start. Filled by the engine's supervisor."""

    name: str
    incarnation: str
    workers: tuple[WorkerSpec, ...]
    checkpoint: str
    dtype: str
    device: str
    deterministic: bool
    threads: int
    page_size: int
    num_pages: int
    lease_s: float
    step_timeout_s: float
    host: str
    link_ports: tuple[int, int]
    secret: bytes


class Topology(msgspec.Struct, frozen=True, array_like=True):
    """Where every worker listens, and which incarnation of it. Sent by the engine; answered by an empty
    control message once the links that the receiver opens are up."""

    epoch: int
    endpoints: dict[str, Endpoint]
    incarnations: dict[str, str]
