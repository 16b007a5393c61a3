"""Dispatch and combine where all experts are in this process, on a device: no index of it reaches the host.

What `dispatch.LocalDispatcher` is for the host. The rows are sorted, multiplied and summed by the device's
own operations (`kernels.ops.DeviceOps.moe`), so that a step can be captured in a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

from r1_cluster.comm.dispatch import StepTag

if TYPE_CHECKING:
    from r1_cluster.comm.links import Device


class Mixture(Protocol):
    """The whole mixture of a layer; `ExpertModel.mixture` is one."""

    def __call__(
        self,
        layer: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        num_tokens: Tensor | None = None,
    ) -> Tensor: ...


class DeviceDispatcher:
    """A `Dispatcher` that loses nobody: its errors are the caller's.

    While `num_real` is set (one integer on the device), it says how many rows are real in place of the number
    that `dispatch` is told: a captured graph keeps that number for ever, but reads the tensor at each replay.
    """

    def __init__(self, mixture: Mixture, device: Device) -> None:
        self.device = device
        self.lost: list[str] = []
        self.idle_s = self.waited_s = 0.0
        self.num_real: Tensor | None = None
        self._mixture = mixture
        self._waiting: tuple[int, Tensor, Tensor, Tensor, int] | None = None

    def dispatch(
        self, tag: StepTag, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, num_tokens: int
    ) -> None:
        self._waiting = (tag.layer, x_TD, weights_TK, expert_ids_TK, num_tokens)

    def combine(self) -> Tensor:
        if self._waiting is None:
            raise RuntimeError("combine without a dispatch")
        layer, x_TD, weights_TK, ids_TK, num_tokens = self._waiting
        self._waiting = None
        if self.num_real is not None or num_tokens == len(x_TD):
            return self._mixture(layer, x_TD, weights_TK, ids_TK, self.num_real)
        y_TD = self._mixture(layer, x_TD[:num_tokens], weights_TK[:num_tokens], ids_TK[:num_tokens])
        return F.pad(y_TD, (0, 0, 0, len(x_TD) - num_tokens))
