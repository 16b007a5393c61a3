"""A device played on the CPU: tensors with real values that refuse to meet a tensor of the host.

A GPU's tensors do the same, but not every machine that runs the tests has one. Code that makes a mask, an
index or a result on the host beside a device's tensors raises here as it would there. Tensors of no dimension
may come from the host, as they may on a GPU.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_DEVICE = torch.device("meta")  # what the tensors say of themselves; torch has it in every build


class MixedDevices(RuntimeError):
    """An operation was given tensors of both devices."""


class _There(torch.Tensor):
    """`held` is the same tensor on the host."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_DEVICE,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"there({self.held})"

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """torch.tensor writes its values to where it is told before anybody is asked."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == _DEVICE:
            return _There(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def elsewhere():
    """Within it, tensors made on the device of one that is there are there as well."""
    with torch.no_grad(), _Dispatch(), _Literals():
        yield


def there(tensor):
    """The tensor on the played device; anything else as it is."""
    return _There(tensor.clone()) if isinstance(tensor, torch.Tensor) else tensor


def here(tensor):
    """The tensor back on the host. Raises AssertionError if it never left it."""
    assert isinstance(tensor, _There), "the result is on the host"
    return tensor.held


def _run(func, args, kwargs):
    leaves, layout = tree_flatten((args, kwargs))
    theirs = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, _There)}
    ours = [leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.dim()]
    if theirs and ours and func not in _COPIES:
        raise MixedDevices(
            f"{func} of tensors of both devices: shapes {[tuple(t.shape) for t in ours]} are ours"
        )
    leaves = [leaf.held if isinstance(leaf, _There) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(leaves, layout)
    asked = kwargs.get("device")
    if asked is not None:
        kwargs["device"] = "cpu"
    result = func(*args, **kwargs)
    if func is torch.ops.aten.copy_.default:
        return theirs.get(id(result), result)
    if not theirs and (asked is None or torch.device(asked) != _DEVICE):
        return result
    if asked is not None and torch.device(asked) != _DEVICE:
        return result

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        return theirs[id(value)] if id(value) in theirs else _There(value)  # itself, after work in place

    return tree_map(wrap, result)
