"""From logits to tokens, on the last stage; the drawing is the device's (`Ops.sample`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.ops import Draws, Ops
from r1_cluster.records import SampleSpec


def sample(ops: Ops, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """One token per row of float32 logits [S, V], row j by `specs[j].sampling`; FAILED (-1) for a row that
    gives none (`kernels.ops`), which concerns that row's request alone."""
    params = [spec.sampling for spec in specs]
    draws = Draws(
        temperatures=[one.temperature for one in params],
        top_ks=[one.top_k for one in params],
        top_ps=[one.top_p for one in params],
        seeds=[one.seed for one in params],
        positions=[spec.position for spec in specs],
    )
    return ops.sample(logits_SV, draws)
