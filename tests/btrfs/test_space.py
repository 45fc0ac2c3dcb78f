"""What is used, read from several files of the kernel while it moves from one to the next."""

from __future__ import annotations

import pytest

from storaged.btrfs.filesystem import READS, BtrfsFilesystem
from storaged.units import GIB, MIB


class Counters(BtrfsFilesystem):
    """The kernel's counters; `moves`: bytes that go from reserved to used before the read of that number."""

    def __init__(self, moves: dict[int, int]) -> None:
        self.values = {"bytes_used": GIB, "bytes_reserved": 4 * GIB, "bytes_may_use": 8 * MIB}
        self.moves = moves
        self.reads = 0

    def _number(self, name: str) -> int:
        moved = self.moves.get(self.reads, 0)
        self.values["bytes_used"] += moved
        self.values["bytes_reserved"] -= moved
        self.reads += 1
        return self.values[name.rpartition("/")[2]]


@pytest.mark.parametrize("at", range(5))
def test_what_moves_on_while_it_is_read_is_not_missing(at: int) -> None:
    assert Counters({at: 4 * GIB})._used("allocation/data") == 5 * GIB + 8 * MIB


def test_where_it_never_stands_still_it_is_rather_too_little() -> None:
    counters = Counters(dict.fromkeys(range(1, 99), 8 * MIB))
    assert 5 * GIB - 24 * MIB < counters._used("allocation/data") <= 5 * GIB + 8 * MIB
    assert counters.reads == 1 + 3 * READS


def test_a_chunk_that_is_made_while_it_is_read_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads before and after each other, of one chunk that comes in between."""
    fs = BtrfsFilesystem.__new__(BtrfsFilesystem)
    allocated = iter([(2 * GIB, GIB), (3 * GIB, 2 * GIB), (3 * GIB, 2 * GIB)])
    found = iter(["torn", "whole"])
    monkeypatch.setattr(fs, "_allocated", lambda: next(allocated))
    monkeypatch.setattr(fs, "_space", lambda: next(found))
    assert fs.space() == "whole"  # type: ignore[comparison-overlap]  # what is in it does not matter
