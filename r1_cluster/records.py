"""The records that move through the service, and who fills each field.

`Request` comes from the ingress, `StepPlan` goes from the engine to its workers once per step,
`StepResult` comes back from the last stage, `TokenBatch` goes from the engine to an ingress once per
step. All travel as msgpack arrays (never pickle); arrays of integers travel as little-endian int32
bytes, because a page table of thousands of entries must cost a copy and not a parse.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "error", "abort"]
Int32Array = npt.NDArray[np.int32]


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """Why an engine does not answer a request, or no further. Filled by the engine, read by the ingress.

    engine_lost: the engine, or the link to it, ended; the answer goes on elsewhere. not_in_office: `text` is
    the id of a process that runs no engine; another one must be asked. overloaded: the queue is full.
    convicted: workers die whenever this request runs. failed_row: the logits of its next token are not
    numbers. failed: the engine cannot go on, and `text` says why.
    """

    kind: Literal["engine_lost", "not_in_office", "overloaded", "convicted", "failed_row", "failed"]
    text: str = ""


ENGINE_LOST = Refusal("engine_lost")
"""The refusal of a request whose engine ended: it goes on at another one."""
NOBODY = ""
"""The sink of the engine's own requests, which see whether a token can be computed."""


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How a sequence's next token is chosen. Filled by the ingress from the chat request.

    temperature 0 is greedy. `top_k` 0 keeps all tokens. `seed` is always set (the ingress draws one
    where the request names none): random numbers are a function of (seed, position) alone.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One answer asked for. Filled by the ingress, read by the engine.

    `prompt` and `generated` are token ids; `generated` holds what a former engine had already
    produced, so that a replayed request goes on at the next token. `stop_token_ids` end the answer once
    `sleeping_until` (the id of `</think>`) has been generated; where that is None, from the first token on.
    Where the prompt leaves it to the model whether to think, `sleeping_from` is the id of `<think>`: unless
    that is the first token that is not white space, there is no thought, and nothing sleeps from there on.
    `attempt` counts how often the ingress has asked for this answer: what comes of a former attempt is no
    longer listened to.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: list[int]
    sink: str
    generated: list[int] = []
    ignore_eos: bool = False
    sleeping_until: int | None = None
    attempt: int = 0
    sleeping_from: int | None = None


class SampleSpec(msgspec.Struct, frozen=True, array_like=True):
    """Asks the last stage for one token: which sequence of the plan, and with which parameters.

    `position` is the index, in the whole sequence, of the token that is to be sampled.
    """

    index: int
    position: int
    sampling: SamplingParams


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """What the workers compute in one step. Filled by the scheduler; complete in itself.

    `seq_ids` are request ids. Sequence i has `num_cached[i]` tokens in its pages already and brings
    `num_new[i]` more, whose ids are the next ones in `tokens`. `pages` holds the page tables one behind the
    other, `num_pages[i]` entries each. Whoever holds the KV can run a plan again: it changes nothing that
    was committed before it. `closed` names sequences that ended since the plan before. Each data rank has a
    plan of its own in every step; one without sequences only takes part in what all do together.
    """

    epoch: int
    step: int
    micro_batch: int
    seq_ids: list[str]
    num_cached: list[int]
    num_new: list[int]
    tokens: bytes
    num_pages: list[int]
    pages: bytes
    samples: list[SampleSpec]
    closed: list[str] = []
    data_rank: int = 0


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a step gave. Filled by the last stage, committed by the engine.

    `tokens[j]` answers `plan.samples[j]`; a negative one says that the row's logits are not numbers, which
    fails its request and no other. `lost` names peers that went missing during the step: the
    result is then tainted, and the step must be done again under the next epoch. `compute_s` is the
    time that the model's own operators took, for the overhead figures. `data_rank` is the plan's.
    """

    epoch: int
    step: int
    tokens: list[int]
    lost: list[str] = []
    compute_s: float = 0.0
    data_rank: int = 0


class HeldSequence(msgspec.Struct, array_like=True):
    """What the first stage knows of a sequence, for an engine that takes over to read back.

    `tokens` (int32 bytes) are those that were planned so far; KV of the first `committed` of them is in
    `pages` (int32 bytes) on every stage.
    """

    tokens: bytes
    pages: bytes
    committed: int


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. `position` is the index of the first among the generated tokens; `attempt`
    is the request's."""

    request_id: str
    position: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    error: Refusal | None = None
    num_cached_prompt: int = 0
    attempt: int = 0


class TokenBatch(msgspec.Struct, frozen=True, array_like=True):
    """All that one step gave to one ingress. An ingress drops batches of an epoch older than it has seen."""

    engine: str
    epoch: int
    deltas: list[TokenDelta]


def pack_int32(values: Int32Array) -> bytes:
    """int32 array of any shape → its little-endian bytes, flat."""
    return values.astype("<i4", copy=False).tobytes()


def unpack_int32(data: bytes) -> Int32Array:
    """Bytes of `pack_int32` → read-only int32 array of shape (len(data) / 4,)."""
    return np.frombuffer(data, dtype="<i4")
