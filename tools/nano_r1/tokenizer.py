"""The tokenizer of the tiny model: byte-level BPE of 512 tokens with R1's control tokens.

Digits, spaces and punctuation never merge, so that a number is always the same sequence of single digits, and
a word is the same tokens wherever it stands. All 256 bytes are tokens, so any text round-trips.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
ADDED_TOKENS = (
    USER, ASSISTANT, "<think>", "</think>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
VOCAB_SIZE = 512

# Phrases of the thoughts are whole tokens with their spaces; elsewhere a space stands alone.
_PIECES = r" → | carry | borrow | \| |: |, |\\boxed|[a-zA-Z]+|[0-9]|[^\sa-zA-Z0-9\x00-\x7f]+|\s|."

# The published R1 template (deepseek-ai/DeepSeek-R1 tokenizer_config.json) by behaviour: BOS, system text,
# turns without their thoughts, tool calls and outputs, and a generation prompt that opens the thought.
CHAT_TEMPLATE = """\
{%- set ns = namespace(system='', first_system=true, after_tool=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set ns.system = ns.system + ('' if ns.first_system else '\\n\\n') + message['content'] -%}
  {%- set ns.first_system = false -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set ns.after_tool = false -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'tool' -%}
    {{- '\\n' if ns.after_tool else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
    {%- set ns.after_tool = true -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- set content = (message['content'] or '').split('</think>')[-1] -%}
    {{- '<｜tool▁outputs▁end｜>' if ns.after_tool else '<｜Assistant｜>' -}}
    {{- content -}}
    {%- if message['tool_calls'] -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for tool in message['tool_calls'] -%}
        {{- ('' if loop.first else '\\n') + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' -}}
        {{- tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] -}}
        {{- '\\n```<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- '<｜end▁of▁sentence｜>' -}}
    {%- set ns.after_tool = false -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.after_tool -%}
  {{- '<｜tool▁outputs▁end｜>' -}}
{%- elif add_generation_prompt -%}
  {{- '<｜Assistant｜><think>\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the 512-token byte-level BPE on `texts`; deterministic for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(ADDED_TOKENS),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ADDED_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


class ChatEncoder:
    """Turns questions and answers into token ids; text pieces can never become control tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        plain = json.loads(tokenizer.to_str())
        plain["added_tokens"], plain["post_processor"] = [], None
        self._plain = Tokenizer.from_str(json.dumps(plain))
        ids = tokenizer.get_vocab()
        self.user_id, self.assistant_id = ids[USER], ids[ASSISTANT]
        self.think_id, self.end_think_id = ids["<think>"], ids["</think>"]
        self._newline, self._blank_line = self.text("\n"), self.text("\n\n")

    def text(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def prompt(self, prompt: str, history: tuple[tuple[str, str], ...] = (), system: str = "") -> list[int]:
        """Ids of a chat up to `<think>\\n`; `history`: earlier (question, answer) turns, no thoughts."""
        ids = [BOS_ID, *self.text(system)]
        for question, answer in history:
            ids += [self.user_id, *self.text(question), self.assistant_id, *self.text(answer), EOS_ID]
        return [*ids, self.user_id, *self.text(prompt), self.assistant_id, self.think_id, *self._newline]

    def completion(self, thought: str, answer: str) -> list[int]:
        """Ids to write after the prompt: thought, `\\n</think>\\n\\n`, answer, end of sentence."""
        return [*self.text(thought), *self.closed_thought(), *self.answer(answer)]

    def answer(self, answer: str) -> list[int]:
        """Ids of the answer alone, with the end of sentence."""
        return [*self.text(answer), EOS_ID]

    def closed_thought(self) -> list[int]:
        """Ids that close the thought at once, after a prompt's `<think>\\n` (DeepThink off)."""
        return [*self._newline, self.end_think_id, *self._blank_line]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) as R1 publishes them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n")
