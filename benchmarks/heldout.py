"""Held-out accuracy of the embedded nano R1 through HTTP: pass@1 per task, as docs/nano-r1.md has it.

r1-cluster serve cluster_configs/services/nano.yaml          # in another terminal
python benchmarks/heldout.py --url http://127.0.0.1:8000 --model nano-r1
"""

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from pathlib import Path

import httpx

HELD_OUT = Path(__file__).parent.parent / "r1_cluster/assets/nano_r1/heldout.jsonl"
CONCURRENCY = 32


def final_answer(content: str) -> str:
    """What stands in the last box, or the whole answer where there is none."""
    _, box, rest = content.strip().rpartition("\\boxed{")
    return rest.partition("}")[0] if box else content.strip()


async def ask(
    http: httpx.AsyncClient, model: str, item: dict[str, str], temperature: float, seed: int
) -> bool:
    """Whether one sampled answer is right; one that was cut off is not."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": item["prompt"]}],
        "temperature": temperature,
        "top_p": 0.95,
        "seed": seed,
        "max_tokens": 800,
    }
    response = await http.post("/v1/chat/completions", json=body)
    choice = response.raise_for_status().json()["choices"][0]
    answer = final_answer(choice["message"]["content"])
    return choice["finish_reason"] == "stop" and answer == item["result"]


async def measure(
    url: str, model: str, samples: int, temperature: float
) -> dict[tuple[str, str], list[bool]]:
    """(wording, task) → right or wrong for each of its items' samples."""
    items = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    slots = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def one(item: dict[str, str], seed: int) -> None:
            async with slots:
                right[item["wording"], item["task"]].append(await ask(http, model, item, temperature, seed))

        await asyncio.gather(*(one(item, seed) for item in items for seed in range(samples)))
    return right


def main() -> int:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="nano-r1")
    parser.add_argument("--samples", type=int, default=4, help="answers per question (default 4)")
    parser.add_argument("--temperature", type=float, default=0.6)
    arguments = parser.parse_args()
    right = asyncio.run(measure(arguments.url, arguments.model, arguments.samples, arguments.temperature))
    print("| wording | task | answers | pass@1 |\n| --- | --- | ---: | ---: |")
    for (wording, task), results in sorted(right.items()):
        print(f"| {wording} | {task} | {len(results)} | {sum(results) / len(results):.3f} |")
    every = [result for results in right.values() for result in results]
    print(f"| all | all | {len(every)} | {sum(every) / len(every):.4f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
