"""The one command for a machine with a GPU: which steps it has, and that none keeps another from running."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/on_gpu.sh"
STEPS = [
    "device",
    "tests-triton",
    "tests-comm",
    "tests-gpu",
    "kernels",
    "layers",
    "links",
    "ranks",
    "engine",
    "dense",
]
# In place of the interpreter: keeps what it was asked, and does what a test wants of a step.
STUB = """#!/bin/sh
echo "$@" >> "{calls}"
case "$*" in
  *torch.cuda*) echo "torch 2, no GPU";;
  *"import xdist"*|*"import hypothesis"*) exit 1;;
  {cases}
esac
"""


@pytest.fixture
def run(tmp_path):
    """run(cases, *arguments) → (finished process, rows of the summary, calls), with a stub for Python."""
    out = tmp_path / "out"

    def run(cases="", *arguments, limit="20"):
        stub, calls = tmp_path / "python", tmp_path / "calls"
        stub.write_text(STUB.format(calls=calls, cases=cases))
        stub.chmod(0o755)
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "LIMIT": limit, "OUT": str(out)}
        done = subprocess.run(
            [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        summary = out / "summary.md"
        text = summary.read_text() if summary.exists() else ""
        rows = dict(re.findall(r"^\| ([a-z-]+) \| (\d+) \|", text, re.MULTILINE))
        return done, rows, calls.read_text() if calls.exists() else ""

    run.out = out
    return run


def test_all_steps_run_and_their_results_lie_in_one_folder(run):
    done, rows, calls = run()
    assert done.returncode == 0, done.stderr
    assert sorted(rows) == sorted(STEPS)
    assert set(rows.values()) == {"0"}
    for asked in (
        "tests/triton",
        "tests/gpu",
        "benchmarks.kernels",
        "benchmarks.layers",
        "benchmarks.ranks",
        "benchmarks.engine",
    ):
        assert asked in calls
    assert "no GPU" in (run.out / "summary.md").read_text()
    files = sorted(path.name for path in run.out.iterdir())
    assert len(files) <= 8
    with tarfile.open(run.out / "logs.tar.gz") as logs:
        assert {f"logs/{step}.log" for step in STEPS} <= set(logs.getnames())


def test_a_step_that_fails_keeps_no_other_from_running(run):
    done, rows, _ = run('*tests/comm*) echo "1 failed"; exit 1;; *benchmarks.kernels*) kill -9 $$;;')
    assert done.returncode == 1
    assert sorted(rows) == sorted(STEPS)
    assert {step: code for step, code in rows.items() if code != "0"} == {"tests-comm": "1", "kernels": "137"}
    assert "1 failed" in done.stdout


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_at_its_limit(run):
    done, rows, _ = run("*benchmarks.layers*--profile*) exec sleep 30;;", limit="2")
    assert done.returncode == 1
    assert {step: code for step, code in rows.items() if code != "0"} == {"layers": "124"}


def test_tuned_tables_are_packed(run):
    done, _, _ = run('*--write-tuned*) for last; do :; done; mkdir -p "$last"; touch "$last/a.json";;')
    assert done.returncode == 0
    with tarfile.open(run.out / "tuned.tar.gz") as tables:
        assert "tuned/a.json" in tables.getnames()


def test_the_list_names_every_step_and_runs_none(run):
    done, rows, calls = run("", "--list", limit="")
    assert done.returncode == 0
    listed = re.findall(r"^([a-z-]+) \((\d+) s\): ", done.stdout, re.MULTILINE)
    assert [name for name, _ in listed] == STEPS
    together = [int(limit) for name, limit in listed if name.startswith("tests")]
    assert sum(int(limit) for _, limit in listed) - sum(together) + max(together) < 7 * 60 + 10
    assert rows == {}
    assert calls == ""


@pytest.mark.parametrize("arguments", [["--help"], ["a", "b"]])
def test_wrong_arguments_show_how_it_is_used(run, arguments):
    done, _, calls = run("", *arguments)
    assert done.returncode == 2
    assert "benchmarks/on_gpu.sh [--list] [FOLDER]" in done.stderr
    assert calls == ""


MISSING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "hypothesis", "pytest_timeout", "openai", "httpx", "transformers"):
            raise ModuleNotFoundError(f"{name} is not on that machine", name=name)
sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(["--collect-only", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_its_tests_need_nothing_but_the_package_without_ray(run):
    """They are collected, warnings being errors, with the options that the script gives them."""
    listed, _, _ = run("", "--list", limit="")
    folders = []
    for line in listed.stdout.splitlines():
        name, _, command = line.partition(": ")
        if name.startswith("tests-"):
            asked = shlex.split(command)
            *options, last = asked[asked.index("pytest") + 1 :]
            folders += [part for part in [*options, last] if part.startswith("tests/")]
            options = [part for part in options if not part.startswith("tests/")]
    done = subprocess.run(
        [sys.executable, "-c", MISSING, *options, *folders],
        cwd=SCRIPT.parents[1],
        env=os.environ
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # no pytest-timeout, which the settings configure
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(folders) == 4
