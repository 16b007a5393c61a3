"""README's conversation with the embedded nano R1: asks again, and writes what it answers.

    PYTHONPATH=. python -m benchmarks.transcript           # after the weights have changed

`tests/benchmarks/test_transcript.py` holds README to it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.processes import LocalEngine, Settings
from r1_cluster.config import ASSETS, LayoutConfig, Sampling
from r1_cluster.records import Request, SamplingParams
from r1_cluster.text.template import ChatTemplate
from r1_cluster.text.tokenizer import Tokenizer

README = Path(__file__).parents[1] / "README.md"
MODEL = ASSETS / "nano_r1"
SHOWN = re.compile(
    r'(\$ \S*r1-cluster chat "(?P<question>[^"]*)" --seed (?P<seed>\d+)\n)(?P<answer>.*?)(```)', re.S
)


def answer(question: str, seed: int) -> str:
    """What `r1-cluster chat` prints, of an engine in one process on the CPU."""
    tokenizer = Tokenizer.from_folder(MODEL)
    prompt = ChatTemplate.from_folder(MODEL, tokenizer).prompt_ids([{"role": "user", "content": question}])
    eos = json.loads((MODEL / "config.json").read_text())["eos_token_id"]
    defaults = Sampling()
    sampling = SamplingParams(defaults.temperature, defaults.top_p, 0, seed)
    settings = Settings(checkpoint=str(MODEL), device="cpu", dtype="float32", transport="sockets")
    with LocalEngine(settings, LayoutConfig()) as engine:
        texts, _ = engine.run([Request("question", prompt, sampling, 400, [eos], "sink")])
    thought, _, content = tokenizer.decode(texts["question"]).partition("</think>")
    content = content.removesuffix(tokenizer.decode([eos]))
    return f"<think>\n{thought.strip()}\n</think>\n\n{content.strip()}\n"


def main() -> None:
    """Rewrites README."""
    text = README.read_text(encoding="utf-8")
    found = SHOWN.search(text)
    assert found is not None, "README shows no question with a seed"
    new = answer(found["question"], int(found["seed"]))
    README.write_text(text[: found.start("answer")] + new + text[found.end("answer") :], encoding="utf-8")
    print(new, end="")


if __name__ == "__main__":
    main()
