"""FP8 is refused, with a sentence, where a device's kernels have none."""

from types import SimpleNamespace

import pytest
import torch
from small_model import FP8_SHAPE, config_values, dense_values

from r1_cluster.models.config import UnsupportedModel
from r1_cluster.models.family import parse_config
from r1_cluster.models.fitting import check_fp8

CUDA = torch.device("cuda")
PLAIN, IN_FP8 = parse_config(dense_values()), parse_config(config_values(**FP8_SHAPE))


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability) plays a GPU of NVIDIA, gpu(arch) one of AMD."""

    def play(what):
        of_amd = isinstance(what, str)
        monkeypatch.setattr(torch.version, "hip", "6" if of_amd else None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"A GPU {what}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: what)
        properties = SimpleNamespace(gcnArchName=what)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return play


@pytest.mark.parametrize("what", [(8, 0), (8, 6), (7, 5), "gfx90a:sramecc+"])
def test_a_device_without_fp8_is_told_who_asks_for_it(gpu, what):
    gpu(what)
    check_fp8(PLAIN, CUDA, fp8_cache=False)
    with pytest.raises(UnsupportedModel, match=r"^A GPU .* has no FP8, .* by engine.kv_cache_dtype fp8$"):
        check_fp8(PLAIN, CUDA, fp8_cache=True)
    with pytest.raises(UnsupportedModel, match=r"by a checkpoint in FP8$"):
        check_fp8(IN_FP8, CUDA, fp8_cache=False)
    with pytest.raises(UnsupportedModel, match=r"by engine.kv_cache_dtype fp8 and by a checkpoint in FP8$"):
        check_fp8(IN_FP8, CUDA, fp8_cache=True)


@pytest.mark.parametrize("what", [(8, 9), (9, 0), (10, 0), "gfx942:sramecc+:xnack-", "gfx950"])
def test_a_device_with_fp8_is_not_refused(gpu, what):
    gpu(what)
    check_fp8(IN_FP8, CUDA, fp8_cache=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_plain_torch_has_fp8_everywhere(device):
    check_fp8(IN_FP8, torch.device(device), fp8_cache=True)
