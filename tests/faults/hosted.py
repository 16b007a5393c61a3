"""A service on several hosts, and the streams that must not notice what happens to it."""

import concurrent.futures
import json
import os
import signal
import threading
import time
from pathlib import Path

import openai
import yaml
from faults.hosts import GCS_PORT, wait_until

LEASE_S = 6.0
PORT = 8000
LAYOUT = {"kind": "disaggregated", "stages": 2, "expert_shards": 3, "cpus_per_worker": 0.2, "spread": True}
LOAD = [
    {
        "messages": [{"role": "user", "content": f"question {i} " + "word " * (11 * i % 70)}],
        "max_tokens": 200 + 10 * i,
        "extra_body": {"ignore_eos": True},
        **({"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i}),
    }
    for i in range(16)
]


def stream(host, options, started):
    """(text, longest pause between chunks in s) of one answer, asked of the proxy on `host`."""
    url = f"http://{host.address}:{PORT}/v1"
    text, pause, last = "", 0.0, time.monotonic()
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=150) as client:
        for chunk in client.chat.completions.create(model="tiny", stream=True, **options):
            started.set()
            now = time.monotonic()
            pause, last = max(pause, now - last), now
            for choice in chunk.choices:
                delta = choice.delta
                text += (getattr(delta, "reasoning_content", None) or "") + (delta.content or "")
    return text, pause


def all_streams(host, meanwhile=lambda: None):
    """(texts, longest pause) of the load; `meanwhile` runs once half a second of it has been streamed."""
    started = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(17) as pool:
        answers = [pool.submit(stream, host, options, started) for options in LOAD]
        assert started.wait(60)
        time.sleep(0.5)
        done = pool.submit(meanwhile)
        results = [answer.result() for answer in answers]
        done.result()
    return [text for text, _ in results], max(pause for _, pause in results)


class Service:
    """A service that `r1-cluster serve --address` deployed on hosts."""

    def __init__(self, hosts, checkpoint, served_on, name="hosts", layout=LAYOUT):
        self.hosts, self.name, self._served_on = hosts, name, served_on
        self._file = file = hosts.folder / f"{name}.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "name": name,
                    "model": {"path": str(checkpoint), "name": "tiny"},
                    "layout": layout,
                    "engine": {"lease_s": LEASE_S},
                    "serve": {"host": "0.0.0.0", "port": PORT},
                }
            )
        )
        address = f"{hosts[0].address}:{GCS_PORT}"
        log = hosts.folder / f"serve-{name}.txt"
        self._command = hosts.begin(served_on, log, "r1-cluster", "serve", file, "--address", address)
        wait_until(lambda: "ready:" in log.read_text() or self._command.poll() is not None, 240, "ready")
        assert "ready:" in log.read_text(), log.read_text()
        self.undisturbed, _ = all_streams(self.edge)
        self._num_workers = len(self.workers())

    def stop(self):
        """Takes the service off the hosts, as Ctrl-C does."""
        (pid,) = self._served_on.processes(f"bin/r1-cluster serve {self._file}")
        os.kill(pid, signal.SIGINT)
        self._command.wait(60)

    def host_of(self, deployment):
        """The host that runs the replica of a deployment."""
        title = f"ray::ServeReplica:{self.name}:{deployment}"
        return next(host for host in self.hosts.hosts if host.up and host.processes(title))

    @property
    def edge(self):
        """The host whose proxy and ingress carry the streams."""
        return self.host_of("Ingress")

    def engine(self):
        """What `r1-cluster status` says of the engine."""
        # But where Ray runs: a host that was cut off for long has lost its raylet.
        anywhere = next(host for host in self.hosts.hosts[1:] if host.up and host.processes("raylet/raylet"))
        (engine,) = json.loads(self.hosts.run(anywhere, "r1-cluster", "status", "--json"))["engines"]
        return engine

    def workers(self):
        """Worker → the host that it runs on."""
        return {worker["name"]: self.hosts.named(worker["host"]) for worker in self.engine()["workers"]}

    def bystander(self):
        """A host of workers that is neither the engine's nor the ingress's."""
        busy = {self.edge.name, self.host_of("Engine").name}
        return next(host for host in self.workers().values() if host.name not in busy)

    def engine_log(self):
        """The file of what the engine's process writes on its standard error: losses and recoveries."""
        (pid,) = self.host_of("Engine").processes(f"ray::ServeReplica:{self.name}:Engine")
        return Path(f"/proc/{pid}/fd/2")

    def check_whole(self):
        engine = self.engine()
        assert (engine["running"], engine["pages_used"], engine["missing"]) == (0, 0, [])
        assert [worker["state"] for worker in engine["workers"]] == ["alive"] * self._num_workers
        return engine


def noticed_after(service, break_it, says="lost "):
    """Does harm; returns the seconds until the engine says that it lost somebody, or what else it is to say."""
    log = service.engine_log()
    before = log.read_text(errors="replace").count(says)
    break_it()
    return wait_until(lambda: log.read_text(errors="replace").count(says) > before, 60, "noticed", 0.02)
