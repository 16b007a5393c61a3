"""What a service holds: counted before and after, and waited for until it is the same again."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
from faults.inflict import peer_pid, sockets_of, title
from running_service import alive, descendants

# A spare may have taken anybody's place, so that workers are told apart by their links alone.
ROLES = dict.fromkeys(("StageActor", "RouterActor", "ExpertActor", "SpareActor"), "Worker")
ROLES |= {"Engine": "Engine", "Ingress": "Ingress"}
UNSEEN = {"error": "the observer does not answer"}


class Observer:
    """Asks a service what it is and holds; see observer.py."""

    def __init__(self, service):
        self._service = service
        running = Path(service.environment["TMPDIR"]) / f"r1-cluster-{os.getuid()}" / f"{service.name}.json"
        self.address = msgspec.json.decode(running.read_bytes())["address"]
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("observer.py"), self.address, service.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=service.environment,
            text=True,
        )

    def ask(self):
        """{engines, actors, groups}, or {error}."""
        try:
            self._process.stdin.write("?\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline() or json.dumps(UNSEEN))
        except BrokenPipeError:
            return UNSEEN

    def processes(self):
        """{pid: title} of the service's parts."""
        titles = {pid: title(pid) for pid in descendants(self._service.process.pid)}
        return {pid: ROLES[name] for pid, name in titles.items() if name in ROLES}

    def pids(self, seen=None):
        """{name: pid} of every worker, `engine` (of the first one) and `ingress`; `seen`: an answer to
        `ask`, else one of a settled service."""
        pids = {"ingress": next(pid for pid, name in self.processes().items() if name == "Ingress")}
        engines = (seen or self.settled())["engines"]
        for engine in reversed([engine for engine in engines if not engine["standby"]]):
            pids |= {row["name"]: row["pid"] for row in engine["workers"] if row["state"] == "alive"}
            pids["engine"] = engine["pid"]
        return pids

    def settled(self, timeout_s=60.0):
        """What is seen once nobody is missing and nothing runs; AssertionError if that takes too long."""
        return self._until(lambda _: True, timeout_s)

    def holdings(self, timeout_s=60.0):
        """What the service holds when it is idle."""
        return self._holdings(self.settled(timeout_s))

    def wait_equal(self, before, timeout_s=60.0):
        """Waits until the service holds what it held `before`; AssertionError with the difference."""
        self._until(lambda seen: self._holdings(seen) == before, timeout_s, before)

    def wait_for(self, condition, timeout_s=60.0):
        """Waits until `condition(holdings)` of an idle service."""
        self._until(lambda seen: condition(self._holdings(seen)), timeout_s)

    def close(self):
        """Leaves the cluster."""
        if self._process.stdin.closed:
            return
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _until(self, condition, timeout_s, before=None):
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self.ask()
            if "error" not in seen and all(_idle(engine) for engine in seen["engines"]) and condition(seen):
                return seen
            if time.monotonic() > deadline:
                now = self._holdings(seen) if "error" not in seen else None
                raise AssertionError(
                    f"after {timeout_s:g} s:\n{_brief(seen)}\nheld now: {now}\nbefore: {before}"
                )
            time.sleep(0.2)  # between two looks

    def _holdings(self, seen):
        processes = self.processes()
        links = Counter()
        for pid, name in processes.items():
            for sock in sockets_of(pid):
                peer = peer_pid(sock)
                if peer in processes and peer != pid:
                    links[f"{name}–{processes[peer]}"] += 1
                elif peer is not None and not alive(peer):
                    links[f"{name}–dead"] += 1
        return {
            "processes": dict(sorted(Counter(processes.values()).items())),
            "actors": len(seen["actors"]),
            "groups": seen["groups"],
            "links": dict(sorted(links.items())),
            "pages": sum(engine.get("pages_used", 0) for engine in seen["engines"]),
        }


def _idle(engine):
    return engine["standby"] or (
        engine["failure"] is None
        and engine["missing"] == []
        and engine["running"] == engine["waiting"] == engine["pages_used"] == 0
        and all(worker["state"] == "alive" for worker in engine["workers"])
    )


def _brief(seen):
    if "error" in seen:
        return seen["error"]
    keys = ("engine", "pid", "epoch", "failure", "missing", "running", "waiting", "pages_used")
    engines = [engine for engine in seen["engines"] if not engine["standby"]]
    rows = [{key: engine[key] for key in keys} for engine in engines]
    silent = [worker for engine in engines for worker in engine["workers"] if worker["state"] != "alive"]
    return f"{rows}, silent: {silent}"


def memory(pids):
    """Resident bytes of each process that is there."""
    resident = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            resident[pid] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return resident
