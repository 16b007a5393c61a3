"""A chat request's numbers → what the sampler's float32 and the scheduler's integers can hold."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from r1_cluster.api.errors import invalid_request
from r1_cluster.records import SamplingParams

if TYPE_CHECKING:
    from r1_cluster.api.protocol import ChatCompletionRequest
    from r1_cluster.config import Sampling

MIN_TEMPERATURE = 1e-5
"""Below this an answer is greedy: logits divided by less could leave float32's range."""
MIN_TOP_P = 1e-6
"""The least top_p that is passed on. The most probable of V tokens has at least 1/V of the probability: up to
a million tokens, any smaller value keeps the same, which is that token and those as probable."""


def sampling_of(request: ChatCompletionRequest, defaults: Sampling, *, drawn_seed: int) -> SamplingParams:
    """How the answer's tokens are drawn: the request's values, or the service's where it is silent.

    `temperature` and `top_p` are exact in float32: 0 or MIN_TEMPERATURE to 2, and MIN_TOP_P to 1; `top_k` is
    in int32, the seed in int64. `drawn_seed` is for a request without a seed of its own.
    """
    temperature = defaults.temperature if request.temperature is None else request.temperature
    top_p = defaults.top_p if request.top_p is None else request.top_p
    return SamplingParams(
        temperature=0.0 if temperature < MIN_TEMPERATURE else _float32(temperature),
        top_p=_float32(max(top_p, MIN_TOP_P)),
        top_k=request.top_k or 0,
        seed=drawn_seed if request.seed is None else request.seed,
    )


def check_stop_tokens(request: ChatCompletionRequest, vocab_size: int, *, tags_seen: bool) -> None:
    """Raises ApiError (400) for ids that the model cannot produce, and where stop tokens would have to sleep
    through the thought, but the tokenizer has no tokens for its tags by which the engine could see it
    (`tags_seen`)."""
    for i, token in enumerate(request.stop_token_ids):
        if token >= vocab_size:
            name = f"stop_token_ids[{i}]"
            raise invalid_request(
                name, f"{name}: {token} is beyond the vocabulary, whose last id is {vocab_size - 1}"
            )
    if request.stop_token_ids and request.stops_sleep and not tags_seen:
        message = (
            "stop_token_ids sleep until </think>, but this model has no tokens for the tags of its thought: "
            "give strings in stop, or set stop_in_thought to true"
        )
        raise invalid_request("stop_token_ids", message)


def _float32(value: float) -> float:
    """The nearest float32."""
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    return nearest
