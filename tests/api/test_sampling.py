"""Numbers at the edge: whatever JSON allows is refused by name, or becomes what the arithmetic behind can hold."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from r1_cluster.api.errors import ApiError
from r1_cluster.api.fields import NEUTRAL_VALUES
from r1_cluster.api.protocol import MAX_NUMBER_LENGTH, parse_chat_request
from r1_cluster.api.sampling import MIN_TEMPERATURE, MIN_TOP_P, check_stop_tokens, sampling_of
from r1_cluster.config import Sampling

DEFAULTS = Sampling()
VOCABULARY = 129_280
INT32, INT64 = 2**31 - 1, 2**63 - 1

INTEGERS = {"top_k": (-1, INT32), "seed": (-INT64 - 1, INT64)}
INTEGERS |= dict.fromkeys(("max_tokens", "max_completion_tokens"), (1, INT32))
INTEGERS["stop_token_ids"] = (0, VOCABULARY - 1)
FLOATS = {"temperature": (0, 2), "top_p": (0, 1)}
NOT_BUILT = sorted(
    name for name, values in NEUTRAL_VALUES.items() if values and all(type(value) is int for value in values)
)
NOT_BUILT.append("thinking_budget")

literals = (
    st.integers().map(str)
    | st.integers(-(10**120), 10**120).map(str)
    | st.sampled_from([2**31, 2**53, 2**63, 2**64]).flatmap(lambda n: st.integers(-n - 2, n + 2)).map(str)
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.floats(0, 2).map(repr)
    | st.floats(0, 1e-37, allow_subnormal=True).map(repr)
    | st.integers(-10, 40).map(lambda n: f"{n}.0")
    | st.from_regex(r"-?(0|[1-9][0-9]{0,5})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
    | st.sampled_from(["-0.0", "-0", "1e-40", "5e-324", "1e-999", "1e400", "-1e400", "true", "false", "null"])
    | st.sampled_from(['"1"', '""', '"NaN"', "[]", "[1]", "{}", "1e0", "1E2", "9" * 5000, "NaN", "Infinity"])
)


def numbers(literal):
    """What a field's literal came to: max_output_tokens, the stop tokens and the sampling parameters."""
    name, text = literal
    value = f"[{text}]" if name == "stop_token_ids" else text
    body = f'{{"model": "m", "messages": [{{"role": "user", "content": "x"}}], "{name}": {value}}}'
    request = parse_chat_request(body.encode())
    check_stop_tokens(request, VOCABULARY, tags_seen=True)
    return request, sampling_of(request, DEFAULTS, drawn_seed=5)


def outcome(literal):
    try:
        return *numbers(literal), None
    except ApiError as error:
        return None, None, error


def readable(text):
    """Whether it is a JSON number, or another value, that a body may hold at all."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if isinstance(value, int) and not isinstance(value, bool):
        return len(text) <= MAX_NUMBER_LENGTH
    return not isinstance(value, float) or math.isfinite(value)


def is_float32(value):
    return struct.unpack("f", struct.pack("f", value))[0] == value


def check_held(request, sampling):
    """What the sampler and the scheduler rely on, whatever was sent."""
    temperature, top_p = np.float32(sampling.temperature), np.float32(sampling.top_p)
    assert type(sampling.temperature) is type(sampling.top_p) is float
    assert is_float32(sampling.temperature)
    assert is_float32(sampling.top_p)
    assert temperature == 0 or np.float32(MIN_TEMPERATURE) <= temperature <= 2
    assert not np.signbit(temperature)
    assert np.float32(MIN_TOP_P) <= top_p <= 1
    assert np.isfinite(np.float32(1e30) / (temperature or np.float32(1)))
    assert type(sampling.top_k) is int
    assert 0 <= sampling.top_k <= INT32
    assert -INT64 - 1 <= sampling.seed <= INT64
    assert all(type(token) is int and 0 <= token < VOCABULARY for token in request.stop_token_ids)
    assert request.max_output_tokens is None or 1 <= request.max_output_tokens <= INT32


@given(st.sampled_from(sorted({*INTEGERS, *FLOATS, *NOT_BUILT})), literals)
@example("temperature", "1e-40")
@example("temperature", "-0.0")
@example("temperature", "5e-324")
@example("top_p", "1e-40")
@example("top_p", "-0.0")
@example("top_k", "2147483648")
@example("seed", "9223372036854775808")
@example("seed", "-9223372036854775808")
@example("seed", "1e15")
@example("seed", "9007199254740994.0")
@example("max_tokens", "1e2")
@example("stop_token_ids", "129280")
def test_every_number_is_held_or_refused_by_name(name, text):
    request, sampling, error = outcome((name, text))
    if error is not None:
        assert error.status == 400
        assert (error.param or "").partition("[")[0] == (name if readable(text) else "")
        assert not readable(text) or not is_legal(name, json.loads(text))
        return
    check_held(request, sampling)
    value = json.loads(text)
    assert is_legal(name, value)
    if value is not None and name in ("temperature", "top_p"):
        documented = {"temperature": 0 if value < MIN_TEMPERATURE else value, "top_p": max(value, MIN_TOP_P)}
        assert getattr(sampling, name) == np.float32(documented[name])
    elif value is not None and name in ("top_k", "seed"):
        assert getattr(sampling, name) == (max(value, 0) if name == "top_k" else value)
    elif value is not None and name in ("max_tokens", "max_completion_tokens"):
        assert request.max_output_tokens == value
    elif name == "stop_token_ids":
        assert request.stop_token_ids == [value]


def is_legal(name, value):
    """Whether the docs take this value."""
    if value is None:
        return name != "stop_token_ids"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name in NOT_BUILT:
        return value in NEUTRAL_VALUES[name]
    if name == "top_p":
        return 0 < value <= 1
    if name == "temperature":
        return 0 <= value <= 2
    whole = isinstance(value, int) or (value.is_integer() and abs(value) <= 2**53)
    return whole and INTEGERS[name][0] <= value <= INTEGERS[name][1]


@given(st.floats(0, 2, allow_subnormal=True), st.floats(0, 1, exclude_min=True, allow_subnormal=True))
def test_the_services_defaults_are_held_too(temperature, top_p):
    request, _ = numbers(("seed", "1"))
    check_held(
        request, sampling_of(request, Sampling(temperature=temperature, top_p=top_p), drawn_seed=-INT64 - 1)
    )


def test_silence_takes_the_services_values_and_the_drawn_seed():
    request, _ = numbers(("max_tokens", "5"))
    sampling = sampling_of(request, Sampling(temperature=0.5, top_p=0.25), drawn_seed=9)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.25, 0, 9)


@pytest.mark.parametrize("value", [-1, 0, -1.0, -0.0])
def test_ways_to_turn_top_k_off(value):
    assert numbers(("top_k", json.dumps(value)))[1].top_k == 0


def test_a_stop_token_beyond_the_vocabulary_is_named():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stop_token_ids": [5, VOCABULARY]}
    request = parse_chat_request(json.dumps(body).encode())
    with pytest.raises(ApiError, match="beyond the vocabulary, whose last id is 129279") as caught:
        check_stop_tokens(request, VOCABULARY, tags_seen=True)
    assert (caught.value.status, caught.value.param) == (400, "stop_token_ids[1]")


def test_stop_tokens_that_could_not_sleep_are_refused():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stop_token_ids": [5]}

    def check(**fields):
        request = parse_chat_request(json.dumps({**body, **fields}).encode())
        check_stop_tokens(request, VOCABULARY, tags_seen=False)

    with pytest.raises(ApiError, match="stop_in_thought") as caught:
        check()
    assert (caught.value.status, caught.value.param) == (400, "stop_token_ids")
    check(stop_in_thought=True)
    check(chat_template_kwargs={"thinking": False})
    check(stop_token_ids=[])
