"""The report on what an FP8 cache costs."""

import json

from benchmarks import kv_cache
from r1_cluster.text.tokenizer import Tokenizer


class Scripted:
    """In place of the engine: answers every question as it was told, and keeps what it was asked."""

    asked = []

    def __init__(self, settings, layout):
        self.settings = settings

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, requests):
        self.asked.append((self.settings.kv_cache_dtype, requests))
        texts = self.texts if self.settings.kv_cache_dtype is None else self.texts_fp8
        return dict(zip((request.request_id for request in requests), texts, strict=True)), []


def test_right_and_other_answers_are_counted(monkeypatch):
    tokenizer = Tokenizer.from_folder(kv_cache.MODEL)
    eos = json.loads((kv_cache.MODEL / "config.json").read_text())["eos_token_id"]
    think = tokenizer.token_id("</think>")

    def says(text):
        return [*tokenizer.encode("a: 1\n"), think, *tokenizer.encode(text), eos]

    items = [
        {"wording": "known", "prompt": "What is 58 + 67?", "result": "125"},
        {"wording": "unseen", "prompt": "And 1 + 1?", "result": "2"},
    ]
    right, also = says("The answer is \\boxed{125}."), says("\\boxed{2}")
    wrong = says("The answer is \\boxed{126}.")
    cut = also[:-1] * kv_cache.MAX_TOKENS
    Scripted.asked = []
    Scripted.texts = [right, wrong, also, also]
    Scripted.texts_fp8 = [right, right, cut[: kv_cache.MAX_TOKENS], also]
    monkeypatch.setattr(kv_cache, "LocalEngine", Scripted)
    found = {name: kv_cache.answers(items, 1, cache) for name, cache in kv_cache.CACHES.items()}
    assert [cache for cache, _ in Scripted.asked] == [None, "fp8"]
    seeds = [(request.sampling.temperature, request.sampling.seed) for request in Scripted.asked[0][1]]
    assert seeds == [(0.0, 0), (0.6, 0)] * 2
    assert found["float32"].right == [[True, False], [True, True]]
    assert found["FP8"].right == [[True, True], [False, True]]
    text = kv_cache.report(items, found, 1, 800)
    assert "2 of the held-out questions" in text
    assert (
        "| float32 | 0 | 1.0000 | 1.0000 | 1.0000 | +0.00 points | 0.0000 | 1.0000 | 0.5000 | +0.00 points |"
        in text
    )
    assert (
        "| FP8 | 0 | 1.0000 | 0.0000 | 0.5000 | +50.00 points | 1.0000 | 1.0000 | 1.0000 | -50.00 points |"
        in text
    )
    assert (
        "Of 2 greedy answers 1 are not the same text; 1 are right with float32 alone, 0 with FP8 alone."
        in text
    )
