"""In place of torch_npu, where tests put this folder on the path: a device "npu" whose memory is the host's.

As on a real one, tensors of the host and of the device do not meet in one operation, and there is no arithmetic
in FP8. Its backend "hccl" is gloo.
"""

import collections

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

BYTES = 1 << 34
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
FP8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz}
# What may be done with numbers of a format that the device cannot compute in, beside views of them.
BYTEWISE = MOVES | {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.clone.default,
    aten.detach.default,
    aten.view.dtype,
}


class NpuTensor(torch.Tensor):
    """Its elements are those of `host`."""

    @staticmethod
    def __new__(cls, host):
        with torch.inference_mode(False):  # within it, views of tensors from outside could not be made
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                host.shape,
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device="npu:0",
            )
        made.host = host
        return made

    def __repr__(self):
        return f"NpuTensor({self.host})"

    def tolist(self):
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, *args, **kwargs or {})


def run(func, *args, **kwargs):
    """An operation, done by the host on the tensors' elements."""
    given = [found for found in tree_leaves((args, kwargs)) if isinstance(found, torch.Tensor)]
    if func not in MOVES and any(not isinstance(t, NpuTensor) and t.dim() for t in given):
        raise RuntimeError(f"{func}: not all tensors are on npu:0")
    device = kwargs.get("device")
    asked = None if device is None else torch.device(device).type
    if asked == "npu":
        kwargs["device"] = torch.device("cpu")
    hosts = {id(t.host): t for t in given if isinstance(t, NpuTensor)}
    args, kwargs = tree_map_only(NpuTensor, lambda tensor: tensor.host, (args, kwargs))
    out = func(*args, **kwargs)
    dtypes = {found.dtype for found in tree_leaves((given, out)) if isinstance(found, torch.Tensor)}
    bytewise = func.is_view or (func in BYTEWISE and not (func in MOVES and len(dtypes) > 1))
    if dtypes & FP8 and not bytewise:
        raise RuntimeError(f"{func}: npu:0 has no arithmetic in FP8")
    if asked == "cpu" or (func in MOVES and not isinstance(given[0], NpuTensor) and asked is None):
        return out
    # What was worked on in place is the same tensor as before.
    return tree_map_only(torch.Tensor, lambda t: hosts[id(t)] if id(t) in hosts else NpuTensor(t), out)


def copy_from(source, target, non_blocking=False):
    """What `torch.tensor` does past everything above."""
    target.host.copy_(source)
    return target


class Stream:
    def synchronize(self):
        pass


class Npu(_DummyBackendModule):
    """`torch.npu`."""

    def mem_get_info(self, device=None):
        return BYTES, BYTES

    def current_stream(self, device=None):
        return Stream()


class Group:
    """A group of HCCL, which takes tensors of the device alone."""

    def __init__(self, options):
        made = dist.ProcessGroupGloo._Options()
        made._timeout = options.timeout
        made._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, made)
        self._sent = collections.deque(
            maxlen=64
        )  # nobody waits for them: as a device's stream, it keeps them

    def send(self, tensors, to, tag):
        hosts = [tensor.host for tensor in tensors]
        self._sent.append((self._gloo.send(hosts, to, tag), hosts))
        return self._sent[-1][0]

    def recv(self, tensors, source, tag):
        return self._gloo.recv([tensor.host for tensor in tensors], source, tag)

    def abort_hccl_comm(self, reason):
        self._gloo = None


_setup_privateuseone_for_python_backend("npu", Npu())
_every = torch.library.Library("_", "IMPL")
_every.fallback(run, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("_copy_from", copy_from, "PrivateUse1")
dist.Backend.register_backend("hccl", lambda options, _: Group(options), extended_api=True, devices=["npu"])
