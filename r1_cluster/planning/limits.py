"""How long a sequence may be, and whether the largest step's messages fit the links: known before anything is
loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels import ROW_TILE
from r1_cluster.comm import wire
from r1_cluster.config import ConfigError, Service

if TYPE_CHECKING:
    from r1_cluster.models.config import ModelConfig

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_SEQUENCE_BYTES = 256  # a plan's words on a sequence beside its tokens and pages: its id, lengths, sampling


def max_model_len(service: Service, model: ModelConfig) -> int:
    """Tokens that prompt and answer may have together: by the model, by configuration, by the pages."""
    engine = service.engine
    limits = [model.max_position_embeddings, engine.num_pages * engine.page_size]
    if engine.max_model_len is not None:
        limits.append(engine.max_model_len)
    return min(limits)


def check_messages(service: Service, model: ModelConfig) -> None:
    """Raises ConfigError, with the numbers, for a step that no link could carry.

    Rows for experts are not among it: a dispatch that is too large goes in pieces (`LinkDispatcher`).
    """
    engine = service.engine
    num_rows = max(engine.max_batch_tokens, engine.max_num_seqs)
    longest = max_model_len(service, model)
    # No page has two owners.
    pages = min(engine.max_num_seqs * -(-longest // engine.page_size), engine.num_pages)
    plan_bytes = 4 * (num_rows + pages) + _SEQUENCE_BYTES * engine.max_num_seqs
    if plan_bytes > wire.MAX_BODY_BYTES:
        raise ConfigError(
            f"engine.max_num_seqs: a step's plan for {engine.max_num_seqs} sequences of {longest} tokens "
            f"in pages of {engine.page_size} takes {plan_bytes} bytes, a message at most "
            f"{wire.MAX_BODY_BYTES}; lower it or engine.max_model_len, or raise engine.page_size"
        )
    if service.layout.kind == "colocated" and service.layout.tensor_parallel == 1:
        return  # hidden states stay in the process
    row_bytes = model.hidden_size * _ITEM_BYTES[service.dtype]
    hidden_bytes = -(-num_rows // ROW_TILE) * ROW_TILE * row_bytes
    if hidden_bytes > wire.MAX_PAYLOAD_BYTES:
        most = wire.MAX_PAYLOAD_BYTES // row_bytes // ROW_TILE * ROW_TILE
        raise ConfigError(
            f"engine.max_batch_tokens: the hidden states of {num_rows} tokens take {hidden_bytes} bytes, a "
            f"message between workers at most {wire.MAX_PAYLOAD_BYTES}, which is {most} tokens of this model"
        )
    if service.layout.kind == "expert-parallel":
        assert model.moe is not None, "the layout was built"
        # Were all rows of a data rank for the experts of one other.
        top_rows = num_rows * model.moe.num_experts_per_tok
        if top_rows * row_bytes > wire.MAX_PAYLOAD_BYTES:
            most = wire.MAX_PAYLOAD_BYTES // (row_bytes * model.moe.num_experts_per_tok)
            raise ConfigError(
                f"engine.max_batch_tokens: the rows of {num_rows} tokens for experts take "
                f"{top_rows * row_bytes} bytes, a message between workers at most {wire.MAX_PAYLOAD_BYTES}, "
                f"which is {most} tokens of this model"
            )
    ranks = service.layout.tensor_parallel
    if ranks == 1:
        return
    row_bytes = 4 * -(-model.vocab_size // ranks)
    if (most := wire.MAX_PAYLOAD_BYTES // row_bytes) < engine.max_num_seqs:
        raise ConfigError(
            f"engine.max_num_seqs: a rank's logits of {engine.max_num_seqs} sequences take "
            f"{engine.max_num_seqs * row_bytes} bytes, a message between workers at most "
            f"{wire.MAX_PAYLOAD_BYTES}, which is {most} sequences of this model"
        )
