"""Which services were started on this machine: a small file each, written by `serve`, read by the others.

The files, and the logs beside them, lie in a folder that is the user's alone, and `stop` signals only the
process that wrote the file: its start time is in there, because numbers of processes are given out again.
"""

from __future__ import annotations

import os
import secrets
import signal
import stat
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec

from r1_cluster.config import ConfigError


class Running(msgspec.Struct):
    """A service started from this machine. `pid` is the `serve` command's and `started` its `start_time`,
    `address` Ray's GCS."""

    name: str
    pid: Annotated[int, msgspec.Meta(gt=1)]  # 0 and less would be groups of processes
    started: int
    address: str
    url: str
    model: str
    local: bool


def require_token() -> None:
    """Asks for Ray's token authentication, for clusters that `serve` starts on this machine; the token is
    kept in the user's home folder. To be called before ray is imported, which reads it once; left unset it
    would mean different things to a command that starts a cluster and to one that joins it."""
    os.environ["RAY_AUTH_MODE"] = "token"


def private_folder() -> Path:
    """Where files and logs of this user's services lie: in XDG_RUNTIME_DIR, else beside temporary files.

    Raises ConfigError for a folder that others made, own, or may look into: its files name processes.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "r1-cluster" if runtime else _temporary()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        words = "set XDG_RUNTIME_DIR to a folder of yours, or unset it"
        raise ConfigError(f"{folder}, where services are kept, cannot be made ({why}); {words}") from None
    if not stat.S_ISDIR(status.st_mode):
        fault = "is not a folder"
    elif status.st_uid != os.getuid():
        fault = f"belongs to user {status.st_uid}, not to you"
    elif status.st_mode & 0o077:
        fault = f"is open to others (mode {stat.S_IMODE(status.st_mode):o})"
    else:
        return folder
    raise ConfigError(f"{folder}, where services are kept, {fault}; remove it, or set XDG_RUNTIME_DIR")


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"r1-cluster-{os.getuid()}"


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none, or only its exit status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def remember(running: Running) -> None:
    """Writes the service's file, whole or not at all."""
    folder = private_folder()
    fresh = folder / f".{running.name}.{secrets.token_hex(4)}"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(running))
    fresh.replace(folder / f"{running.name}.json")


def forget(name: str) -> None:
    """Removes the service's file, if there is one."""
    (private_folder() / f"{name}.json").unlink(missing_ok=True)


def services(name: str | None = None) -> list[Running]:
    """All services, or those of that name, whose `serve` command lives, or whose cluster is not local to it.
    Raises ConfigError for a file that `serve` has not written so."""
    found = []
    for path in sorted(private_folder().glob("*.json")):
        if name is not None and path.stem != name:
            continue
        try:
            running = msgspec.json.decode(path.read_bytes(), type=Running)
        except FileNotFoundError:
            continue  # stopped just now
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ConfigError(f"{path} does not say what is running; remove it") from None
        if running.name != path.stem:
            raise ConfigError(f"{path} speaks of another service, {running.name!r}; remove it")
        if running.local and start_time(running.pid) != running.started:
            path.unlink(missing_ok=True)
        else:
            found.append(running)
    return found


def find(name: str | None) -> Running:
    """The service called `name`, or the only one; raises ConfigError with what to do."""
    known = services(name)
    if len(known) == 1:
        return known[0]
    if not known:
        which = f"service {name!r}" if name else "service"
        raise ConfigError(f"no {which} is running here; start one with: r1-cluster serve SERVICE.yaml")
    names = ", ".join(running.name for running in known)
    raise ConfigError(f"several services are running ({names}); say which with --service NAME")


def ask(running: Running, number: signal.Signals) -> None:
    """Signals a service's `serve` command; nobody, if that has ended, whoever has its number now."""
    try:
        process = os.pidfd_open(running.pid)
    except ProcessLookupError:
        return
    try:
        # From here on the descriptor means one process, and this is whether it is the right one.
        if start_time(running.pid) == running.started:
            signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        pass  # it has ended just now
    finally:
        os.close(process)
