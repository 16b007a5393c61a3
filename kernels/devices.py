"""The device that a process computes on, by the name that `layout.device` has for it."""

from __future__ import annotations

import importlib

import torch

_MAKERS = {"cuda": "CUDA or ROCm", "npu": "Ascend NPU"}


class NoDevice(RuntimeError):
    """There is no such device here; the text says what is missing."""


def find_device(name: str) -> torch.device:
    """The device called `cpu`, `cuda` (which is AMD's as well) or `npu`. Raises NoDevice.

    Torch knows Ascend's NPUs once torch_npu has been imported, which also makes HCCL, their library for
    collectives, a backend of torch.distributed.
    """
    if name == "npu":
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError) as error:
            raise NoDevice(f"torch_npu cannot be imported here ({str(error).splitlines()[0]})") from None
    device = torch.device(name)
    if name != "cpu" and not torch.get_device_module(device).is_available():
        raise NoDevice(f"torch sees no {_MAKERS[name]} device here")
    return device


def num_devices(device: torch.device) -> int:
    """How many of its kind this machine has. Not for the CPU."""
    return int(torch.get_device_module(device).device_count())


def free_bytes(device: torch.device) -> int | None:
    """What is free of a device's memory; None for the host's, which is nobody's alone."""
    if device.type == "cpu":
        return None
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def settle(device: torch.device) -> None:
    """Waits until the device has done all that it was told on the current stream."""
    if device.type != "cpu":
        torch.get_device_module(device).current_stream(device).synchronize()
