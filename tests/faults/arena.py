"""A service that is hurt again and again, and one fault in it from beginning to end."""

import contextlib
import json
import os
import re
import secrets
import select
import signal
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from faults.inflict import Targets
from faults.leaks import Observer
from faults.load import Load, quantile, streams
from running_service import Service, alive, descendants

HOOKS = Path(__file__).with_name("hooks")
DISAGGREGATED = {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "cpus_per_worker": 0.15}
LAYOUTS = {
    "colocated": {"kind": "colocated", "cpus_per_worker": 0.5},
    "watched": {"kind": "colocated", "cpus_per_worker": 0.5},
    "disaggregated": DISAGGREGATED,
    "guarded": DISAGGREGATED | {"spares": 1},
    "copies": DISAGGREGATED | {"redundant_experts": 1},
    "ranks": {"kind": "colocated", "tensor_parallel": 2, "cpus_per_worker": 0.25},
    "expert-parallel": {"kind": "expert-parallel", "data_parallel": 2, "cpus_per_worker": 0.25},
    "parallel-copies": {
        "kind": "expert-parallel",
        "data_parallel": 2,
        "redundant_experts": 1,
        "cpus_per_worker": 0.25,
    },
}
ENGINES = {"guarded": {"standby": True}, "watched": {"standby": True}}
# Chunks so small that 16 prompts take many steps; a deadline that a slow machine keeps; a queue that tests can fill.
ENGINE = {
    "lease_s": 20.0,
    "step_timeout_s": 3.0,
    "max_batch_tokens": 64,
    "max_num_seqs": 64,
    "max_queued": 24,
}
SERVE = {"body_timeout_s": 3.0}


@dataclass(frozen=True)
class Kill:
    """Which part dies, how (kill, stop, cut, exception), and when (prefill, decode, recovery)."""

    part: str
    how: str
    when: str

    def first(self, names):
        """Which of the parts dies before, where the death is to fall into a recovery."""
        if self.part.startswith(("stage-0", "dp-0")):
            return "engine"
        return min(name for name in names if name.startswith(("stage-0", "dp-0")))


def injecting(folder, poison=()):
    """The environment of a service whose faults are asked for in `folder`; `poison`: tokens that kill."""
    (folder / "tokens").mkdir(parents=True)
    if poison:
        (folder / "poison").write_bytes(struct.pack(f"<{len(poison)}i", *poison))
    path = os.pathsep.join([str(HOOKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "R1_HOOKS": "injected", "R1_FAULTS": str(folder)}


class Arena:
    """A running service with its observer. Whatever was stopped here and is still there at the end is ended."""

    def __init__(self, folder, checkpoint, layout, requests=None, poison=(), dtype=None, **engine):
        self.folder = folder / "faults"
        self.requests = streams() if requests is None else requests
        environment = injecting(self.folder, poison)
        model = {"path": str(checkpoint), "name": "tiny", "dtype": dtype}
        sections = {"model": model, "engine": {**ENGINE, **engine}, "serve": SERVE}
        name = f"faults-{secrets.token_hex(3)}"  # several may run on one machine
        for attempt in ("first", "second"):
            self.service = Service(folder, name, checkpoint, layout, environment, **sections)
            try:
                self.service.wait_ready(240)
                break
            except BaseException as error:
                self._end()
                # Ray gives its own processes 30 s, which a machine that does much else can miss.
                if "timed out during startup" not in str(error) or attempt == "second":
                    raise
        self.observer = Observer(self.service)
        self._hurt = {}
        self._killed = []

    def load(self, requests=None):
        """Streams that run now."""
        return Load(self.service.url, self.folder, self.requests if requests is None else requests)

    def targets(self, seen=None):
        """Who is who: by an answer of the observer, else once the service is whole and idle."""
        return Targets(self.observer.pids(seen), self.folder)

    def inflict(self, targets, part, how):
        """Hurts a part; returns when."""
        if how in ("kill", "stop"):  # else it may live on
            pid = targets.pids[part]
            self._hurt[os.pidfd_open(pid)] = pid  # a number alone may be another's by the end
        if how == "kill":
            self._killed.append(targets.pids[part])
        now = time.monotonic()
        targets.inflict(part, how)
        return now

    def resume(self, pid):
        """Lets a stopped process run on; from now on it may live."""
        os.kill(pid, signal.SIGCONT)
        for pidfd in [pidfd for pidfd, hurt in self._hurt.items() if hurt == pid]:
            del self._hurt[pidfd]
            os.close(pidfd)

    def noticed(self, since, part):
        """Seconds until an engine knew of the part's loss, or, for the engine, until another one started;
        None if that did not happen."""
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / "events").read_text().splitlines():
                at, what, who = json.loads(line)
                if at >= since and (what == "engine" if part == "engine" else part in who.split(",")):
                    return round(at - since, 3)
        return None

    def starts(self, since):
        """Seconds that the processes which took a lost worker's place needed to start and load, the longest
        since a time (time.time()); None where a spare, a copy or nobody did."""
        engines = self.observer.ask().get("engines", [])
        log = [entry for engine in engines for entry in engine.get("recovery_log", [])]
        return max((e["start_s"] for e in log if e["at"] >= since and e["start_s"]), default=None)

    def close(self):
        """Ctrl-C, unless it came before; AssertionError if the service does not end well, leaves a process
        behind, or has filled its terminal with what Ray says of a death."""
        if self.service.process.poll() is not None:
            return
        self.observer.close()
        hurt = []
        for pidfd, pid in self._hurt.items():
            poll = select.poll()  # select takes no descriptors beyond 1,023
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(0):  # it has not ended
                hurt.append(pid)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        self._hurt.clear()
        code, pids = self._end()
        assert code == 0, self.service.log.read_text()
        assert not hurt, f"hurt, and still there at the end: {hurt}"
        left = [pid for pid in pids if alive(pid)]
        assert not left, f"processes left behind: {left}"
        terminal = self.service.log.read_text()
        assert terminal.rstrip().endswith("stopped")
        self._check_terminal(terminal)

    def _check_terminal(self, terminal):
        """Lines name who died, and the file with the rest; of Ray's own words there is none. Not every death
        has a line, and some who died were ended for another's sake."""
        assert "(raylet)" not in terminal
        assert max(map(len, terminal.splitlines())) < 300
        if self._killed:
            form = r"^\S.* died \(process (\d+)\) and is being replaced; details: (.*)$"
            told = re.findall(form, terminal, re.M)
            assert told, terminal
            details = Path(told[0][1]).read_text()
            assert all(f"Worker PID: {pid} " in details for pid, _ in told)
            assert any(f"Worker PID: {pid} " in details for pid in self._killed)

    def _end(self):
        """Ctrl-C; what does not heed it is killed."""
        try:
            return self.service.interrupt(120)
        except subprocess.TimeoutExpired:
            for pid in reversed(descendants(self.service.process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise


class Ring:
    """The service under test: one layout's after the other's, and a new one after a test that failed."""

    def __init__(self, begin):
        """`begin(layout)` → an Arena."""
        self._spoiled = False
        self._begin = begin
        self._layout = None
        self._arena = None
        self._loaded = False
        self._undisturbed = {}

    def running(self, layout):
        """The arena of a layout, for tests that do it no harm."""
        if self._spoiled or layout != self._layout:
            self.close()
            self._arena, self._loaded = self._begin(layout), False
            self._layout = layout
        return self._arena

    def enter(self, layout):
        """(the arena of a layout, the answers of its undisturbed load, what it holds when idle); a test that
        does not come to `leave` has spoiled it."""
        arena = self.running(layout)
        if not self._loaded:
            # Also because the link from an engine to an ingress is opened by the first request.
            ended = arena.load().join()
            assert [stream.error for stream in ended if stream.error is not None] == []
            answers = [stream.answer for stream in ended]
            assert self._undisturbed.setdefault(layout, answers) == answers
            self._loaded = True
        self._spoiled = True
        return arena, self._undisturbed[layout], arena.observer.holdings()

    def leave(self):
        """The test has passed: its successor may use the same service."""
        self._spoiled = False

    def close(self):
        """Ends the service; one that was spoiled need not end well."""
        arena, self._arena, self._layout = self._arena, None, None
        spoiled, self._spoiled = self._spoiled, False
        if arena is not None:
            with contextlib.suppress(*[AssertionError, subprocess.TimeoutExpired] * spoiled):
                arena.close()


def undergo(arena, kill):
    """One fault under load. Returns the streams and a record of what happened; see `record`."""
    targets = arena.targets()
    began = time.time()
    load = arena.load()
    if kill.when == "prefill":
        in_time = load.wait(lambda: load.num_started >= 1)
        in_time &= load.num_started < len(load.streams)
    else:
        in_time = load.wait(lambda: load.decoding)
    since = time.monotonic()
    if kill.when == "recovery":
        arena.inflict(targets, kill.first(targets.pids), "kill")
        load.wait(lambda: load.quiet_for(0.2), timeout_s=5.0)
    at = arena.inflict(targets, kill.part, kill.how)
    in_time &= load.mostly_open
    results = load.join()
    return results, {
        "part": kill.part,
        "how": kill.how,
        "when": kill.when,
        "in_time": in_time,
        "streams": len(results),
        "detection_s": arena.noticed(at, kill.part),
        "start_s": arena.starts(began),
        "stalls": [stream.stalls(since) for stream in results],
    }


def summary(record):
    """One line for a reader; of a record to which `layout` and `lost` were added."""
    longest = [max(stalls, default=0.0) for stalls in record["stalls"]]
    words = (
        f"{record['layout']} {record['part']} {record['how']} during {record['when']}: lost {record['lost']}, "
        f"noticed after {record['detection_s']} s, stall p50 {quantile(longest, 0.5):.2f} s, "
        f"p99 {quantile(longest, 0.99):.2f} s"
    )
    return words if record["in_time"] else f"{words} (came too late or early)"
