#!/usr/bin/env python3
"""Makes a small tokenizer with the structure and the chat template of one family of models.

    python tools/make_tokenizer.py build/qwen2 --family qwen2 --vocab-size 2048

It stands in for a published tokenizer where that is not at hand: trained on Python's standard library, with
a vocabulary of any size, but with the same splits, normalizer and decoder, and control tokens in the same
places with the same marks. The same arguments give the same files.

The families are named by `model_type` of config.json: deepseek_v3 (R1, R1-Zero, R1-0528), llama (distilled,
8B and 70B), qwen2 (distilled, 1.5B to 32B) and qwen3 (R1-0528-Qwen3-8B).
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from r1_cluster.text.template import R1_CHAT_TEMPLATE

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
TURNS, TAGS = ("<｜User｜>", "<｜Assistant｜>"), ("<think>", "</think>")
TOOLS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
# R1 marks none of these as special, so that they survive decoding with `skip_special_tokens`.
CONTROL_TOKENS = (*TURNS, *TAGS, *TOOLS)

# Splits as in the published tokenizer.json files. R1's: digits in threes, runs of Chinese and Japanese, words
# and punctuation. Llama 3's and Qwen2.5's differ in their digits: in threes, and one by one.
R1_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_SPLITS = (_WORDS + r"\p{N}{1,3}" + _SIGNS,)
QWEN_SPLITS = (_WORDS + r"\p{N}" + _SIGNS,)

# Prose and code that every Python installation has.
TRAINING_MODULES = ("argparse", "typing", "datetime", "statistics", "random", "textwrap", "inspect", "turtle")
# Beside it, for all but R1's: so that tokens hold characters beyond ASCII, whole ones and parts.
OTHER_LANGUAGES = (
    "Größe, Straße, naïve Café à la crème, señor mañana, łódź żółw. Привет, как дела? Γειά σου Κόσμε. "
    "请一步一步地推理，并把最终答案放在方框里。問題を解いてください。안녕하세요 세계. "
    "שלום עולם. مرحبا بالعالم. "
    "Tiếng Việt: đẹp lắm. 😀 👍🏽 🇩🇪 → ∑ ≤ ½ …"
)

# From R1-0528's published behaviour: the user's turn opens the assistant's, and nothing opens the thought.
R1_0528_CHAT_TEMPLATE = r"""
{%- set state = namespace(open=false, outputs=false) -%}
{{- bos_token -}}
{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') -}}
{%- for message in messages if message['role'] != 'system' -%}
  {%- if message['role'] == 'tool' -%}
    {{- '\n' if state.outputs else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
    {%- set state.outputs = true -%}
    {%- set state.open = true -%}
  {%- else -%}
    {%- if state.outputs -%}
      {{- '<｜tool▁outputs▁end｜>' -}}
      {%- set state.outputs = false -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
      {{- '<｜User｜>' + message['content'] + '<｜Assistant｜>' -}}
      {%- set state.open = true -%}
    {%- else -%}
      {{- message['content'].split('</think>')[-1] -}}
      {%- for call in message['tool_calls'] -%}
        {{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' -}}
        {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] -}}
        {{- '\n```json\n' + call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' -}}
        {{- '<｜tool▁calls▁end｜>' if loop.last -}}
      {%- endfor -%}
      {{- '<｜end▁of▁sentence｜>' -}}
      {%- set state.open = false -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if state.outputs -%}
  {{- '<｜tool▁outputs▁end｜>' -}}
{%- elif add_generation_prompt and not state.open -%}
  {{- '<｜Assistant｜>' -}}
{%- endif -%}
"""
TEMPLATES = {"r1": R1_CHAT_TEMPLATE, "r1-0528": R1_0528_CHAT_TEMPLATE}


class Family(NamedTuple):
    """One structure. `first` are the control tokens before those of the vocabulary, `last` those behind them;
    BOS, EOS, padding and `special` are marked as special. `languages` is trained on beside the library."""

    splits: tuple[str, ...]
    template: str
    last: tuple[str, ...]
    first: tuple[str, ...] = ()
    special: frozenset[str] = frozenset()
    nfc: bool = False
    ignore_merges: bool = False
    languages: str = OTHER_LANGUAGES


_RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(4))
_QWEN_SPECIAL = ("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_CODE = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")

FAMILIES = {
    "deepseek_v3": Family(R1_SPLITS, "r1", CONTROL_TOKENS, first=(BOS, EOS, PAD), languages=""),
    "llama": Family(
        LLAMA_SPLITS,
        "r1",
        (BOS, EOS, *_RESERVED, *TURNS, *TAGS, PAD),
        special=frozenset(_RESERVED),
        ignore_merges=True,
    ),
    "qwen2": Family(
        QWEN_SPLITS,
        "r1",
        (EOS, *TURNS, BOS, "<|EOT|>", *TAGS, *_QWEN_SPECIAL, *_QWEN_CODE),
        special=frozenset(_QWEN_SPECIAL),
        nfc=True,
    ),
    "qwen3": Family(
        QWEN_SPLITS,
        "r1-0528",
        (BOS, "<|im_start|>", EOS, *_QWEN_SPECIAL, *_QWEN_CODE, *TAGS, *TURNS, *TOOLS),
        special=frozenset({"<|im_start|>", *_QWEN_SPECIAL}),
        nfc=True,
    ),
}


def min_vocab(family: str) -> int:
    """The least `vocab_size` of a family: its bytes and control tokens."""
    return 256 + len(FAMILIES[family].first) + len(FAMILIES[family].last)


MIN_VOCAB = max(map(min_vocab, FAMILIES))
"""Enough for every family."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, family: str = "deepseek_v3") -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` entries, laid out as the family's. R1's: BOS 0, EOS 1,
    padding 2, then bytes and merges, then the control tokens."""
    kind = FAMILIES[family]
    special = kind.special | {BOS, EOS, PAD}
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind.ignore_merges))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(kind.last),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in kind.first],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for text in kind.last:
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=text in special)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


@cache
def _default_tokenizer(family: str, vocab_size: int) -> Tokenizer:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [library / f"{name}.py" for name in TRAINING_MODULES]
    if vocab_size > 2048:
        files = sorted(library.glob("*.py"))
    languages = [FAMILIES[family].languages] * 20
    return train_tokenizer(
        [*(file.read_text(encoding="utf-8") for file in files), *languages], vocab_size, family
    )


def make_tokenizer(
    folder: str | Path, family: str, vocab_size: int = 512, *, template: str | None = None
) -> dict[str, object]:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json of at most `vocab_size` tokens;
    returns what config.json must say of them: `bos_token_id` and `eos_token_id`.

    `template`: r1 or r1-0528, the family's own where unset. Raises ValueError for what there is not.
    """
    if family not in FAMILIES:
        raise ValueError(f"no tokenizer of {family!r}; there are: {', '.join(FAMILIES)}")
    template = template or FAMILIES[family].template
    if template not in TEMPLATES:
        raise ValueError(f"no template {template!r}; there are: {', '.join(TEMPLATES)}")
    if vocab_size < min_vocab(family):
        raise ValueError(f"vocab_size {vocab_size} is below {min_vocab(family)} (bytes and special tokens)")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    return write_tokenizer(target, _default_tokenizer(family, vocab_size), TEMPLATES[template])


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str) -> dict[str, object]:
    """See `make_tokenizer`; `template` is the chat template's text."""
    tokenizer.save(str(folder / "tokenizer.json"))

    def added(text: str) -> dict[str, object]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": text, **flags}

    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": added(BOS),
            "clean_up_tokenization_spaces": False,
            "eos_token": added(EOS),
            "legacy": True,
            "model_max_length": 16384,
            "pad_token": added(EOS),
            # R1 names LlamaTokenizerFast, for which transformers 5 replaces the file's splits.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
            "chat_template": template,
        },
    )
    ids: dict[str, object] = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
    }
    generation = {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    return ids


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", help="folder to write to; a tokenizer there is replaced")
    parser.add_argument("--family", choices=FAMILIES, default="deepseek_v3")
    parser.add_argument("--vocab-size", type=int, default=512, metavar="N")
    parser.add_argument("--template", choices=TEMPLATES, help="default: the family's own")
    options = parser.parse_args(arguments)
    try:
        ids = make_tokenizer(options.path, options.family, options.vocab_size, template=options.template)
    except (ValueError, OSError) as error:
        print(f"make_tokenizer: {error}", file=sys.stderr)
        return 1
    print(f"{options.path}: " + ", ".join(f"{name} {value}" for name, value in ids.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
