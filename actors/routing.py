"""Which engine replica an ingress asks: one that holds an office, rather than a standby or a dead one.

What an ingress learns of the replicas it keeps in `AVOIDED`; the router, which Serve runs in the same
process, goes by it.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

AVOID_S = 10.0


class Avoided(NamedTuple):
    """When a replica was found not to be of use, and whether because it hangs."""

    at: float
    hangs: bool


NEVER = Avoided(float("-inf"), False)
AVOIDED: dict[str, Avoided] = {}
"""By replica id."""


def avoid(replica: str, *, hangs: bool = False) -> None:
    """It holds no office, is gone, or hangs: ask it last, for a while."""
    AVOIDED[replica] = Avoided(time.monotonic(), hangs)


def trust(replica: str) -> None:
    """It holds an office."""
    AVOIDED.pop(replica, None)


class OfficeRouter(FIFOMixin, RequestRouter):
    """Ranks the replicas that nothing is known against first, then the others, longest avoided first. Those
    that hang come last: a call to them would be lost in them, while a standby says no at once."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`; within a rank Serve takes the shortest queue."""
        # Serve ships this class pickled by value: its globals are not this process's own.
        from actors.routing import AVOIDED

        since = time.monotonic() - AVOID_S
        known = {replica: AVOIDED.get(replica.replica_id.unique_id, NEVER) for replica in candidate_replicas}
        good = [replica for replica, avoided in known.items() if avoided.at < since]
        if good:
            return [good]
        return [[replica] for replica in sorted(known, key=lambda r: (known[r].hangs, known[r].at))]
