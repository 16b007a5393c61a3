"""What every wrapper needs to launch: the device's size, and its FP8 format."""

import torch


def num_processors(device: torch.device) -> int:
    """Multiprocessors (NVIDIA) or compute units (AMD); the interpreter plays a device of four."""
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def native_fp8(device: torch.device) -> torch.dtype:
    """The E4M3 format of the device's matrix units: gfx942 has its own, without infinities or minus zero."""
    if device.type == "cuda" and torch.version.hip:
        arch: str = torch.cuda.get_device_properties(device).gcnArchName
        if arch.startswith("gfx942"):
            return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn


def has_fp8(device: torch.device) -> bool:
    """Whether kernels on the device read and write E4M3: NVIDIA's from compute capability 8.9 on, AMD's gfx94
    and gfx95; plain torch does everywhere."""
    if device.type != "cuda":
        return True
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx94", "gfx95"))
    return torch.cuda.get_device_capability(device) >= (8, 9)


def rows_dense(x: torch.Tensor) -> bool:
    """Whether the last dimension is contiguous, which every vector load relies on."""
    return x.shape[-1] == 1 or x.stride(-1) == 1
