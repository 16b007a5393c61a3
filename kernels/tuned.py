"""Which configuration each kernel runs with: from a table in the package, else by measuring, once on a
machine.

A table holds what was measured on one device with one Triton version, `tuned/DEVICE-triton-VERSION.json`,
written by `python -m benchmarks.kernels --write-tuned`. What it does not list is measured where it is first
met, and kept in Triton's own cache on disk. Configurations of another version are not taken: a compiler's
best tile is not the next one's.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton

FOLDER = Path(__file__).parent / "tuned"
WARM_UP_MS, MEASURE_MS = 2, 8
"""Of each configuration. With Triton's own 25 and 100 a first start takes ten times as long."""

logger = logging.getLogger(__name__)

Key: TypeAlias = tuple[Hashable, ...]

Choices: TypeAlias = dict[tuple[str, Key], dict[str, int]]
"""By kernel and Triton's key (the values that it is tuned by, and the dtypes of its tensors): what is then
passed to the kernel, launch options among it."""


class Chosen(dict[Key, triton.Config]):
    """The configurations of one autotuner by key: asked for one that it has not, it looks into the table."""

    def __init__(self, kernel: str, configs: list[triton.Config]) -> None:
        super().__init__()
        self.kernel = kernel
        self._configs = configs

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        assert isinstance(key, tuple)
        listed = _listed().get((self.kernel, key))
        config = next((config for config in self._configs if config.all_kwargs() == listed), None)
        if config is not None:
            self[key] = config
        return config is not None


_chosen: list[Chosen] = []


def autotune(
    configs: list[triton.Config],
    key: list[str],
    *,
    fitting: Callable[..., list[triton.Config]] | None = None,
    interpreted: int = 0,
) -> Callable[[Any], Any]:
    """Decorates a kernel that runs with the best of `configs` for each value of the arguments in `key`.

    `fitting` leaves those out that cannot serve a call. The interpreter has no clock to choose by: there
    `configs[interpreted]` alone is taken.
    """
    offered = [configs[interpreted]] if triton.knobs.runtime.interpret else configs

    def decorate(kernel: Any) -> Any:
        tuner = triton.autotune(
            configs=offered,
            key=key,
            prune_configs_by=None if fitting is None else {"early_config_prune": fitting},
            do_bench=_measure,
            cache_results=True,
        )(kernel)
        return attach(tuner)

    return decorate


def attach(tuner: Any) -> Any:
    """Makes a Triton autotuner take what the table lists, and its choices part of what `write` writes."""
    tuner.cache = Chosen(tuner.base_fn.__name__, tuner.configs)
    _chosen.append(tuner.cache)
    return tuner


def write(folder: Path) -> Path:
    """Writes what this process has run with, beside what the device's table there lists already."""
    device = _device() or "interpreter"
    path = folder / _file_name(device, triton.__version__)
    choices = read(path) if path.exists() else {}
    for chosen in _chosen:
        for key, config in chosen.items():
            choices[chosen.kernel, key] = config.all_kwargs()
    kernels: dict[str, list[dict[str, object]]] = {}
    for kernel, key in sorted(choices, key=repr):
        kernels.setdefault(kernel, []).append({"key": key, "config": choices[kernel, key]})
    table = {"device": device, "triton": triton.__version__, "kernels": kernels}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def read(path: Path) -> Choices:
    """What a table lists; nothing, and a warning, where it cannot be read."""
    try:
        kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        return {
            (kernel, tuple(entry["key"])): dict(entry["config"])
            for kernel, entries in kernels.items()
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the table of tuned kernels %s is left out, it cannot be read: %s", path.name, error)
        return {}


def _measure(call: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
    measured: list[float] = triton.testing.do_bench(
        call, warmup=WARM_UP_MS, rep=MEASURE_MS, quantiles=list(quantiles)
    )
    return measured


@cache
def _listed() -> Choices:
    """The table of this device and Triton version; where there is none, says so, once."""
    device = _device()
    if device is None:
        return {}
    path = FOLDER / _file_name(device, triton.__version__)
    if path.exists():
        return read(path)
    others = sorted(FOLDER.glob(_file_name(device, "*")))
    known = f"only for {', '.join(other.stem for other in others)}" if others else "for no version"
    logger.warning(
        "%s with Triton %s has no table of tuned kernels (%s): they are measured where first met, "
        "which the first start of a model takes longer for",
        *(device, triton.__version__, known),
    )
    return {}


def _file_name(device: str, version: str) -> str:
    return f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-triton-{version}.json"


def _device() -> str | None:
    """The name of the GPU; None where there is none, as in the interpreter."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
