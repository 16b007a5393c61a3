"""Which engine process is in charge of which engine.

A service has `engine.replicas` engines and may have one more engine process, the standby; a redeploy has
more for a while. Each engine is an office that one process holds; the others wait for a vacancy. Whoever
takes an office claims its next term in Ray's key-value store, where a key is written once: of two who want
the same term one gets it. All epochs of a term exceed those of the terms before it, so that workers refuse,
and ingresses drop, whatever a deposed holder still says.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from actors.cluster import NAMESPACE, engine_name, engines_with_places, remove_workers
from r1_cluster.comm.listener import Endpoint
from r1_cluster.engine import pulse

_KV_NAMESPACE = NAMESPACE.encode()
SWEEP_S = 1.0


class Offices:
    """The offices of one service, as one process sees them."""

    def __init__(self, service: str, count: int, me: str, secret: bytes) -> None:
        """`me` names this process to those that it watches."""
        self._service = service
        self._engines = [engine_name(service, index) for index in range(count)]
        self._me = me
        self._secret = secret

    def claim(self, endpoint: Endpoint) -> tuple[str, int] | None:
        """Takes the first vacant office: (engine, term), with `endpoint` for others to watch; None where all
        are held."""
        for engine in self._engines:
            term, holder = _latest(engine)
            if holder is not None and pulse.lives(holder, self._me, self._secret):
                continue
            key = _key(engine, term + 1)
            value = msgspec.msgpack.encode(endpoint)
            if not _internal_kv_put(key, value, overwrite=False, namespace=_KV_NAMESPACE):
                for old in range(max(term - 1, 1), term):
                    _internal_kv_del(_key(engine, old), namespace=_KV_NAMESPACE)
                return engine, term + 1
        return None

    def holds(self, engine: str, term: int) -> bool:
        """Whether nobody has taken the office since. Where Ray's head cannot be asked, nobody can have."""
        try:
            return _latest(engine)[0] == term
        except Exception:
            return True

    def sweep(self, stopped: Callable[[], bool]) -> None:
        """Removes what engines that were scaled away have left, as soon as nobody holds their offices."""
        while not stopped() and (extra := engines_with_places(self._service) - set(self._engines)):
            for engine in extra:
                _, holder = _latest(engine)
                if holder is None or not pulse.lives(holder, self._me, self._secret):
                    remove_workers(f"{engine}/")
            time.sleep(SWEEP_S)

    def wait_for_vacancy(self, stopped: Callable[[], bool]) -> None:
        """Returns as soon as a holder dies or hangs, or `stopped()`."""
        holders = [holder for _, holder in map(_latest, self._engines) if holder is not None]
        if len(holders) == len(self._engines):
            pulse.watch(holders, self._me, self._secret, stopped)


def _key(engine: str, term: int) -> bytes:
    return f"office/{engine}/{term:012}".encode()


def _latest(engine: str) -> tuple[int, Endpoint | None]:
    keys = _internal_kv_list(f"office/{engine}/", namespace=_KV_NAMESPACE)
    if not keys:
        return 0, None
    last = bytes(max(keys))
    value = _internal_kv_get(last, namespace=_KV_NAMESPACE)
    holder = None if value is None else msgspec.msgpack.decode(value, type=Endpoint)
    return int(last.rsplit(b"/", 1)[1]), holder
