"""Fields of a chat request that other servers know and this one does not act on; docs/api.md says why."""

from __future__ import annotations

# Sent by known clients whether or not they mean anything by it; nothing here depends on them.
IGNORED_FIELDS = frozenset(
    {
        # OpenAI's
        "user",
        "store",
        "metadata",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "verbosity",
        # DeepSeek's and vLLM's
        "user_id",
        "request_id",
        "session_id",
        "cache_salt",
    }
)

# Not supported yet: only null and the values with which nothing changes are taken.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    # OpenAI's
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
    # vLLM's
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "priority": (0,),
    "logits_processors": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "return_mm_kwargs": (True,),
    "routed_experts_prompt_start": (0,),
    "repetition_detection": (),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "watermarking": (False,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
    # ours
    "thinking_budget": (),
}


def is_neutral(name: str, value: object) -> bool:
    """Whether a field of NEUTRAL_VALUES asks for nothing. Equality is JSON's: 1 is 1.0, and true is not 1."""
    return value is None or any(_equal(value, neutral) for neutral in NEUTRAL_VALUES[name])


def _equal(value: object, neutral: object) -> bool:
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return value == neutral
