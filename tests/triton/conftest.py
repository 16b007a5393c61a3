"""Runs the kernels on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen when triton and the kernels are imported, so both are imported here, under the
variable, which these tests alone see set.
"""

import importlib
import inspect
import os
import pkgutil
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _interpreted_kernels() -> None:
    for name, module in list(sys.modules.items()):
        compiled = name.startswith("kernels.") and hasattr(module, "triton")
        if compiled or (name.split(".")[0] == "triton" and not name.startswith("triton._C")):
            del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        package = importlib.import_module("kernels")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"kernels.{module.name}")
    finally:
        del os.environ["TRITON_INTERPRET"]
    _mend_interpreter()


def _mend_interpreter() -> None:
    """Triton 3.9's interpreter truncates when it narrows floats and multiplies BF16 by bit pattern.

    Hardware rounds to nearest even (PTX `cvt.rn`), as torch does.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    torch_dtypes = {
        tl.float64: torch.float64,
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e4b8: torch.float8_e4m3fnuz,
        tl.float8e5: torch.float8_e5m2,
    }
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def convert(data, source, target, _rounding):
        bits = np.ascontiguousarray(data)
        bits = torch.from_numpy(bits.view(f"i{bits.itemsize}" if bits.itemsize > 1 else "u1"))
        values = bits.view(torch_dtypes[source.scalar]).to(torch_dtypes[target.scalar])
        raw = values.view(integers[values.element_size()]).numpy()
        return raw.view(f"u{raw.itemsize}").reshape(data.shape)

    def create_dot(self, a, b, d, _precision, _imprecise):
        a32, b32 = (convert(x.data, x.dtype, tl.float32, None).view(np.float32) for x in (a, b))
        return interpreter.TensorHandle(np.matmul(a32, b32, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.ScanOps.generic_scan = _scan
    # For every launch and every call of a function in it, the interpreter looks all of Triton through for what
    # it has to replace; that takes a third of the time, and is the same every time.
    builtins = {}

    def patch_builtin(package, builder, scope):
        if package not in builtins:
            members = inspect.getmembers(package, tl.core.is_builtin)
            builtins[package] = [name for name, _ in members]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # else a caller's scope has replaced it
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def _folds(op, input, axis):
    """The results of folding `input` along an axis, after each element: in the interpreter's own order, but of
    all rows at once, where it calls the combining function for every single element."""

    def at(i):
        return tuple(op.to_tensor(np.take(x.handle.data, i, axis), x.dtype) for x in input)

    folded = at(0)
    yield folded
    for i in range(1, input[0].handle.data.shape[axis]):
        folded = op.combine_fn.fn(*folded, *at(i))
        folded = folded if isinstance(folded, tuple) else (folded,)
        yield folded


def _reduce(self, input):
    shape = input[0].handle.data.shape
    input, axis = self.unravel(input, self.axis)
    *_, totals = _folds(self, input, axis)
    kept = [1 if self.axis in (None, i) else n for i, n in enumerate(shape)]
    left = () if self.axis is None else shape[:axis] + shape[axis + 1 :]
    shape = kept if self.keep_dims else left
    return [self.to_tensor(total.handle.data.reshape(shape), x.dtype) for total, x in zip(totals, input)]


def _scan(self, input):
    out = [np.zeros_like(x.handle.data) for x in input]
    for i, folded in enumerate(_folds(self, input, self.axis)):
        for data, value in zip(out, folded):
            row = np.moveaxis(data, self.axis, 0)
            row[i] = value.handle.data.reshape(row.shape[1:])
    return [self.to_tensor(data, x.dtype) for data, x in zip(out, input)]


if DEVICE == "cpu":
    _interpreted_kernels()


class Draw:
    """Fresh random inputs from one reported seed."""

    def __init__(self, seed: int) -> None:
        self.device = DEVICE
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(DEVICE, dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype)

    def mixed(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values whose groups of 32 differ in magnitude by up to 2^10, with rare outliers and exact zeros."""
        x = torch.randn(shape, generator=self.generator)
        width = min(32, shape[-1])
        blocks = (*shape[:-1], -(-shape[-1] // width), 1)
        scale = torch.exp2(torch.randint(-5, 6, blocks, generator=self.generator).float())
        x = x * scale.expand(*blocks[:-1], width).flatten(-2)[..., : shape[-1]]
        kind = torch.rand(shape, generator=self.generator)
        x = torch.where(kind < 0.01, x * 16, x)
        return torch.where(kind > 0.99, 0.0, x).to(DEVICE, dtype)

    def fp8(self, *shape: int) -> torch.Tensor:
        return self.mixed(*shape).clamp(-448, 448).to(torch.float8_e4m3fn)

    def scales(self, *shape: int) -> torch.Tensor:
        """Positive scales over six powers of two."""
        return torch.exp2(torch.rand(shape, generator=self.generator) * 6 - 6).to(DEVICE)


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> Draw:
    """Random inputs; the seed shows in a failure's captured output, and R1_TEST_SEED repeats it."""
    seed = int(os.environ.get("R1_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"R1_TEST_SEED={seed}")
    return Draw(seed)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (floats) or -77 (integers), so that an element nobody wrote shows."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain_empty, plain_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        if x.dtype.is_floating_point:
            bits = x.view(torch.uint8) if x.element_size() == 1 else x
            return bits.fill_(0xFF if bits.dtype == torch.uint8 else float("nan")).view(x.dtype)
        return x.fill_(-77 if x.dtype.is_signed else 179)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))
    with np.errstate(all="ignore"):  # the interpreter computes masked-out lanes too, and infinities are meant
        yield


def _error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """‖out - expected‖ / ‖expected‖ in float64; NaN anywhere makes it NaN, which passes no bound."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return float((out - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.fixture
def relative_error():
    return _error


HOPPER_FP8 = 2**-11
"""Ada's and Hopper's matrix units add FP8 products in accumulators of about 14 bits (DeepSeek-V3 report, section
3.3.2), 128 products at a time here: each cut costs up to 2^-13 of the largest term. The most that was seen of these
tests' numbers on an H200 is 2^-13.2 of the sum of the terms' magnitudes; inputs are new each time, hence two bits
more. One product of 128 that were lost would be 2^-7."""
FLOAT32_UNITS = 2**-17
"""Units with float32 accumulators cut once an instruction: K / 32 times 2^-23, K up to 1,152 here."""
FLOAT32_HOST = 2**-20
"""The interpreter rounds to nearest; K roundings of 2^-24, of which most cancel."""


@pytest.fixture(scope="session")
def fp8_sums() -> float:
    """What a sum of FP8 products may be off by on this device, as a share of Σ |a| |b|."""
    if DEVICE == "cpu":
        return FLOAT32_HOST
    narrow = not torch.version.hip and torch.cuda.get_device_capability()[0] < 10
    return HOPPER_FP8 if narrow else FLOAT32_UNITS
