"""What may be trimmed: every chunk with free room once, and never so much that writers find no room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storaged.core.model import Space
from storaged.core.trim import DATA_MARGIN, ChunkRange, Piece, is_safe, pieces
from storaged.units import GIB, MIB

SECTOR = 4096
CHUNK = 4 * MIB


@st.composite
def free_extents(draw: st.DrawFn) -> list[tuple[ChunkRange, int, int]]:
    """Free extents of several chunks in order; some touch each other."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        chunk = ChunkRange(number * CHUNK, CHUNK, draw(st.sampled_from(["data", "metadata", "mixed"])))
        at = chunk.start
        for gap, sectors in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), max_size=12)):
            start = at + gap * SECTOR
            length = min(sectors * SECTOR, chunk.start + CHUNK - start)
            if length > 0:
                found.append((chunk, start, length))
                at = start + length
    return found


def space(available: int, *, size: int = 10 * GIB, headroom: int = GIB) -> Space:
    return Space(size, size, available + GIB, GIB, headroom + GIB, 0, GIB, 0, GIB, GIB // 4)


def data(length: int, free: int | None = None) -> Piece:
    return Piece(ChunkRange(0, GIB, "data"), free if free is not None else length, length)


@given(free_extents())
def test_every_chunk_with_free_room_is_discarded_once(extents: list[tuple[ChunkRange, int, int]]) -> None:
    calls = list(pieces(extents))
    assert [call.chunk for call in calls] == sorted({chunk for chunk, _, _ in extents}, key=lambda chunk: chunk.start)
    assert sum(call.free for call in calls) == sum(length for _, _, length in extents)


@given(free_extents())
def test_a_call_holds_back_no_more_than_it_says(extents: list[tuple[ChunkRange, int, int]]) -> None:
    for call in pieces(extents):
        free = {
            sector
            for chunk, start, length in extents
            if chunk == call.chunk
            for sector in range(start // SECTOR, (start + length) // SECTOR)
        }
        longest = run = 0
        for sector in sorted(free):
            run = run + 1 if sector - 1 in free else 1
            longest = max(longest, run)
        assert call.held == longest * SECTOR


@given(st.integers(0, 4 * GIB), st.integers(1, GIB), st.integers(0, GIB))
def test_applications_may_take_as_much_as_is_discarded(available: int, held: int, more: int) -> None:
    safe = is_safe(data(held, held + more), space(available))
    assert safe == (available - held >= max(held + more, DATA_MARGIN))


def test_small_filesystems_are_trimmed_too() -> None:
    assert is_safe(data(16 * MIB), space(48 * MIB, size=GIB // 2))
    assert not is_safe(data(16 * MIB), space(47 * MIB, size=GIB // 2))


def test_metadata_is_left_more_than_the_kernels_reserve() -> None:
    piece = Piece(ChunkRange(0, GIB // 4, "metadata"), 32 * MIB, 32 * MIB)
    assert is_safe(piece, space(0, headroom=48 * MIB))
    assert not is_safe(piece, space(GIB, headroom=47 * MIB))


def test_where_both_lie_both_must_have_room() -> None:
    piece = Piece(ChunkRange(0, GIB // 4, "mixed"), 32 * MIB, 32 * MIB)
    assert is_safe(piece, space(GIB, headroom=GIB))
    assert not is_safe(piece, space(GIB, headroom=0))
    assert not is_safe(piece, space(0, headroom=GIB))


def test_what_is_unknown_is_left_alone() -> None:
    assert not is_safe(Piece(ChunkRange(0, 8 * MIB, "system"), SECTOR, SECTOR), space(GIB))
