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


def test_nothing_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 1)
    (tmp_path / "a").write_bytes(b"abc")
    before = len(os.listdir("/proc/self/fd"))
    reader = FilesReader(tmp_path)
    reader.read_into("a", 0, memoryview(bytearray(3)))
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
