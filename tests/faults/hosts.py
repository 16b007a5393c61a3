"""Several hosts on one machine: each a network namespace joined to a bridge, with processes, mounts, host name,
/tmp/ray and /dev/shm of its own. A host can lose its power, its cable, or single processes.

Needs root, iproute2 and util-linux. Nothing outlives `Hosts.close`: a host's processes live in its PID namespace
and end with that namespace's init, which the kernel ends with the process that made it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
GCS_PORT = 6379
_MADE = itertools.count()
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_TMPDIR": "/tmp",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # of Ray's own accord 15: whatever else runs here would starve them
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# Ports of Ray's agents: for those that it is not told, a raylet waits 15 s and then aborts, busy machine or not.
RAY_OPTIONS = [
    "--dashboard-agent-listen-port=52365",
    "--dashboard-agent-grpc-port=52366",
    "--metrics-export-port=52367",
    "--runtime-env-agent-port=52368",
    "--object-store-memory=100000000",
]
# Bash reaps what is orphaned, as an init must, and ends when its standard input does.
INIT = """
hostname {name}
mkdir -p /tmp/ray
mount -t tmpfs none /tmp/ray
mount -t tmpfs none /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
ip link set lo up
echo ready
exec 3<&0
cat <&3 >/dev/null & wait $!
"""


def why_not() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"hosts in network namespaces need {', '.join(missing)} (iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"this kernel makes no bridge: {tried.stderr.strip()}"


class Host:
    """One host. `address` is its own on the bridge; `init` the process id, outside, of its init."""

    def __init__(self, name: str, folder: Path, namespace: str, port: str, address: str) -> None:
        self.name = name
        self.folder = folder
        self.namespace = namespace
        self.port = port
        self.address = address
        self.holder: subprocess.Popen[str] | None = None
        self.init = 0

    @property
    def up(self) -> bool:
        return self.init != 0

    def boot(self) -> None:
        """Starts the host's init; what was on its /tmp/ray and /dev/shm before is gone."""
        assert not self.up
        self.folder.mkdir(exist_ok=True)
        # Names are looked up on the host alone: a query to a server that is out of reach takes seconds.
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        (self.folder / "resolv.conf").write_text("")
        with (self.folder / "init.txt").open("w") as errors:
            self.holder = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self.namespace),
                    *("unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc"),
                    *("bash", "-c", INIT.format(name=self.name, folder=self.folder)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n", f"{self.name} did not boot"
        # `ip netns exec` and `unshare` are one process by now; its only child is the init.
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        self.init = int(children[0])

    def halt(self) -> None:
        """Ends all of the host's processes at once; their sockets close unless the cable was pulled before."""
        if not self.up:
            return
        assert self.holder is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self.holder.wait(30)  # `unshare` ends after the init, which ends after all others
        self.holder.stdin.close()
        self.holder.stdout.close()
        self.init = 0

    def processes(self, text: str) -> list[int]:
        """Ids, outside, of the host's processes whose command line contains `text`."""
        network = os.readlink(f"/proc/{self.init}/ns/net")
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and os.readlink(folder / "ns/net") == network:
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if text in command:
                        found.append(int(folder.name))
        return found


class Hosts:
    """`number` hosts, booted. `environment` is added to that of every command on them; `folder` keeps logs."""

    def __init__(self, folder: Path, number: int, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        _sweep()
        self._mark = f"{os.getpid():x}-{next(_MADE)}"
        self._bridge = f"r1b{self._mark}"
        self._subnet = _subnet_of(self._mark)
        self._commands: list[subprocess.Popen[bytes]] = []
        self.head_environment: dict[str, str] = {}
        token = folder / "ray-token"
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = {
            **kept,
            **RAY_ENVIRONMENT,
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder),  # where `serve` writes down what runs: every host's command finds it
            **(environment or {}),
        }
        self.hosts = [
            Host(
                f"host{i}",
                folder / f"host{i}",
                f"r1-{self._mark}-{i}",
                f"r1v{self._mark}-{i}",
                f"{self._subnet}.{i + 1}",
            )
            for i in range(number)
        ]
        try:
            self._wire()
            for host in self.hosts:
                host.boot()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def named(self, name: str) -> Host:
        """The host of this name."""
        return next(host for host in self.hosts if host.name == name)

    @property
    def outside(self) -> str:
        """The address of the machine itself on the bridge, which no host's death changes."""
        return f"{self._subnet}.254"

    def _wire(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.outside}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in self.hosts:
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.port, "master", self._bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "route", "add", "default", "via", self.outside)

    def argv(self, host: Host, *command: object) -> list[str]:
        """What to start, here, for a command to run on a host."""
        entered = ["nsenter", "--target", str(host.init), "--pid", "--mount", "--uts", "--net"]
        return [*entered, *(str(word) for word in command)]

    def run(
        self, host: Host, *command: object, timeout_s: float = 60.0, environment: dict[str, str] | None = None
    ) -> str:
        """Runs a command on a host; returns what it printed. Fails the test if it fails."""
        result = subprocess.run(
            self.argv(host, *command),
            env=self.environment | (environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert result.returncode == 0, f"{host.name}: {command}:\n{result.stdout}{result.stderr}"
        return result.stdout

    def begin(self, host: Host, log: Path, *command: object) -> subprocess.Popen[bytes]:
        """Starts a command on a host in the background."""
        with log.open("w") as file:
            process = subprocess.Popen(
                self.argv(host, *command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._commands.append(process)
        return process

    def start_ray(self, *, cpus_of_head: float = 0, cpus: float = 1) -> None:
        """A head on the first host, raylets on all others."""
        self.start_head(cpus_of_head)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda host: self.join(host, cpus), self.hosts[1:]))

    def start_head(self, cpus: float = 0) -> None:
        """Starts Ray's head on the first host, with `head_environment`, such as where its Redis is."""
        options = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false", "--disable-usage-stats"]
        self._start(self.hosts[0], cpus, options, self.head_environment)

    def join(self, host: Host, cpus: float = 1) -> None:
        """Starts a raylet on a host."""
        self._start(host, cpus, [f"--address={self.hosts[0].address}:{GCS_PORT}"], {})

    def _start(self, host: Host, cpus: float, options: list[str], environment: dict[str, str]) -> None:
        """`ray start`, which gives up after 30 s; on a busy machine that is tried again, from nothing."""
        words = ["ray", "start", *options, f"--node-ip-address={host.address}", f"--num-cpus={cpus}"]
        for tries_left in (2, 1, 0):
            try:
                self.run(host, *words, *RAY_OPTIONS, timeout_s=120, environment=environment)
                return
            except (AssertionError, subprocess.TimeoutExpired):
                if not tries_left:
                    raise
                host.halt()
                host.boot()

    def cut(self, host: Host) -> None:
        """Pulls the host's cable: nobody is told anything."""
        _ip("link", "set", host.port, "down")

    def heal(self, host: Host) -> None:
        """Plugs it in again."""
        _ip("link", "set", host.port, "up")

    def part(self, one: Host, other: Host) -> None:
        """Loses whatever the two send to each other, in silence; everyone else still reaches both."""
        for host, peer in ((one, other), (other, one)):
            nobody = "02:00:00:00:00:01"
            _ip("-n", host.namespace, "neigh", "replace", peer.address, "lladdr", nobody, "dev", "eth0")

    def unite(self, one: Host, other: Host) -> None:
        """Lets them reach each other again."""
        for host, peer in ((one, other), (other, one)):
            _ip("-n", host.namespace, "neigh", "del", peer.address, "dev", "eth0")

    def lose_power(self, host: Host) -> None:
        """The host is gone between two packets: no socket of its says goodbye."""
        self.cut(host)
        host.halt()

    def close(self) -> None:
        """Ends every host and takes away what was made for them, however far that had come."""
        for host in self.hosts:
            host.halt()
        for process in self._commands:
            process.wait(30)  # they ran on the hosts
        for host in self.hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
            subprocess.run(["ip", "link", "del", host.port], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)


def _ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert result.returncode == 0, f"ip {' '.join(words)}: {result.stderr}"


def _subnet_of(mark: str) -> str:
    """One that no other hosts have, even if another process makes them at the same moment."""
    process_id, number = int(mark.split("-", maxsplit=1)[0], 16), int(mark.split("-")[1])
    return f"10.{80 + (process_id >> 8) % 40 * 4 + number % 4}.{process_id % 256}"


def _sweep() -> None:
    """Takes away what a run left behind that was killed: names carry the id of the process that made them.
    Its hosts' processes are gone already, as they end with their init's standard input."""
    for line in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.splitlines():
        made_by = re.fullmatch(r"r1-([0-9a-f]+)-\d+-\d+", line.split()[0])
        if made_by and not Path(f"/proc/{int(made_by[1], 16)}").exists():
            subprocess.run(["ip", "netns", "del", made_by[0]], capture_output=True)
    for folder in Path("/sys/class/net").iterdir():
        made_by = re.fullmatch(r"r1[bv]([0-9a-f]+)-\d+(-\d+)?", folder.name)
        if made_by and not Path(f"/proc/{int(made_by[1], 16)}").exists():
            subprocess.run(["ip", "link", "del", folder.name], capture_output=True)


def wait_until(condition, timeout_s: float, what: str, every_s: float = 0.1) -> float:
    """Waits for a condition; returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - began
