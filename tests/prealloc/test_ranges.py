"""The pure parts of the scan for unwritten extents: ranges, and keys in order."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from storaged.btrfs.prealloc_worker import LARGEST, RANGE, following, outside, union, unpack, without

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12)


def _bytes(ranges: list[tuple[int, int]]) -> set[int]:
    return {at for start, length in ranges for at in range(start, start + length)}


@given(RANGES)
def test_a_union_is_disjoint_in_order_and_covers_the_same_bytes(ranges: list[tuple[int, int]]) -> None:
    joined = union(ranges)
    assert _bytes([(start, end - start) for start, end in joined]) == _bytes(ranges)
    assert all(start < end for start, end in joined)
    assert all(end < start for (_, end), (start, _) in pairwise(joined))


@given(RANGES, RANGES)
def test_outside_counts_the_bytes_in_the_first_alone(
    ours: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    assert outside(union(ours), union(others)) == len(_bytes(ours) - _bytes(others))


@given(RANGES, RANGES)
def test_without_keeps_the_bytes_in_the_first_alone(ours: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    left = without(union(ours), union(others))
    assert _bytes([(start, end - start) for start, end in left]) == _bytes(ours) - _bytes(others)
    assert all(start < end for start, end in left)


def test_ranges_at_the_end_of_the_address_space() -> None:
    assert union([(LARGEST - 4095, 4096), (LARGEST - 8191, 4096)]) == [(LARGEST - 8191, LARGEST + 1)]


def test_equal_pieces_are_unpacked_once() -> None:
    piece = RANGE.pack(4096, 8192) + RANGE.pack(1 << 40, 4096)
    assert list(unpack([piece, bytes(bytearray(piece)), RANGE.pack(0, 4096)])).count((1 << 40, 4096)) == 1
    assert not list(unpack([]))


def test_keys_follow_each_other_over_every_edge() -> None:
    assert following((256, 108, 0)) == (256, 108, 1)
    assert following((256, 108, LARGEST)) == (256, 109, 0)
    assert following((256, 255, LARGEST)) == (257, 0, 0)
    assert following((LARGEST, 255, LARGEST)) is None
