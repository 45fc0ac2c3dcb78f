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
