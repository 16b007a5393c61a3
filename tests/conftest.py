"""A service started as a user starts it: `r1-cluster serve FILE`, ended by Ctrl-C."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from make_checkpoint import make_checkpoint

R1_CLUSTER = Path(sys.executable).with_name("r1-cluster")
LAYOUTS = {
    "colocated": {"kind": "colocated", "cpus_per_worker": 0.5},
    "disaggregated": {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "cpus_per_worker": 0.2},
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid):
    """Process ids below `pid`, it included."""
    found = [pid]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            found += descendants(int(child))
    return found


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


class Service:
    """A running `r1-cluster serve`."""

    def __init__(self, file, name, port, log, environment):
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.environment = environment
        self.process = subprocess.Popen(
            [R1_CLUSTER, "serve", file],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def wait_ready(self, timeout_s=120):
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random checkpoint; its texts are gibberish, but every token depends on all tokens before it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, size="nano", seed=3, max_position_embeddings=2048)
    return folder


@pytest.fixture(scope="session")
def start(checkpoint, tmp_path_factory):
    """start(name, layout, **sections) → Service; whatever still runs at the end is interrupted."""
    running = []

    def begin(name, layout, **sections):
        folder = tmp_path_factory.mktemp(name)
        port = free_port()
        data = {
            "name": name,
            "model": {"path": str(checkpoint), "name": "tiny"},
            "layout": layout,
            "serve": {"port": port},
            **sections,
        }
        (folder / "service.yaml").write_text(yaml.safe_dump(data))
        environment = {**os.environ, "RAY_memory_monitor_refresh_ms": "0", "TMPDIR": tempfile.gettempdir()}
        environment.pop("RAY_ADDRESS", None)
        service = Service(folder / "service.yaml", name, port, folder / "log.txt", environment)
        running.append(service)
        return service

    yield begin
    for service in running:
        service.interrupt()


@pytest.fixture(scope="session", params=LAYOUTS)
def service(request, start):
    """The same model in each layout, one after the other."""
    running = start(f"test-{request.param}", LAYOUTS[request.param]).wait_ready()
    yield running
    code, pids = running.interrupt()
    assert code == 0, running.log.read_text()
    left = [pid for pid in pids if alive(pid)]
    assert not left, f"processes left behind: {left}\n{running.log.read_text()}"
    assert re.search(r"stopped\s*$", running.log.read_text())
