"""Ways to hurt a running service from outside. Of the product they know nothing but names."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import struct
from pathlib import Path

PIDFD_GETFD = 438
LINK_PORTS = range(21000, 24000)
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_libc = ctypes.CDLL(None, use_errno=True)


def sockets_of(pid):
    """Duplicates of all sockets of a process, one after the other, each closed behind its turn."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for entry in _entries(pid):
            number = _libc.syscall(PIDFD_GETFD, pidfd, entry, 0)
            if number >= 0:  # else the process has closed it meanwhile
                with socket.socket(fileno=number) as sock:
                    yield sock
    finally:
        os.close(pidfd)


def _entries(pid):
    found = []
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{entry}").startswith("socket:"):
                    found.append(int(entry))
    return found


def peer_pid(sock):
    """The process at the other end of a connected Unix stream socket; None of any other."""
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        return None
    try:
        sock.getpeername()
    except OSError:
        return None
    return _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]


def tcp_pair(sock):
    """(own address, peer's address) of a connected TCP socket; None of any other."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return None
    try:
        return sock.getsockname()[:2], sock.getpeername()[:2]
    except OSError:
        return None


def links_between(pid_a, pid_b, ports=LINK_PORTS):
    """The sockets of `pid_a`, one after the other, whose other end `pid_b` holds. TCP counts where one of
    its ports is a link's: Ray has connections of its own between the two."""
    theirs = {tcp_pair(sock) for sock in sockets_of(pid_b)}
    for sock in sockets_of(pid_a):
        if peer_pid(sock) == pid_b:
            yield sock
            continue
        pair = tcp_pair(sock)
        if pair is not None and pair[::-1] in theirs and any(port in ports for _, port in pair):
            yield sock


def cut_link(pid_a, pid_b):
    """Shuts down every socket that joins two processes, under their hands; returns how many those were."""
    count = 0
    for sock in links_between(pid_a, pid_b):
        with contextlib.suppress(OSError):  # cut at the same moment by its owner
            sock.shutdown(socket.SHUT_RDWR)
            count += 1
    return count


def title(pid):
    """What a process of Ray calls itself, without the method that it is in: StageActor, Engine, IDLE, …;
    None of any other, or of one that is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = re.match(r"ray::(?:ServeReplica:[^:]+:)?(\w+)", words)
    return found and found[1]


class Targets:
    """The processes of a service's parts at one moment, by name: each worker's, `engine`, `ingress`."""

    # The links to cut for a part: the first of these pairs that stands; its engine's for one not named here.
    LINKS = {
        "stage-0": [("stage-0", "stage-1"), ("engine", "stage-0")],
        "stage-1": [("engine", "stage-1"), ("stage-0", "stage-1")],
        "router-0": [("stage-0", "router-0"), ("router-0", "experts-0")],
        "experts-1": [("router-0", "experts-1")],
        "engine": [("engine", "ingress")],
        "stage-0-rank-0": [("stage-0-rank-0", "stage-0-rank-1")],
        "stage-0-rank-1": [("stage-0-rank-0", "stage-0-rank-1"), ("engine", "stage-0-rank-1")],
        "dp-0": [("dp-0", "dp-1")],
        "dp-1": [("dp-0", "dp-1"), ("engine", "dp-1")],
    }

    def __init__(self, pids, folder):
        """`folder`: the service's R1_FAULTS."""
        self.pids = pids
        self.folder = folder

    def inflict(self, part, how):
        """`how`: kill, stop, cut or exception."""
        if how == "kill":
            os.kill(self.pids[part], signal.SIGKILL)
        elif how == "stop":
            os.kill(self.pids[part], signal.SIGSTOP)
        elif how == "exception":
            (self.folder / part).touch()
        else:
            pairs = self.LINKS.get(part, [("engine", part)])
            pairs = [pair for pair in pairs if set(pair) <= set(self.pids)]
            assert any(cut_link(self.pids[a], self.pids[b]) for a, b in pairs), f"no link of {part} stood"
