"""Sums and gathers among the ranks of a stage, each a thread at the end of sockets."""

import threading
import time
from collections import deque

import pytest
import torch
from ranks import close, in_ranks, link_ranks, names_of

from r1_cluster.comm.lockstep import PeersLost
from r1_cluster.comm.ranks import RankGroup
from r1_cluster.comm.wire import AT_ONCE_BYTES, Header, Kind, Message

NOTICED_S = 5.0


@pytest.fixture
def linked():
    made = []

    def make(count, timeout_s=20.0):
        links = link_ranks(count)
        made.append(links)
        groups = [RankGroup(names_of(count), rank, links[rank], timeout_s) for rank in range(count)]
        for group in groups:
            group.begin(1, 1, 0)
        return groups, links

    yield make
    for links in made:
        close(links)


def parts(count, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_ranks_have_the_same_bits_which_are_those_of_a_sum_in_their_order(linked, count, dtype):
    groups, _ = linked(count)
    mine = parts(count, 5, 7, dtype=dtype)
    kept = [part.clone() for part in mine]
    sums = in_ranks(count, lambda rank: [groups[rank].add(mine[rank]) for _ in range(3)])
    expected = kept[0].float()
    for part in kept[1:]:
        expected = expected + part.float()
    for of_rank in sums:
        for total in of_rank:
            assert torch.equal(total, expected.to(dtype))
    assert all(map(torch.equal, mine, kept))  # what was given is as it was


def test_sums_larger_than_any_buffer_wait_for_nobody_in_a_circle(linked):
    groups, _ = linked(4)
    mine = parts(4, 2048, 2048)
    assert mine[0].nbytes > 3 * (4 << 20) > AT_ONCE_BYTES
    sums = in_ranks(4, lambda rank: groups[rank].add(mine[rank]))
    assert all(torch.equal(total, sums[0]) for total in sums)


def test_the_first_rank_gathers_columns_of_any_number(linked):
    groups, _ = linked(3)
    mine = [torch.full((4, columns), float(columns)) for columns in (2, 5, 3)]
    first, second, third = in_ranks(3, lambda rank: groups[rank].gather(mine[rank]))
    assert all(map(torch.equal, first, mine))
    assert (second, third) == ([], [])


def give_up(groups, who):
    """How each of the ranks `who` ends a sum in which the others take no part, and after how long."""
    began = time.monotonic()

    def work(rank):
        if rank not in who:
            return None
        with pytest.raises(PeersLost) as caught:
            groups[rank].add(torch.ones(3, 4))
        return caught.value.names, time.monotonic() - began

    return [ended for ended in in_ranks(len(groups), work) if ended is not None]


def test_a_dead_rank_is_noticed_by_all_others_at_once(linked):
    groups, links = linked(4)
    for link in links[2].values():
        link.close()
    ended = give_up(groups, {0, 1, 3})
    assert [names for names, _ in ended] == [["rank-2"]] * 3
    assert max(seconds for _, seconds in ended) < NOTICED_S


def test_a_rank_that_was_never_linked(linked):
    groups, links = linked(3)
    for links_of_rank in (links[0], links[1]):
        links_of_rank.pop("rank-2").close()
    ended = give_up(groups, {0, 1})
    assert [names for names, _ in ended] == [["rank-2"]] * 2


def test_a_cut_link_ends_the_sum_of_those_too_who_have_all_theirs(linked):
    """The third waits for the parts of two that wait no more: it is told."""
    groups, links = linked(3)
    links[0]["rank-1"].close()
    ended = give_up(groups, {0, 1, 2})
    assert [names for names, _ in ended][:2] == [["rank-1"], ["rank-0"]]
    assert ended[2][0] in (["rank-0"], ["rank-1"])
    assert max(seconds for _, seconds in ended) < NOTICED_S


def test_a_silent_rank_is_lost_after_its_time(linked):
    groups, _ = linked(3, timeout_s=0.3)
    ended = give_up(groups, {0, 2})
    assert ["rank-1"] in [names for names, _ in ended]
    assert max(seconds for _, seconds in ended) < NOTICED_S


def test_one_that_died_before_the_last_part_of_a_large_sum(linked):
    groups, links = linked(3)
    mine = parts(3, 1024, 2048)

    def work(rank):
        if rank == 2:
            links[2]["rank-0"].recv(20)  # the first's part has come, the second's never will
            for link in links[2].values():
                link.close()
            return None
        with pytest.raises(PeersLost) as caught:
            groups[rank].add(mine[rank])
        return caught.value.names

    assert in_ranks(3, work)[:2] == [["rank-2"]] * 2


def test_what_is_left_of_a_step_that_was_given_up_disturbs_no_other(linked):
    """Its parts, and the word that it was given up, lie before the next step's."""
    groups, links = linked(2)
    for step in (1, 2):
        links[0]["rank-1"].send(Header(Kind.REDUCE, 1, step, 0, 0, 3), [torch.full((3, 4), 9.0)])
        links[0]["rank-1"].send(Header(Kind.REDUCE, 1, step, 1, 0, 0, 1), [], b"rank-7")
    links[0]["rank-1"].send(Header(Kind.REDUCE, 1, 30, 0, 0, 3), [torch.full((3, 4), 9.0)])
    for group in groups:
        group.begin(2, 3, 0)
    sums = in_ranks(2, lambda rank: groups[rank].add(torch.ones(3, 4)))
    assert all(torch.equal(total, torch.full((3, 4), 2.0)) for total in sums)


def test_what_came_early_is_taken_first_and_in_order(linked):
    groups, links = linked(2)
    early = deque()
    sent = threading.Event()

    def work(rank):
        if rank == 0:
            links[0]["rank-1"].send(Header(Kind.REDUCE, 1, 1, 0, 0, 3), [torch.full((3, 4), 5.0)])
            sent.set()
            links[0]["rank-1"].recv(20)
            groups[0]._header = groups[0]._header._replace(layer=1)
            return groups[0].add(torch.ones(3, 4))
        sent.wait(20)
        early.append(links[1]["rank-0"].recv(20))  # as the worker's loop does, before its own plan has come
        groups[1].deliver("rank-0", early.popleft())
        return groups[1].add(torch.ones(3, 4)), groups[1].add(torch.ones(3, 4))

    second, (first_sum, second_sum) = in_ranks(2, work)
    assert torch.equal(first_sum, torch.full((3, 4), 6.0))
    assert torch.equal(second_sum, second)


def test_a_rank_that_is_behind_gives_up_and_accuses_nobody(linked):
    groups, links = linked(2)
    links[0]["rank-1"].send(Header(Kind.REDUCE, 2, 1, 0, 0, 3), [torch.ones(3, 4)])
    with pytest.raises(PeersLost) as caught:
        groups[1].add(torch.ones(3, 4))
    assert caught.value.names == []
    groups[1].deliver("rank-0", Message(Header(Kind.REDUCE, 2, 1, 0, 0, 3), [torch.ones(3, 4)], b""))
    with pytest.raises(PeersLost) as caught:
        groups[1].add(torch.ones(3, 4))
    assert caught.value.names == []


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        (Header(Kind.HIDDEN, 1, 1, 0, 0, 3), [torch.ones(3, 4)]),
        (Header(Kind.REDUCE, 1, 1, 1, 0, 3), [torch.ones(3, 4)]),
        (Header(Kind.REDUCE, 1, 2, 0, 0, 3), [torch.ones(3, 4)]),
        (Header(Kind.REDUCE, 1, 1, 0, 0, 2), [torch.ones(2, 4)]),
        (Header(Kind.REDUCE, 1, 1, 0, 0, 3), [torch.ones(2, 4)]),
        (Header(Kind.REDUCE, 1, 1, 0, 0, 3), [torch.ones(3, 4, dtype=torch.bfloat16)]),
        (Header(Kind.REDUCE, 1, 1, 0, 0, 3), []),
    ],
)
def test_nonsense_is_a_loss(linked, header, tensors):
    groups, links = linked(2)
    links[0]["rank-1"].send(header, tensors)
    with pytest.raises(PeersLost) as caught:
        groups[1].add(torch.ones(3, 4))
    assert caught.value.names == ["rank-0"]
    assert links[1]["rank-0"].closed
