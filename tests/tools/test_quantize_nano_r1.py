"""The measurement of what INT8 and INT4 cost the embedded checkpoint, on few questions."""

import argparse

import torch
from nano_r1.export import load_model
from quantize_nano_r1 import ASSETS, Score, in_floats, report
from safetensors.torch import load_file
from small_model import quantize

from r1_cluster.weights.tensors import INT8


def test_what_is_asked_is_what_the_integers_stand_for(tmp_path):
    quantize(ASSETS, tmp_path / "int8", INT8)
    folder = in_floats(tmp_path / "int8", tmp_path / "floats")
    shipped, rounded = load_file(ASSETS / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(shipped) == set(rounded)
    changed = {name for name, weight in rounded.items() if not torch.equal(weight, shipped[name].float())}
    assert changed == {
        name for name in shipped if "_proj" in name and "kv_b" not in name and "eh_proj" not in name
    }
    for name in changed:
        weight = shipped[name].float()
        assert 0 < (rounded[name] - weight).norm() < 0.01 * weight.norm()
    assert load_model(folder).training is False


def test_the_report_says_what_was_lost():
    items = [argparse.Namespace(wording=wording) for wording in ("known", "unseen") for _ in range(200)]

    def score(num_right):
        right = [i < num_right for i in range(400)]
        return Score(items, right, [float(answer) for answer in right])

    scores = {"BF16, as shipped": score(400), "INT8": score(399), "INT4": score(380)}
    options = argparse.Namespace(samples=2, every=4)
    text = report(scores, {"INT8": "| table |"}, dict.fromkeys(scores, 3_000_000), options, 7.4)
    assert "quantize_nano_r1.py --samples 2 --every 4` on" in text
    assert text.count("| INT8 | 3.00 | 1.0000 | 0.9950 | 0.9975 | +0.25 points |") == 1
    assert text.count("| 1.0000 | 0.9000 | 0.9500 | +5.00 points |") == 2 - 1
    assert "1 (INT8), 20 (INT4)" in text
    assert "points of all answers: within that." in text
    scores["INT8"] = score(397)
    assert "points of all answers: **beyond** that." in report(
        scores, {}, dict.fromkeys(scores, 1), options, 1
    )
