"""Tables of tuned configurations: what is listed is taken, what is not is measured, and what is odd is said."""

import logging
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl

from kernels import tuned

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="plays a device; the interpreter runs its kernels"
)
CONFIGS = [triton.Config({"BLOCK": 16 << i}, num_warps=4, num_stages=2 + i) for i in range(3)]


@pytest.fixture(autouse=True)
def _device(monkeypatch, tmp_path):
    """A device of a name, whose tables are in a folder of their own; nothing has been read or chosen yet."""
    monkeypatch.setattr(tuned, "_device", lambda: "ACME G1 (80 GB)")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "_chosen", [])
    tuned._listed.cache_clear()
    yield
    tuned._listed.cache_clear()


class Tuner:
    """A kernel of Triton's own autotuner, here in the interpreter; `measured` are the keys it had to measure.
    Its second configuration is always the fastest."""

    def __init__(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        self.measured = []

        def measure(call, quantiles):
            call()
            self.measured.append(None)
            return [1.0 if len(self.measured) % len(CONFIGS) == 2 else 2.0] * len(quantiles)

        def copy_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, size: int, BLOCK: tl.constexpr):
            at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < size), mask=at < size)

        jitted = triton.jit(copy_kernel)
        self.kernel = tuned.attach(triton.autotune(CONFIGS, ["size"], do_bench=measure)(jitted))

    def run(self, size):
        """Runs over so many elements → the configuration it ran with."""
        x = torch.arange(size)
        out = torch.full_like(x, -1)
        self.kernel[lambda meta: (triton.cdiv(size, meta["BLOCK"]),)](x, out, size)
        assert torch.equal(out, x)
        return self.kernel.best_config


@pytest.fixture
def tuner(monkeypatch):
    return lambda: Tuner(monkeypatch)


def path(version=triton.__version__):
    return tuned.FOLDER / f"acme-g1-80-gb-triton-{version}.json"


def start_again():
    tuned._listed.cache_clear()
    tuned._chosen.clear()


def test_what_was_written_is_taken_by_the_next_start_which_measures_nothing(tuner, caplog):
    first = tuner()
    assert first.run(40) is CONFIGS[1]
    assert len(first.measured) == len(CONFIGS)
    assert tuned.write(tuned.FOLDER) == path()
    start_again()
    caplog.clear()
    second = tuner()
    assert second.run(40) is CONFIGS[1]
    assert second.measured == []
    assert caplog.messages == []
    assert second.run(50) is CONFIGS[1]  # not listed
    assert len(second.measured) == len(CONFIGS)


def test_another_table_is_added_to(tuner):
    tuner().run(40)
    tuned.write(tuned.FOLDER)
    start_again()
    tuner().run(50)
    tuned.write(tuned.FOLDER)
    start_again()
    third = tuner()
    third.run(40), third.run(50)
    assert third.measured == []


def test_a_table_of_another_version_is_not_taken_and_that_is_said_once(tuner, caplog):
    tuner().run(40)
    tuned.write(tuned.FOLDER).rename(path("1.0.0"))
    start_again()
    caplog.clear()
    again = tuner()
    again.run(40), again.run(50)
    assert len(again.measured) == 2 * len(CONFIGS)
    (said,) = caplog.messages
    assert said.startswith(
        f"ACME G1 (80 GB) with Triton {triton.__version__} has no table of tuned kernels (only for "
    )
    assert "triton-1.0.0" in said


def test_an_unknown_device_is_said_once(tuner, caplog):
    again = tuner()
    again.run(40), again.run(50)
    (said,) = caplog.messages
    assert "no table of tuned kernels (for no version)" in said


def test_without_a_device_nothing_is_said(tuner, caplog, monkeypatch):
    monkeypatch.setattr(tuned, "_device", lambda: None)
    assert tuner().run(40) is CONFIGS[1]
    assert caplog.messages == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"kernels": [1]}',
        b'{"kernels": {"a": [{}]}}',
        b'{"kernels": {"a": 5}}',
        b"\xff\x00",
        None,
    ],
)
def test_a_broken_table_is_said_and_left_out(tuner, caplog, content):
    if content is None:  # cut off in the middle
        tuner().run(40)
        content = tuned.write(tuned.FOLDER).read_bytes()[:-20]
        start_again()
    path().write_bytes(content)
    caplog.clear()
    again = tuner()
    assert again.run(40) is CONFIGS[1]
    assert len(again.measured) == len(CONFIGS)
    (said,) = caplog.messages
    assert f"{path().name} is left out, it cannot be read" in said
    assert caplog.records[0].levelno == logging.WARNING


def test_a_listed_configuration_that_is_no_longer_offered_is_measured_anew(tuner):
    tuner().run(40)
    table = tuned.write(tuned.FOLDER)
    table.write_text(table.read_text().replace('"BLOCK": 32', '"BLOCK": 48'))
    start_again()
    again = tuner()
    assert again.run(40) is CONFIGS[1]
    assert len(again.measured) == len(CONFIGS)


def test_tables_are_written_in_a_fixed_order(tuner):
    one = tuner()
    one.run(50), one.run(40)
    keys = [repr(key) for key in tuned.read(tuned.write(tuned.FOLDER))]
    assert len(keys) == 2
    assert all(a < b for a, b in pairwise(keys))


EVERY_TUNER = """
import importlib, pkgutil, kernels
from triton.runtime.autotuner import Autotuner
modules = [importlib.import_module(f"kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
tuners = {value for module in modules for value in vars(module).values() if isinstance(value, Autotuner)}
for tuner in tuners:
    print(tuner.base_fn.__name__, len(tuner.configs), type(tuner.cache).__name__, tuner.cache_results,
          any(config.pre_hook for config in tuner.configs))
"""


@pytest.mark.slow
def test_triton_keeps_the_results_of_every_kernel_that_is_tuned(monkeypatch):
    """Outside of the interpreter. Triton keeps none of configurations that have a hook."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", EVERY_TUNER], capture_output=True, text=True, timeout=120, check=True
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {"plain_gemm_kernel", "persistent_gemm_kernel", "gate_up_kernel"} <= {row[0] for row in rows}
    for _, count, cache, kept, hooked in rows:
        assert int(count) > 1
        assert (cache, kept, hooked) == ("Chosen", "True", "False")
