"""Which services were started on this machine: a small file each, written by `serve`, read by the others."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

from r1_cluster.config import ConfigError


class Running(msgspec.Struct):
    """A service started from this machine. `pid` is the `serve` command's, `address` Ray's GCS."""

    name: str
    pid: int
    address: str
    url: str
    model: str
    local: bool


def require_token() -> None:
    """Asks for Ray's token authentication, for clusters that `serve` starts on this machine; the token is
    kept in the user's home folder. To be called before ray is imported, which reads it once; left unset it
    would mean different things to a command that starts a cluster and to one that joins it."""
    os.environ["RAY_AUTH_MODE"] = "token"


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"r1-cluster-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def remember(running: Running) -> None:
    """Writes the service's file."""
    (_folder() / f"{running.name}.json").write_bytes(msgspec.json.encode(running))


def forget(name: str) -> None:
    """Removes the service's file, if there is one."""
    (_folder() / f"{name}.json").unlink(missing_ok=True)


def services() -> list[Running]:
    """All services whose `serve` command lives, or whose cluster is not local to it."""
    found = []
    for path in sorted(_folder().glob("*.json")):
        running = msgspec.json.decode(path.read_bytes(), type=Running)
        if running.local and not _alive(running.pid):
            path.unlink(missing_ok=True)
        else:
            found.append(running)
    return found


def find(name: str | None) -> Running:
    """The service called `name`, or the only one; raises ConfigError with what to do."""
    known = services()
    if name is not None:
        known = [running for running in known if running.name == name]
    if len(known) == 1:
        return known[0]
    if not known:
        which = f"service {name!r}" if name else "service"
        raise ConfigError(f"no {which} is running here; start one with: r1-cluster serve SERVICE.yaml")
    names = ", ".join(running.name for running in known)
    raise ConfigError(f"several services are running ({names}); say which with --service NAME")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
