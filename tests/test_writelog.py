"""The write log: what is read from it, and what a disk may hold after a power cut."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from lab import writelog
from lab.writelog import DISCARD, FLUSH, LOG_SECTOR, MAGIC, MARK, Entry, Replay

SIZE = 256 * 1024


def _log(path: Path, *requests: tuple[int, int, int, bytes], tail: bytes = b"") -> Path:
    """A log of (sector, sectors, flags, data), as dm-log-writes lays it out."""
    sectors = [struct.pack("<QQQI", MAGIC, 1, len(requests), LOG_SECTOR)]
    for first, count, flags, data in requests:
        sectors += [struct.pack("<QQQQ", first, count, flags, len(data) if flags & MARK else 0), data]
    padded = b"".join(part + bytes(-len(part) % LOG_SECTOR) for part in sectors)
    path.write_bytes(padded + tail)
    return path


def test_entries_are_read_in_order_with_their_data(tmp_path: Path) -> None:
    log = _log(
        tmp_path / "log",
        (8, 2, 0, b"a" * 1024),
        (0, 0, FLUSH, b""),
        (64, 16, DISCARD, b""),
        (0, 0, MARK, b"m" * LOG_SECTOR),
        (100, 1, 0, b"b" * 512),
    )
    found = list(writelog.entries(log))
    assert [(entry.offset, entry.length, entry.flags) for entry in found] == [
        (4096, 1024, 0),
        (0, 0, FLUSH),
        (32768, 8192, DISCARD),
        (0, 0, MARK),
        (51200, 512, 0),
    ]
    assert [entry.flushes for entry in found] == [False, True, False, False, False]
    assert found[-1].end == log.stat().st_size
    assert log.read_bytes()[found[-1].data : found[-1].end] == b"b" * 512


@pytest.mark.parametrize("tail", [bytes(4096), struct.pack("<QQQQ", 0, 8, 0, 0) + bytes(480 + 512)])
def test_what_was_not_logged_to_its_end_does_not_count(tail: bytes, tmp_path: Path) -> None:
    log = _log(tmp_path / "log", (8, 1, 0, b"a" * 512), tail=tail)
    assert len(list(writelog.entries(log))) == 1


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="not a write log"):
        list(writelog.entries(tmp_path / "log"))


def test_replay_makes_the_disk_as_it_was(tmp_path: Path) -> None:
    log = _log(tmp_path / "log", (8, 16, 0, b"a" * 8192), (16, 8, DISCARD, b""), (8, 1, 0, b"c" * 512))
    image = tmp_path / "image"
    image.write_bytes(b"." * SIZE)
    found = list(writelog.entries(log))
    with Replay(log, image) as replay:
        replay.apply(found[0])
        with replay.copy_to(tmp_path / "copy") as copy:
            copy.apply(found[1])
            copy.apply(found[2], 256)
    assert image.read_bytes() == b"." * 4096 + b"a" * 8192 + b"." * (SIZE - 12288)
    expected = b"." * 4096 + b"c" * 256 + b"a" * 3840 + bytes(4096) + b"." * (SIZE - 12288)
    assert (tmp_path / "copy").read_bytes() == expected


def test_a_torn_state_is_a_part_in_order_cut_at_sectors() -> None:
    window = [Entry(number * 65536, 65536, 0, 0, number) for number in range(40)]
    states = [writelog.torn(window, random.Random(seed)) for seed in range(60)]
    for state in states:
        ends = [entry.end for entry, _ in state]
        assert ends == sorted(set(ends))
        assert all(cut is None or (0 < cut < 65536 and cut % 4096 == 0) for _, cut in state)
    sizes = [len(state) for state in states]
    assert min(sizes) < 10
    assert max(sizes) > 30
    assert any(cut is not None for state in states for _, cut in state)


def test_sizes_are_those_of_the_superblocks(tmp_path: Path) -> None:
    def superblock(size: int) -> bytes:
        block = bytearray(4096)
        block[0x40:0x48] = b"_BHRfS_M"
        block[0x70:0x78] = size.to_bytes(8, "little")
        return bytes(block)

    log = _log(
        tmp_path / "log",
        (128, 8, 0, superblock(1000)),
        (128, 8, 0, superblock(1000)),
        (131072, 8, 0, superblock(7)),  # the copy at 64 MiB does not count
        (128, 8, 0, superblock(2000)),
    )
    found = list(writelog.entries(log))
    assert writelog.committed_sizes(log, found) == [(found[0].end, 1000), (found[3].end, 2000)]
