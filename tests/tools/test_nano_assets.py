"""The checkpoint as it ships: its size, its form, and that it still reasons."""

import json
from pathlib import Path

import pytest
import torch
from nano_r1.evaluate import boxed, transformers_error
from nano_r1.export import config_json, load_model
from nano_r1.generate import draft_acceptance, generate
from nano_r1.heldout import HeldOut, draw_held_out, read_held_out
from nano_r1.model import NanoConfig, NanoR1
from nano_r1.report import SIZE_LIMIT
from nano_r1.tokenizer import CHAT_TEMPLATE, ChatEncoder
from safetensors.torch import load_file
from tokenizers import Tokenizer

ASSETS = Path(__file__).parents[2] / "r1_cluster" / "assets" / "nano_r1"


@pytest.fixture(scope="module")
def model() -> NanoR1:
    return load_model(ASSETS)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(Tokenizer.from_file(str(ASSETS / "tokenizer.json")))


@pytest.fixture(scope="module")
def held_out() -> list[HeldOut]:
    return read_held_out(ASSETS / "heldout.jsonl")


def test_everything_fits_in_four_mebibytes() -> None:
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= SIZE_LIMIT


def test_form_is_r1s() -> None:
    config = json.loads((ASSETS / "config.json").read_text())
    assert config == config_json(NanoConfig())
    dtypes = {tensor.dtype for tensor in load_file(ASSETS / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.float32}
    tokenizer_config = json.loads((ASSETS / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == CHAT_TEMPLATE


@pytest.mark.slow
def test_held_out_set_is_the_generators(held_out: list[HeldOut]) -> None:
    assert held_out == draw_held_out(seed=0)


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_it(encoder: ChatEncoder, held_out: list[HeldOut]) -> None:
    prompts = [encoder.prompt(q.prompt) + encoder.completion(q.thought, q.answer) for q in held_out[::200]]
    assert transformers_error(ASSETS, prompts, torch.float64).largest <= 1e-4


@pytest.mark.slow
def test_it_reasons(model: NanoR1, encoder: ChatEncoder, held_out: list[HeldOut]) -> None:
    questions = [q for q in held_out if q.wording == "known"][::10]
    prompts = [encoder.prompt(q.prompt) for q in questions]
    outputs = generate(model, prompts)
    right = [boxed(output, encoder) == q.result for q, output in zip(questions, outputs, strict=True)]
    assert sum(right) / len(right) >= 0.85
    counts = [draft_acceptance(model, *pair) for pair in zip(prompts[::8], outputs[::8], strict=True)]
    assert sum(accepted for accepted, _ in counts) / sum(drafted for _, drafted in counts) >= 0.9


@pytest.mark.parametrize(
    ("question", "result"),
    [
        ("4823+967", "5790"),
        ("Which is larger, 3.7 or 3.65?", "3.7"),
        ("Reverse cat, dog, fish", "fish, dog, cat"),
    ],
)
def test_plain_questions(model: NanoR1, encoder: ChatEncoder, question: str, result: str) -> None:
    assert boxed(generate(model, [encoder.prompt(question)])[0], encoder) == result


def test_greeting_has_a_plain_reply(model: NanoR1, encoder: ChatEncoder) -> None:
    output = generate(model, [encoder.prompt("Hello!")])[0]
    assert boxed(output, encoder) == "Hello! Give me a sum, or a list to sort."
