"""The references on another device than the host, played where there is none: they make nothing elsewhere."""

import inspect

import pytest
import torch
from elsewhere import MixedDevices, elsewhere, here, there
from torch.utils._pytree import tree_leaves, tree_map

from kernels import reference as ref

GATE = {"num_groups": 4, "top_groups": 2, "top_k": 3, "normalize": True, "scaling": 2.5}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def scaled(draw, rows, columns):
    return draw.fp8(rows, columns), draw.scales(rows, columns // 128)


def experts(draw):
    return draw.fp8(3, 128, 256), draw.scales(3, 1, 2)


def latents(draw, dtype=torch.float32):
    """Latent queries, rotated queries, paged latents, page table, contexts, first rows."""
    queries = draw.normal(5, 2, 32), draw.normal(5, 2, 16)
    cache = draw.normal(6, 4, 48).to(dtype)
    return *queries, cache, ints(4, 1, 0, 2, 3, 5).view(2, 3), ints(9, 7), ints(0, 2, 5)


def sampled(draw, rows=4):
    """Temperatures, top-k, top-p, min-p, seeds, positions."""
    seeds = torch.arange(rows)
    share = torch.linspace(0.1, 1.0, rows)
    return torch.linspace(0.0, 1.2, rows), ints(0, 3, 7, 1)[:rows], share, 0.1 * share, seeds, seeds + 5


# Every public function, with arguments of all that it takes.
CASES = {
    "groups_of": lambda d: (d.normal(3, 256), 128),
    "rms_norm": lambda d: (d.normal(3, 64), d.normal(64), 1e-6),
    "add_rms_norm": lambda d: (d.normal(3, 64), d.normal(3, 64), d.normal(64), 1e-6),
    "rope": lambda d: (d.normal(3, 2, 16), d.normal(3, 8), d.normal(3, 8), True),
    "group_scale": lambda d: (d.normal(3, 256), torch.float8_e4m3fn),
    "quantize": lambda d: (d.normal(3, 256),),
    "dequantize": lambda d: scaled(d, 3, 256),
    "dequantize_weight": lambda d: (d.fp8(200, 256), d.scales(2, 2)),
    "silu_mul": lambda d: (d.normal(3, 64),),
    "gemm_fp8": lambda d: (*scaled(d, 3, 256), d.fp8(200, 256), d.scales(2, 2)),
    "gate": lambda d: (d.normal(5, 16), d.normal(16)),
    "sort_rows": lambda d: (d.integers(-1, 7, 9, 3), 5, 4),
    "grouped_gemm": lambda d: (*scaled(d, 8, 256), *experts(d), ints(2, -1)),
    "grouped_plain": lambda d: (d.normal(8, 32), d.normal(3, 24, 32), ints(2, -1)),
    "combine": lambda d: (d.normal(9, 16), ints(3, -1, 0, 8), d.scales(2, 2), d.normal(2, 16)),
    "gather_latent": lambda d: (d.normal(6, 4, 48), ints(4, 1, 0), 9, d.scales(6, 4, 2), 32),
    "causal_attention": lambda d: (d.normal(3, 2, 16), d.normal(7, 2, 16), d.normal(7, 2, 8), 0.3),
    "mla_decode": lambda d: (*latents(d), 0.2, d.scales(6, 4, 2)),
    "mla_prefill": lambda d: (
        *(d.normal(5, 2, 32), d.normal(5, 2, 16), d.normal(9, 2, 32), d.normal(9, 16), d.normal(9, 2, 32)),
        *(ints(0, 2, 5), ints(0, 4, 9), 0.2),
    ),
    "paged_attention": lambda d: (
        *(d.normal(5, 4, 16), d.normal(6, 4, 2, 16), d.normal(6, 4, 2, 16)),
        *(latents(d)[3:], 0.2),
    ),
    "latent_entry": lambda d: (d.normal(3, 48), d.normal(32), 1e-6, d.normal(3, 8), d.normal(3, 8), 32),
    "gemm_int": lambda d: (d.normal(3, 200), d.integers(0, 256, 5, 128, dtype=torch.uint8), d.scales(5, 2)),
    "grouped_int": lambda d: (
        *(d.normal(8, 200), d.integers(-128, 128, 3, 5, 256, dtype=torch.int8), d.scales(3, 5, 1)),
        ints(2, -1),
    ),
    "apply_penalties": lambda d: (
        *(d.normal(2, 20), ints(3, 7, -1, 0, 19, 4).view(2, 3), ints(0, 2, 0, 1, 0, 5).view(2, 3)),
        *(d.scales(2) + 1, d.scales(2), d.scales(2)),
    ),
    "kept_tokens": lambda d: (d.normal(4, 50), *sampled(d)[1:4]),
    "sample": lambda d: (d.normal(4, 50), *sampled(d)),
    "kept_masses": lambda d: (d.normal(50), 0.6, 9, 0.9, 0.01),
}
_ON_NO_TENSOR = {"max_slots"}


def test_every_reference_is_here():
    functions = {name for name, value in vars(ref).items() if inspect.isfunction(value)}
    own = {name for name in functions if getattr(ref, name).__module__ == ref.__name__}
    assert {name for name in own if not name.startswith("_")} == set(CASES) | _ON_NO_TENSOR


@pytest.mark.parametrize("name", CASES)
def test_a_reference_follows_its_inputs_device(draw, name):
    """The same values as on the host, on the device of the inputs, from nothing that was made beside them."""
    args = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, _flat(CASES[name](draw)))
    kind = GATE if name == "gate" else {}
    function = getattr(ref, name)
    expected = function(*args, **kind)
    with elsewhere():
        got = function(*tree_map(there, args), **kind)
    for mine, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(here(mine).double(), theirs.double(), rtol=1e-6, atol=1e-6, equal_nan=True)


def _flat(args):
    """Arguments of which some were given as tuples, to be read more easily."""
    return [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + torch.ones(3),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.masked_fill(torch.arange(3) < 2, 0.0),
        lambda x: torch.zeros(3).copy_(x) + x,
        lambda x: torch.cat([x, torch.zeros(2, device="cpu")]),
    ],
)
def test_the_played_device_refuses_what_a_real_one_would(fault):
    with elsewhere(), pytest.raises(MixedDevices):
        fault(there(torch.rand(3)))


def test_the_played_device_takes_what_a_real_one_would():
    with elsewhere():
        x = there(torch.rand(3))
        y = torch.ones(3, device=x.device) + x * torch.tensor(2.0)
        y[torch.arange(3, device=x.device) > 1] = 0
        assert y.tolist() == here(y).tolist()
        assert y.cpu().tolist()[2] == 0
