"""When the storm accepts that the kernel forced the filesystem read-only: in the named case, and in no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab.attack.storm.balance import Look, forced_read_only, looked
from storaged.core.model import Space
from storaged.units import GIB, MIB

ROOMY = Look(read_only=False, unallocated=416 * MIB, metadata_readonly=0)
MOVING = Look(read_only=False, unallocated=416 * MIB, metadata_readonly=212 * MIB)
STARVED = Look(read_only=False, unallocated=0, metadata_readonly=212 * MIB)
FULL = Look(read_only=False, unallocated=0, metadata_readonly=64 << 10)
FORCED_FULL = Look(read_only=True, unallocated=0, metadata_readonly=0)
ELSEWHERE = Look(read_only=False, unallocated=0, metadata_readonly=212 * MIB, metadata_free=16 * MIB)
FORCED_WITH_ROOM = Look(read_only=True, unallocated=416 * MIB, metadata_readonly=0)
FORCED = Look(read_only=True, unallocated=0, metadata_readonly=212 * MIB)


SPACE = Space(
    size=4 * GIB,
    device=4 * GIB,
    data_total=3 * GIB,
    data_used=3 * GIB,
    metadata_total=262 * MIB,
    metadata_used=258 * MIB,
    global_reserve=MIB,
    unallocated=0,
    data_chunk=416 * MIB,
    metadata_chunk=256 * MIB,
    metadata_copies=2,
    metadata_readonly=212 * MIB,
)


def test_what_is_looked_at() -> None:
    assert looked(SPACE) == Look(False, 0, 212 * MIB, 4 * MIB)
    assert looked(SPACE).starved
    assert looked(replace(SPACE, mixed=True)).starved, "where data and metadata share it, both are starved"
    assert not looked(replace(SPACE, mixed=True, metadata_used=240 * MIB)).starved
    assert not looked(replace(SPACE, unallocated=MIB)).starved


def test_the_named_case() -> None:
    assert forced_read_only("full-balance", [ROOMY, MOVING, STARVED, FORCED])
    assert forced_read_only("full-balance", [STARVED, FORCED, FORCED])
    assert forced_read_only("full-balance", [STARVED, FORCED_FULL]), "the balance has let go already"


@pytest.mark.parametrize(
    ("command", "looks"),
    [
        ("data-balance", [ROOMY, STARVED, FORCED]),
        ("resize", [ROOMY, STARVED, FORCED]),
        ("scrub", [ROOMY, STARVED, FORCED]),
        ("full-balance", []),
        ("full-balance", [ROOMY, MOVING, STARVED]),
        ("full-balance", [FORCED, FORCED]),
        ("full-balance", [ROOMY, MOVING, FORCED_WITH_ROOM]),
        ("full-balance", [ROOMY, STARVED, MOVING, FORCED_WITH_ROOM]),
        ("full-balance", [ROOMY, FULL, FORCED_FULL]),
        ("full-balance", [ROOMY, ELSEWHERE, FORCED_FULL]),
    ],
    ids=[
        "data alone",
        "a shrink",
        "a scrub",
        "not looked at",
        "still writable",
        "read-only before",
        "room is unallocated",
        "starved earlier",
        "metadata stays writable",
        "metadata has room in another chunk",
    ],
)
def test_anything_else_is_a_fault(command: str, looks: list[Look]) -> None:
    assert not forced_read_only(command, looks)
