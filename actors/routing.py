"""Which engine replica an ingress asks: one that holds an office, rather than a standby or a dead one.

What an ingress learns of the replicas it keeps in `AVOIDED`; the router, which Serve runs in the same
process, goes by it.
"""

from __future__ import annotations

import time

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

AVOID_S = 10.0
AVOIDED: dict[str, float] = {}
"""Replica id → when it was found not to be in charge."""


def avoid(replica: str) -> None:
    """It holds no office, or is gone: ask it last, for a while."""
    AVOIDED[replica] = time.monotonic()


def trust(replica: str) -> None:
    """It holds an office."""
    AVOIDED.pop(replica, None)


class OfficeRouter(FIFOMixin, RequestRouter):
    """Ranks the replicas that nothing is known against first, then the others, longest avoided first."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`; within a rank Serve takes the shortest queue."""
        since = time.monotonic() - AVOID_S
        when = {r: AVOIDED.get(r.replica_id.unique_id, 0.0) for r in candidate_replicas}
        good = [replica for replica, at in when.items() if at < since]
        if good:
            return [good]
        return [[replica] for replica in sorted(when, key=lambda replica: when[replica])]
