"""A service started as a user starts it: `r1-cluster serve FILE`, ended by Ctrl-C."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

R1_CLUSTER = Path(sys.executable).with_name("r1-cluster")

allowed = True
"""Whether a service may be started now; in tests (conftest.py) only in those marked `cluster`."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid):
    """Process ids below `pid`, it included."""
    found = [pid]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += descendants(int(child))
    return found


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Service:
    """A running `r1-cluster serve`, from a service file written into `folder`."""

    def __init__(self, folder, name, checkpoint, layout, environment=None, **sections):
        assert allowed, "a test that starts a service is marked `cluster`"
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log.txt"
        self.file = folder / "service.yaml"
        self.data = {
            "name": name,
            "model": {"path": str(checkpoint), "name": "tiny"},
            "layout": layout,
            **sections,
            "serve": {"port": self.port, **sections.get("serve", {})},
        }
        self.write()
        self.environment = {
            **os.environ,
            "RAY_memory_monitor_refresh_ms": "0",
            "TMPDIR": tempfile.gettempdir(),
            **(environment or {}),
        }
        self.environment.pop("RAY_ADDRESS", None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [R1_CLUSTER, "serve", self.file],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def write(self, **sections):
        """Writes the service file, with these sections in place of the present ones."""
        self.data |= sections
        self.file.write_text(yaml.safe_dump(self.data))

    def wait_ready(self, timeout_s=240):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if "ready:" in self.log.read_text():
                return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log.read_text()}")

    def command(self, *arguments):
        result = subprocess.run(
            [R1_CLUSTER, *arguments, "--service", self.name],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def status(self):
        return json.loads(self.command("status", "--json"))

    def interrupt(self, timeout_s=60):
        """Ctrl-C; returns the exit code and the processes that were there just before."""
        pids = descendants(self.process.pid) if self.process.poll() is None else []
        if pids:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout_s), pids
