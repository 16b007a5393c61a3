"""Which pages of the KV cache belong to whom.

One allocator serves all stages of an engine: page p means row p of every layer's cache on every stage.
"""

from __future__ import annotations

from array import array


class OutOfPages(Exception):
    """Fewer pages are free than were asked for; nothing was allocated."""


class PageAllocator:
    """Hands out pages of `page_size` tokens each, by number, and keeps each owner's table of them."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._tables: dict[str, array[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def table(self, owner: str) -> array[int]:
        """`owner`'s pages, in the order of its tokens."""
        return self._tables.get(owner, array("i"))

    def grow(self, owner: str, num_tokens: int) -> None:
        """Makes `owner`'s pages hold `num_tokens` tokens. Raises OutOfPages."""
        missing = self.pages_for(num_tokens) - len(self.table(owner))
        if missing <= 0:
            return
        if missing > len(self._free):
            raise OutOfPages(f"{missing} pages are needed, {len(self._free)} of {self.num_pages} are free")
        table = self._tables.setdefault(owner, array("i"))
        table.extend(self._free.pop() for _ in range(missing))

    def claim(self, owner: str, pages: list[int]) -> None:
        """Gives `owner` these very pages, which must be free; raises OutOfPages if one is not."""
        wanted = set(pages)
        free = [page for page in self._free if page not in wanted]
        if len(free) + len(pages) != len(self._free) or owner in self._tables:
            raise OutOfPages(f"pages that {owner} held are no longer free")
        self._free = free
        if pages:
            self._tables[owner] = array("i", pages)

    def release(self, owner: str) -> None:
        """Frees all pages of `owner`; an owner without pages is fine."""
        self._free.extend(reversed(self._tables.pop(owner, array("i"))))

    def check(self) -> None:
        """Raises AssertionError unless every page is free or owned, exactly once."""
        pages = [*self._free, *(page for held in self._tables.values() for page in held)]
        assert len(pages) == self.num_pages, f"{self.num_pages} pages, {len(pages)} accounted for"
        assert set(pages) == set(range(self.num_pages)), "a page is listed twice, another is lost"
        assert all(self._tables.values()), "an owner without pages is listed"
