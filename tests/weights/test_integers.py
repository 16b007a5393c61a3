"""Integers on disk: packed as compressed-tensors packs them, described in config.json as it does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_model import config_values

from r1_cluster.models.config import UnsupportedModel
from r1_cluster.models.family import parse_config
from r1_cluster.weights.integers import from_words, quantization_config, stored_shapes, to_words
from r1_cluster.weights.tensors import INT4, INT8, IntFormat


def words_by_definition(q, bits):
    """`pack_to_int32` of compressed-tensors, number by number in Python's integers."""
    per_word = 32 // bits
    rows = []
    for row in q.tolist():
        raised = [value + 2 ** (bits - 1) for value in row]
        words = [raised[i : i + per_word] for i in range(0, len(raised), per_word)]
        sums = [sum(value << (bits * j) for j, value in enumerate(word)) for word in words]
        rows.append([word - 2**32 if word >= 2**31 else word for word in sums])
    return torch.tensor(rows, dtype=torch.int32)


@given(bits=st.sampled_from([4, 8]), width=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_words_are_those_of_the_definition(bits, width, seed):
    most = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-most, most, (3, width), generator=generator).to(torch.int8)
    words = to_words(q, bits)
    assert torch.equal(words, words_by_definition(q, bits))
    assert tuple(words.shape) == stored_shapes((3, width), IntFormat(bits, None))["_packed"]
    assert torch.equal(from_words(words, bits, width), q)


@pytest.mark.parametrize("how", [INT8, INT4, IntFormat(8, 128), IntFormat(4, None)])
def test_a_config_says_how_integers_are_stored(how):
    values = config_values(quantization_config=quantization_config(how, ["lm_head"]))
    assert parse_config(values).int_format == how
    assert parse_config(values).fp8_block is None


def changed(**changes):
    """A published w4a16 configuration, with other values in the group's weights, the group, or around it."""
    config = quantization_config(INT4, ["lm_head"])
    group = config["config_groups"]["group_0"]
    for place in (group["weights"], group, config):
        place.update({key: value for key, value in changes.items() if key in place})
    return config


@pytest.mark.parametrize(
    "quantization",
    [
        changed(num_bits=3),
        changed(type="float"),
        changed(symmetric=False),
        changed(group_size=32),
        changed(strategy="tensor"),
        changed(input_activations={"num_bits": 8}),
        changed(format="marlin-24"),
        changed(config_groups={}),
        changed(config_groups=[1]),
        changed(config_groups={"a": {"weights": None}}),
        changed(config_groups={"a": 1, "b": 2}),
    ],
)
def test_what_is_not_weight_only_in_rows_or_groups_of_128_is_refused(quantization):
    with pytest.raises(UnsupportedModel, match="supported: pack-quantized, one group, symmetric integers"):
        parse_config(config_values(quantization_config=quantization))
