"""What is said of a balance that storaged did not start."""

from __future__ import annotations

from dataclasses import replace

from storaged.balloon.balance import starves_metadata, warning
from storaged.core.model import Space
from storaged.units import GIB, MIB

BALANCED = Space(
    size=4 * GIB,
    device=4 * GIB,
    data_total=2 * GIB,
    data_used=2 * GIB,
    metadata_total=256 * MIB,
    metadata_used=44 * MIB,
    global_reserve=5 * MIB,
    unallocated=512 * MIB,
    data_chunk=416 * MIB,
    metadata_chunk=256 * MIB,
    metadata_copies=2,
    exclusive_operation="balance",
)
SHORT = replace(BALANCED, unallocated=512 * MIB - 1)


def test_metadata_is_starved_below_one_chunk_with_its_copies() -> None:
    assert not starves_metadata(BALANCED)
    assert starves_metadata(SHORT)
    assert not starves_metadata(replace(SHORT, metadata_copies=1))
    assert not starves_metadata(replace(SHORT, mixed=True))


def test_the_danger_for_metadata_is_told_only_where_there_is_one() -> None:
    assert "can grow by up to 1.00 GiB" in warning(BALANCED, GIB)
    assert "read-only" not in warning(BALANCED, GIB)
    told = warning(SHORT, GIB)
    assert "can grow by up to 1.00 GiB" in told
    assert "a metadata chunk (512 MiB) is unallocated" in told
    assert "force the filesystem read-only" in told


def test_nothing_is_said_without_a_balance_or_without_a_balloon() -> None:
    assert warning(replace(SHORT, exclusive_operation="none"), GIB) == ""
    assert warning(replace(SHORT, exclusive_operation="resize"), GIB) == ""
    assert warning(SHORT, 0) == ""
