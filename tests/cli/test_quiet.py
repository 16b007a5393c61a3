"""What a person sees of what Ray prints."""

import io
import re
import stat
import sys
import threading

import pytest

from r1_cluster.cli import quiet as module
from r1_cluster.cli.quiet import quiet

ESSAY = (
    "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem, "
    "check the logs for the dead worker. Lease ID: 0600 Worker ID: e1ee Node ID: 2760 Worker IP address: 192.0.2.2 "
    "Worker port: 44881 Worker PID: {pid} Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits."
)
NAMES = {11: "router-0", 12: "router-0", 13: "router-0", 21: "the engine"}


@pytest.fixture
def terminal():
    return io.StringIO()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "tiny.log"


def from_ray(*words):
    """As Ray does it: from a thread of its own, coloured, each line by `print`."""

    def print_all():
        for line in words:
            print(f"\x1b[33m(raylet)\x1b[0m {line}", file=sys.stdout)

    thread = threading.Thread(target=print_all)
    thread.start()
    thread.join()


def test_a_death_is_one_line_and_its_essay_in_a_file(terminal, log):
    with quiet(terminal, log, NAMES.get):
        print("ready")
        from_ray(ESSAY.format(pid=11))
        from_ray(ESSAY.format(pid=21), ESSAY.format(pid=99))
        print("stopping")
    assert terminal.getvalue().splitlines() == [
        "ready",
        f"router-0 died (process 11) and is being replaced; details: {log}",
        f"the engine died (process 21) and is being replaced; details: {log}",
        f"a worker of Ray died (process 99) and is being replaced; details: {log}",
        "stopping",
    ]
    assert [re.search(r"PID: (\d+)", line)[1] for line in log.read_text().splitlines()] == ["11", "21", "99"]
    assert "\x1b" not in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_repeats_become_a_count(terminal, log, monkeypatch):
    monkeypatch.setattr(module, "REPEATS_S", 0.3)
    said = threading.Event()
    monkeypatch.setattr(terminal, "flush", lambda: "more times" in terminal.getvalue() and said.set())
    with quiet(terminal, log, NAMES.get):
        from_ray(ESSAY.format(pid=11))
        from_ray(ESSAY.format(pid=12), ESSAY.format(pid=13))
        assert said.wait(20)
        from_ray(ESSAY.format(pid=11))
    first, repeats, again = terminal.getvalue().splitlines()
    assert first.startswith("router-0 died (process 11)")
    assert repeats == f"router-0 died 2 more times in the last 0 s; details: {log}"
    assert again.startswith("router-0 died (process 11)")
    assert len(log.read_text().splitlines()) == 4


def test_what_was_counted_is_said_at_the_end(terminal, log):
    with quiet(terminal, log, NAMES.get):
        from_ray(*[ESSAY.format(pid=11)] * 2)
    assert terminal.getvalue().splitlines()[1:] == [
        f"router-0 died once more in the last 60 s; details: {log}"
    ]


def test_other_words_of_ray_are_cut_and_counted_too(terminal, log):
    full = (
        "/tmp/ray/session_{i} is over 95% full, available space: {i} GB; "
        + "object creation will fail. " * 20
    )
    with quiet(terminal, log, NAMES.get):
        from_ray(*[full.format(i=i) + "\nand a second line" for i in (3, 2, 1)])
    first, repeats = terminal.getvalue().splitlines()
    assert first.startswith("Ray: /tmp/ray/session_3 is over 95% full")
    assert len(first) < 250 + len(str(log))
    assert "2 more times" in repeats
    assert len(log.read_text().splitlines()) == 6


def test_the_file_is_bounded_and_a_new_service_begins_it_anew(terminal, log, monkeypatch):
    monkeypatch.setattr(module, "LOG_BYTES", 2000)
    for _ in range(2):
        with quiet(terminal, log, NAMES.get):
            from_ray(*[ESSAY.format(pid=11)] * 20)
        assert sum(path.stat().st_size for path in log.parent.iterdir()) < 2 * 2000
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in log.parent.iterdir())
    with quiet(terminal, log, NAMES.get):
        pass
    assert log.read_text() == ""


def test_a_failure_is_not_digested(terminal, log):
    with pytest.raises(RuntimeError, match="ours"), quiet(terminal, log, NAMES.get):
        raise RuntimeError("ours")
    assert sys.stdout is not terminal
