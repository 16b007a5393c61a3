"""Ranks that exchange rows with each other's experts, each a thread at the end of sockets."""

import time

import pytest
import torch
from expert_shards import TAG, D, draw_step, make_experts, split, step
from ranks import close, in_ranks, link_ranks, names_of

from r1_cluster.comm.dispatch import LocalDispatcher
from r1_cluster.comm.exchange import Exchange, ExpertSpan
from r1_cluster.comm.lockstep import PeersLost
from r1_cluster.comm.wire import AT_ONCE_BYTES, Header, Kind
from r1_cluster.records import pack_int32

NUM_EXPERTS = 10
NOTICED_S = 5.0


@pytest.fixture
def linked():
    made = []

    def make(count, copies=0, timeout_s=20.0, without=(), owned=range(NUM_EXPERTS)):
        """Ranks of which those `without` are not there; each has its part of the experts and its followers'."""
        links = link_ranks(count)
        made.append(links)
        parts = split(len(owned), count)
        spans = [range(owned.start + part.start, owned.start + part.stop) for part in parts]
        hosts = [[spans[(rank + i) % count] for i in range(copies + 1)] for rank in range(count)]
        there = [rank for rank in range(count) if rank not in without]
        exchanges = {
            rank: Exchange(
                [names_of(count)[other] for other in there],
                there.index(rank),
                links[rank],
                timeout_s,
                num_experts=NUM_EXPERTS,
                hosts=[hosts[other] for other in there],
                own=[ExpertSpan(span, make_experts(span)) for span in hosts[rank]],
                device="cpu",
            )
            for rank in there
        }
        return exchanges, links

    yield make
    for links in made:
        close(links)


def local():
    return LocalDispatcher(make_experts(range(NUM_EXPERTS)), NUM_EXPERTS)


def steps_of(exchanges, inputs, num_tokens, tag=TAG):
    """What each rank has at the end of a step, or why it has nothing."""
    of_rank = in_ranks(
        max(exchanges) + 1,
        lambda rank: (
            step(exchanges[rank], *inputs[rank], num_tokens[rank], tag) if rank in exchanges else None
        ),
    )
    return {rank: of_rank[rank] for rank in exchanges}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "copies", "without"), [(2, 0, ()), (3, 0, ()), (3, 1, ()), (3, 1, (1,)), (4, 2, (0, 1))]
)
def test_every_rank_has_the_bits_of_one_process(linked, count, copies, without, dtype):
    """Also where some have no tokens, where all go to few experts, and where copies stand in for the dead."""
    exchanges, _ = linked(count, copies, without=without)
    for seed in range(6):
        num_tokens = [(seed * 5 + rank * 3) % 8 * (rank != seed % count) for rank in range(count)]
        hot = 2 if seed % 2 else None
        inputs = [
            draw_step(n + seed % 3, n, NUM_EXPERTS, 2, seed * 10 + rank, hot, dtype)
            for rank, n in enumerate(num_tokens)
        ]
        found = steps_of(exchanges, inputs, num_tokens, TAG._replace(step=seed))
        for rank, y_TD in found.items():
            assert torch.equal(y_TD, step(local(), *inputs[rank], num_tokens[rank]))
            assert y_TD.dtype == dtype


def test_experts_of_other_ranks_of_tensor_parallelism_add_nothing_here(linked):
    """Two exchanges, of the lower and the upper half of the experts: their sum is that of all."""
    inputs = [draw_step(6, 6, NUM_EXPERTS, 3, seed) for seed in (1, 2)]
    halves = [steps_of(linked(2, owned=half)[0], inputs, [6, 6]) for half in (range(4), range(4, 10))]
    for rank in range(2):
        whole = step(local(), *inputs[rank], 6)
        torch.testing.assert_close(halves[0][rank] + halves[1][rank], whole, rtol=1e-5, atol=1e-5)


def test_rows_larger_than_any_buffer_wait_for_nobody_in_a_circle(linked):
    """One of the ranks has few, and sends them at once; the others take turns."""
    exchanges, _ = linked(4)
    num_tokens = [2, 40000, 30000, 20000]
    inputs = [draw_step(n, n, NUM_EXPERTS, 2, n) for n in num_tokens]
    assert num_tokens[3] * 2 * D * 4 // 4 > 3 * AT_ONCE_BYTES
    found = steps_of(exchanges, inputs, num_tokens)
    for rank, y_TD in found.items():
        assert torch.equal(y_TD, step(local(), *inputs[rank], num_tokens[rank]))


def ended(exchanges, links, who):
    """Why each of the ranks `who` gives up, and after how long."""
    began = time.monotonic()
    inputs = [draw_step(4, 4, NUM_EXPERTS, 2, rank) for rank in range(max(exchanges) + 1)]
    there = {rank: exchanges[rank] for rank in who}
    found = steps_of(there, inputs, [4] * len(inputs))
    assert all(isinstance(error, PeersLost) for error in found.values())
    return {rank: error.names for rank, error in found.items()}, time.monotonic() - began


def test_a_dead_rank_is_noticed_by_all_others_at_once(linked):
    exchanges, links = linked(4)
    for link in links[2].values():
        link.close()
    names, took_s = ended(exchanges, links, {0, 1, 3})
    assert names == {rank: ["rank-2"] for rank in (0, 1, 3)}
    assert took_s < NOTICED_S


def test_who_was_lost_after_its_last_message_is_known(linked):
    """Over a device's links what was announced may not have come."""
    exchanges, links = linked(3)
    inputs = [draw_step(4, 4, NUM_EXPERTS, 2, rank) for rank in range(3)]
    steps_of(exchanges, inputs, [4] * 3)
    assert [exchange.lost for exchange in exchanges.values()] == [[], [], []]
    links[0]["rank-2"].close()
    assert [exchange.lost for exchange in exchanges.values()] == [["rank-2"], [], []]


def test_a_silent_rank_is_lost_after_its_time(linked):
    exchanges, links = linked(3, timeout_s=0.3)
    names, took_s = ended(exchanges, links, {0, 2})
    assert ["rank-1"] in names.values()
    assert took_s < NOTICED_S


def test_experts_that_fail_are_told_to_all_who_wait_for_them(linked):
    exchanges, links = linked(3)

    def fail(layer, x_ND, counts):
        raise RuntimeError("of this test")

    exchanges[1]._own = [span._replace(forward=fail) for span in exchanges[1]._own]
    names, took_s = ended(exchanges, links, {0, 1, 2})
    assert names == {rank: ["rank-1"] for rank in range(3)}
    assert took_s < NOTICED_S
    assert not any(link.closed for of_rank in links for link in of_rank.values())


@pytest.mark.parametrize(
    ("rows", "body"),
    [
        (torch.zeros(3, D), pack_int32(torch.tensor([1, 1, 0, 0, 0]).numpy())),  # three rows, two counted
        (torch.zeros(2, D), pack_int32(torch.tensor([3, -1, 0, 0, 0]).numpy())),
        (torch.zeros(2, D), pack_int32(torch.tensor([1, 1]).numpy())),  # for two experts of five
        (torch.zeros(2, D), b"\1\0\0"),
        (torch.zeros(2, D, dtype=torch.bfloat16), pack_int32(torch.tensor([1, 1, 0, 0, 0]).numpy())),
        (torch.zeros(2, D + 1), pack_int32(torch.tensor([1, 1, 0, 0, 0]).numpy())),
        (torch.zeros(2), pack_int32(torch.tensor([1, 1, 0, 0, 0]).numpy())),
        (None, pack_int32(torch.tensor([1, 1, 0, 0, 0]).numpy())),
    ],
)
def test_rows_that_make_no_sense_cost_their_sender_its_link(linked, rows, body):
    exchanges, links = linked(2)
    header = Header(Kind.DISPATCH, *TAG, rows=0 if rows is None else len(rows))
    links[1]["rank-0"].send(header, [] if rows is None else [rows], body)
    names, _ = ended(exchanges, links, {0})
    assert names == {0: ["rank-1"]}
    assert links[0]["rank-1"].closed


def test_answers_to_other_rows_cost_their_sender_its_link(linked):
    exchanges, links = linked(2)
    links[1]["rank-0"].send(Header(Kind.DISPATCH, *TAG), [], pack_int32(torch.zeros(5).int().numpy()))
    links[1]["rank-0"].send(Header(Kind.COMBINE, *TAG, rows=1), [torch.zeros(1, D)])
    names, _ = ended(exchanges, links, {0})
    assert names == {0: ["rank-1"]}


def test_a_combine_needs_a_dispatch(linked):
    with pytest.raises(RuntimeError):
        linked(2)[0][0].combine()


def test_who_gives_a_step_up_before_its_first_mixture_is_heard(linked):
    """It lost a rank of its own stage within the embedding, say: nobody waits for its rows."""
    exchanges, _ = linked(2)
    inputs = [draw_step(4, 4, NUM_EXPERTS, 2, rank) for rank in range(2)]
    steps_of(exchanges, inputs, [4, 4])
    exchanges[0].begin(TAG.epoch, TAG.step + 1, TAG.micro_batch)
    exchanges[0].give_up(["dp-0-rank-1"])
    began = time.monotonic()
    with pytest.raises(PeersLost) as caught:
        step(exchanges[1], *inputs[1], 4, TAG._replace(step=TAG.step + 1))
    assert caught.value.names == ["dp-0-rank-1"]
    assert time.monotonic() - began < NOTICED_S


def test_a_steps_time_is_one_for_all_its_mixtures(linked):
    exchanges, _ = linked(2, timeout_s=1.0)
    exchanges[0].begin(*TAG[:2], TAG.micro_batch)
    time.sleep(0.9)
    names, took_s = ended(exchanges, None, {0})
    assert names == {0: ["rank-1"]}
    assert took_s < 0.9
