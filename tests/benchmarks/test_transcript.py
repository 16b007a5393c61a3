"""README's conversation is what the embedded model answers."""

import pytest

from benchmarks.transcript import README, SHOWN, answer


@pytest.mark.slow
def test_readme_shows_what_the_embedded_model_answers():
    shown = SHOWN.search(README.read_text(encoding="utf-8"))
    assert shown["answer"] == answer(shown["question"], int(shown["seed"]))
