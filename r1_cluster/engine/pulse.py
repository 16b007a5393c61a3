"""How a standby engine notices within a second that the one in charge has died or hangs.

The engine in charge has a `Pulse`: it accepts links from whoever watches and beats on them for as long as its
loop is well. A standby `watch`es: a link that closes, or that is silent, is a vacancy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from r1_cluster.comm.handshake import Hello
from r1_cluster.comm.links import TcpLink, wait_any
from r1_cluster.comm.listener import Endpoint, Listener, connect
from r1_cluster.comm.wakeup import Wakeup
from r1_cluster.comm.wire import Header, Kind, LinkError

BEAT_S = 0.25
SILENCE_S = 1.5
"""So long without a beat, and an engine counts as gone: whoever takes over fences it by its epoch."""


class Pulse:
    """Beats, while `well()`, on the link of everybody who watches, and calls `beat` as often."""

    def __init__(self, listener: Listener, well: Callable[[], bool], beat: Callable[[], None]) -> None:
        """Takes the listener over."""
        self._listener = listener
        self._well = well
        self._beat = beat
        self._wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        return self._listener.address

    def close(self) -> None:
        """Ends the thread and closes all links."""
        self._wakeup.set()
        self._thread.join()

    def _run(self) -> None:
        watchers: list[TcpLink] = []
        next_beat = 0.0
        while True:
            sources: list[Wakeup | Listener | TcpLink] = [self._wakeup, self._listener, *watchers]
            ready = wait_any(sources, max(next_beat - time.monotonic(), 0.0))
            if self._wakeup in ready:
                break
            # Watchers say nothing: what can be read is that they left, which who does not beat would miss.
            for link in [link for link in watchers if link in ready]:
                link.close()
                watchers.remove(link)
            if self._listener in ready:
                watchers.append(self._listener.accept(0)[1])
                next_beat = 0.0  # who has just come wants to know at once
            if time.monotonic() < next_beat:
                continue
            next_beat = time.monotonic() + BEAT_S
            if self._well():
                watchers = [link for link in watchers if _sent(link)]
                self._beat()
        self._listener.close()
        self._wakeup.close()
        for link in watchers:
            link.close()


def _sent(link: TcpLink) -> bool:
    try:
        link.send(Header(Kind.HEARTBEAT))
    except LinkError:
        return False
    return True


def lives(endpoint: Endpoint, me: str, secret: bytes) -> bool:
    """Whether somebody beats there."""
    try:
        link = connect(endpoint, Hello(me, me, 0, "watch"), secret, SILENCE_S)
    except LinkError:
        return False
    try:
        link.recv(SILENCE_S)
    except LinkError:
        return False
    finally:
        link.close()
    return True


def watch(endpoints: Sequence[Endpoint], me: str, secret: bytes, stopped: Callable[[], bool]) -> None:
    """Returns as soon as one of them no longer beats, or `stopped()`."""
    links: list[TcpLink] = []
    try:
        for endpoint in endpoints:
            links.append(connect(endpoint, Hello(me, me, 0, "watch"), secret, SILENCE_S))
        heard = dict.fromkeys(links, time.monotonic())
        while not stopped():
            for link in wait_any(links, BEAT_S):
                link.recv(SILENCE_S)
                heard[link] = time.monotonic()
            if min(heard.values()) < time.monotonic() - SILENCE_S:
                return
    except LinkError:
        return
    finally:
        for link in links:
            link.close()
