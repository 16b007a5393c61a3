import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1_cluster.engine.pages import OutOfPages, PageAllocator


def test_grow_gives_only_what_is_missing():
    pages = PageAllocator(num_pages=4, page_size=16)
    tables = []
    for num_tokens in (1, 16, 33):
        pages.grow("a", num_tokens)
        tables.append(pages.table("a").tolist())
    assert [len(table) for table in tables] == [1, 1, 3]
    assert tables[2][:1] == tables[1] == tables[0]
    assert pages.num_free == 1
    pages.check()


def test_too_many_allocates_nothing():
    pages = PageAllocator(num_pages=2, page_size=16)
    pages.grow("a", 16)
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 of 2 are free"):
        pages.grow("b", 32)
    assert pages.num_free == 1
    pages.check()


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 90)), max_size=60), st.integers(1, 20))
def test_no_page_is_lost_or_shared(operations, page_size):
    pages = PageAllocator(num_pages=12, page_size=page_size)
    tables: dict[str, list[int]] = {owner: [] for owner in "abcde"}
    for owner, num_tokens in operations:
        if num_tokens < 10:
            pages.release(owner)
            tables[owner] = []
        else:
            try:
                pages.grow(owner, num_tokens)
                assert len(pages.table(owner)) == max(pages.pages_for(num_tokens), len(tables[owner]))
            except OutOfPages:
                assert pages.pages_for(num_tokens) - len(tables[owner]) > pages.num_free
            former, tables[owner] = tables[owner], pages.table(owner).tolist()
            assert tables[owner][: len(former)] == former
        pages.check()
        held = [page for table in tables.values() for page in table]
        assert len(set(held)) == len(held) == pages.num_used
    for owner in "abcde":
        pages.release(owner)
    assert pages.num_free == 12
