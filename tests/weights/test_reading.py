"""Parts of files in memory that is there: every byte from its place, whatever the pieces."""

import os
import random

import pytest

from r1_cluster.weights import reading
from r1_cluster.weights.reading import FilesReader


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 64)
    made = FilesReader(tmp_path)
    yield made
    made.close()


def test_every_byte_comes_from_its_place(reader, tmp_path):
    rng = random.Random(0)
    data = rng.randbytes(5000)
    (tmp_path / "a").write_bytes(data)
    sizes = [0, 1, 63, 64, 65, 128, 1000, 5000]
    for size in sizes:
        offset = rng.randrange(5000 - size + 1)
        into = bytearray(size)
        reader.read_into("a", offset, memoryview(into))
        assert into == data[offset : offset + size]
    assert reader.num_bytes == sum(sizes)


@pytest.mark.parametrize("size", [10, 1000])
def test_a_file_that_ends_early_is_an_error(reader, tmp_path, size):
    (tmp_path / "a").write_bytes(bytes(size - 1))
    with pytest.raises(EOFError):
        reader.read_into("a", 0, memoryview(bytearray(size)))


def test_what_is_open_is_known_from_what_took_its_name(reader, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    before = reader.identity("a")
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").rename(tmp_path / "a")
    assert reader.identity("a") == before
    into = bytearray(3)
    reader.read_into("a", 0, memoryview(into))
    assert into == b"old"
    reader.close()
    assert reader.identity("a") != before


def noted(monkeypatch):
    """Makes the kernel be told of nothing; what it would have been told."""
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, size, advice: told.append((offset, size)))
    return told


def test_what_is_expected_is_announced_some_way_ahead_in_the_order_of_the_file(reader, tmp_path, monkeypatch):
    told = noted(monkeypatch)
    monkeypatch.setattr(reading, "AHEAD_BYTES", 100)
    data = random.Random(0).randbytes(1000)
    (tmp_path / "a").write_bytes(data)
    places = [("a", offset, 10) for offset in range(0, 1000, 10)]
    random.Random(0).shuffle(places)
    reader.expect(places)
    assert not told  # nothing is opened before the first read
    for i, (_, offset, size) in enumerate(places):
        into = bytearray(size)
        reader.read_into("a", offset, memoryview(into))
        assert into == data[offset : offset + size]
        if reader._pool is not None:
            reader._pool.shutdown()  # all is told now that was to be
            reader._pool = None
        assert {place[1:] for place in places[: i + 1]} <= {*told}
        assert len(told) * 10 <= i * 10 + 100
        assert len(told) * 10 >= min(1000, (i + 1) * 10 + 40)
    assert sorted(told) == sorted(place[1:] for place in places)
    assert told[:10] == sorted(told[:10])


def test_what_is_expected_of_a_file_that_is_not_there_is_told_when_it_is_read(reader, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    reader.expect([("gone", 0, 3), ("a", 0, 3)])
    into = bytearray(3)
    reader.read_into("a", 0, memoryview(into))
    assert into == b"abc"
    with pytest.raises(FileNotFoundError):
        reader.read_into("gone", 0, memoryview(into))


def test_who_reads_otherwise_than_expected_reads_the_same(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD_BYTES", 64)
    data = random.Random(0).randbytes(1000)
    (tmp_path / "a").write_bytes(data)
    reader.expect([("a", offset, 100) for offset in range(0, 1000, 200)] + [("a", 5000, 100)])
    for offset in range(900, -1, -100):
        into = bytearray(100)
        reader.read_into("a", offset, memoryview(into))
        assert into == data[offset : offset + 100]


def test_nothing_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 1)
    (tmp_path / "a").write_bytes(b"abc")
    before = len(os.listdir("/proc/self/fd"))
    reader = FilesReader(tmp_path)
    reader.read_into("a", 0, memoryview(bytearray(3)))
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
