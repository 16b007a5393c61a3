"""Faults inside a service under test (see sitecustomize.py).

`R1_FAULTS` names a folder, in which

- a file called like a worker (or `engine`) makes that worker's (the engine's) next step raise; it is removed;
- `poison` holds token ids (int32): the first stage's process ends when a plan has them in a row;
- `events` gets a line whenever an engine starts, loses a worker or hears one accused: the time (CLOCK_MONOTONIC), what, who;
- `tokens/<id of the answer>` gets the tokens of every streamed answer that asked for its usage.
"""

import functools
import json
import os
import time
from pathlib import Path

FOLDER = Path(os.environ["R1_FAULTS"])


class InjectedError(Exception):
    """What a step raises."""


def raise_if_asked(name):
    path = FOLDER / name
    if path.exists():
        path.unlink(missing_ok=True)
        raise InjectedError(f"injected into {name}")


def note(what, who):
    line = json.dumps([time.monotonic(), what, who]) + "\n"
    with (FOLDER / "events").open("a") as file:
        file.write(line)


def before(owner, name, act):
    """`act(self, *arguments)` comes before every call of a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(self, *arguments, **options):
        act(self, *arguments)
        return method(self, *arguments, **options)

    setattr(owner, name, wrapped)


def wrap_worker(module):
    steps = {module.Kind.PLAN, module.Kind.HIDDEN, module.Kind.MOE, module.Kind.DISPATCH}
    poison = FOLDER / "poison"
    poisonous = poison.read_bytes() if poison.exists() else None

    def step(worker, link, message):
        kind = message.header.kind
        if kind in steps:
            raise_if_asked(worker.spec.name)
        if kind == module.Kind.PLAN and poisonous and poisonous in bytes(message.body):
            os._exit(13)

    before(module.Worker, "_handle", step)


def wrap_core(module):
    before(module.EngineCore, "_finish", lambda *_: raise_if_asked("engine"))
    before(module.EngineCore, "start", lambda *_: note("engine", str(os.getpid())))


def wrap_recovery(module):
    def lose(recovery, names):
        new = [name for name in names if name not in recovery.missing]
        if new:
            note("lost", ",".join(new))

    before(module.Recovery, "lose", lose)
    before(module.Recovery, "accuse", lambda _, names: note("accused", ",".join(names)))


def wrap_chat(module):
    def keep(stream):
        # Written aside and renamed, so that whoever sees it sees all of it.
        path = FOLDER / "tokens" / stream.id
        path.with_suffix(".part").write_text(json.dumps(stream.tokens))
        path.with_suffix(".part").rename(path)

    before(module.ChatStream, "usage", keep)


ACTS = {
    "r1_cluster.engine.worker": wrap_worker,
    "r1_cluster.engine.core": wrap_core,
    "r1_cluster.engine.recovery": wrap_recovery,
    "r1_cluster.api.chat": wrap_chat,
}
