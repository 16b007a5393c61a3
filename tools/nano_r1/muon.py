"""Muon: momentum whose matrix steps are orthogonalized (Keller Jordan's method), for small matrices."""

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Push the singular values of each matrix in [..., rows, columns] towards 1 by a quintic iteration."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.transpose(-1, -2) if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(num_iterations):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled decay.

    A step is scaled by 0.2 x sqrt(longer side), which gives its elements the size of Adam's.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters; those of one shape are orthogonalized as one batch."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for param in group["params"]:
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(state["momentum"], group["momentum"])
                shape = (param.shape[-2], param.shape[-1])
                by_shape.setdefault(shape, []).append((param, update.view(-1, *shape)))
            for (rows, columns), pairs in by_shape.items():
                scale = 0.2 * max(rows, columns) ** 0.5
                steps = orthogonalize(torch.cat([update for _, update in pairs]))
                for (param, _), step in zip(
                    pairs, torch.split(steps, [u.shape[0] for _, u in pairs]), strict=True
                ):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(step.view_as(param), alpha=-group["lr"] * scale)
