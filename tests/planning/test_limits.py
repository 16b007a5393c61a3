from types import SimpleNamespace

import pytest

from r1_cluster.config import ConfigError, Service
from r1_cluster.planning.limits import check_messages, max_model_len

R1 = SimpleNamespace(hidden_size=7168, max_position_embeddings=163840, vocab_size=129280)


def service(kind="disaggregated", dtype="bfloat16", ranks=1, **engine):
    return Service.model_validate(
        {
            "name": "limits",
            "model": {"path": "none", "dtype": dtype},
            "layout": {"kind": kind, "tensor_parallel": ranks},
            "engine": {"num_pages": 32768, "page_size": 64, **engine},
        }
    )


def test_the_shortest_of_the_limits_counts():
    assert max_model_len(service(), R1) == 163840
    assert max_model_len(service(num_pages=100), R1) == 6400
    assert max_model_len(service(max_model_len=5000), R1) == 5000


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 74896), ("float32", 37448)])
def test_hidden_states_must_fit_a_message(dtype, most):
    check_messages(service(dtype=dtype, max_batch_tokens=most), R1)
    with pytest.raises(ConfigError, match=f"engine.max_batch_tokens: .* {most + 1} tokens .* {most} tokens"):
        check_messages(service(dtype=dtype, max_batch_tokens=most + 1), R1)
    check_messages(service("colocated", dtype=dtype, max_batch_tokens=most + 1), R1)


def test_what_ranks_send_each_other_must_fit_a_message():
    check_messages(service("colocated", ranks=2, max_batch_tokens=74896), R1)
    with pytest.raises(ConfigError, match=r"engine.max_batch_tokens: .* 74896 tokens"):
        check_messages(service("colocated", ranks=2, max_batch_tokens=74897), R1)
    check_messages(service("colocated", ranks=2, max_num_seqs=4152), R1)
    with pytest.raises(ConfigError, match=r"engine.max_num_seqs: a rank's logits of 4153 .* 4152 sequences"):
        check_messages(service("colocated", ranks=2, max_num_seqs=4153), R1)


def test_rows_for_experts_need_not_fit_one():
    """9,363 tokens of R1 with 8 rows each for one shard are more than a message: they go in pieces."""
    check_messages(service(max_batch_tokens=16384), R1)


def test_rows_that_ranks_exchange_must_fit_one():
    model = SimpleNamespace(**vars(R1) | {"moe": SimpleNamespace(num_experts_per_tok=8)})
    check_messages(service("expert-parallel", max_batch_tokens=9362), model)
    with pytest.raises(ConfigError, match=r"engine.max_batch_tokens: the rows of 9363 .* is 9362 tokens"):
        check_messages(service("expert-parallel", max_batch_tokens=9363), model)


@pytest.mark.parametrize("kind", ["colocated", "disaggregated"])
def test_a_plan_must_fit_a_message(kind):
    check_messages(service(kind, max_num_seqs=512, page_size=16, num_pages=6_000_000), R1)  # 21 MB of tables
    check_messages(
        service(kind, max_num_seqs=512, page_size=1, num_pages=200_000), R1
    )  # pages have one owner
    with pytest.raises(
        ConfigError, match=r"engine.max_num_seqs: .* 512 sequences of 163840 tokens in pages of 1 "
    ):
        check_messages(service(kind, max_num_seqs=512, page_size=1, num_pages=20_000_000), R1)
