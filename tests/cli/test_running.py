"""The files that say which services run: whose they are, and whom a command may signal."""

import os
import signal
import stat
import subprocess
import sys

import msgspec
import pytest

from r1_cluster.cli import running
from r1_cluster.cli.main import main
from r1_cluster.cli.running import Running
from r1_cluster.config import ConfigError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "r1-cluster"


@pytest.fixture
def process():
    """Somebody who could be signalled; where the tests run in the background, SIGINT is ignored unless one asks."""
    script = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); print(flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    child.stdout.readline()
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def record(pid, name="tiny", started=None, **fields):
    started = running.start_time(pid) if started is None else started
    values = {"address": "127.0.0.1:1", "url": "http://127.0.0.1:1", "model": "tiny", "local": True}
    return Running(name, pid, started, **values | fields)


def test_the_folder_and_its_files_are_the_users_alone(folder):
    running.remember(record(os.getpid()))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (file,) = folder.iterdir()
    assert file.name == "tiny.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert running.find("tiny") == running.find(None) == record(os.getpid())
    running.forget("tiny")
    assert running.services() == []


def test_without_a_runtime_folder_it_lies_beside_temporary_files(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(running.tempfile, "gettempdir", lambda: str(tmp_path))
    assert running.private_folder() == tmp_path / f"r1-cluster-{os.getuid()}"


def test_a_folder_that_others_made_is_refused(folder, monkeypatch, capsys):
    def refused(words):
        assert main(["stop"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder) in line
        assert words in line

    folder.mkdir(mode=0o700)
    folder.chmod(0o750)
    refused("is open to others (mode 750)")
    folder.chmod(0o700)
    monkeypatch.setattr(running.os, "getuid", lambda: folder.stat().st_uid + 1)
    refused("belongs to user")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder.parent))
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")
    refused("is not a folder")
    folder.unlink()
    folder.write_text("")
    refused("cannot be made (file exists)")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    assert main(["stop"]) == 2
    assert (
        "/nowhere/r1-cluster, where services are kept, cannot be made (no such file"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\xff\xfe garbage",
        lambda data: data.replace(b'"pid":', b'"pid":-'),  # a whole group of processes
        lambda data: msgspec.json.encode({"name": "tiny", "pid": 2}),
        lambda data: data.replace(b"tiny", b"huge", 1),
    ],
)
@pytest.mark.parametrize("command", ["stop", "drain", "status"])
def test_a_file_that_is_cut_or_garbage_is_one_sentence(folder, capsys, command, spoil):
    running.remember(record(os.getpid()))
    file = folder / "tiny.json"
    file.write_bytes(spoil(file.read_bytes()))
    assert main([command, "--service", "tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert line.endswith("remove it")
    # Another service's commands do not read it.
    running.remember(record(os.getpid(), "other"))
    assert running.find("other").name == "other"


def test_a_number_that_was_given_out_again_is_not_signalled(folder, process):
    """The service died without a word, and its number is another process's now."""
    stale = record(process.pid, started=running.start_time(process.pid) - 1)
    running.remember(stale)
    running.ask(stale, signal.SIGINT)
    with pytest.raises(ConfigError, match="no service 'tiny' is running here"):
        running.find("tiny")
    assert not (folder / "tiny.json").exists()
    assert process.poll() is None
    running.ask(record(process.pid), signal.SIGINT)
    process.wait(10)


def test_who_has_ended_is_not_running(folder, process):
    ours = record(process.pid)
    running.remember(ours)
    assert running.services() == [ours]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but its number is still its own
    assert running.start_time(process.pid) is None
    assert running.services() == []
    running.ask(ours, signal.SIGINT)
    process.wait(10)
    running.ask(ours, signal.SIGINT)


def test_a_service_on_a_shared_cluster_outlives_its_command(folder, process):
    process.kill()
    process.wait(10)
    running.remember(record(process.pid, started=1, local=False))
    assert running.find("tiny").pid == process.pid
