"""What goes up for a moment, so that it comes back shorter: only where the way back is certain."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from storaged.resize.bounds import compute
from storaged.resize.fit import METADATA_MARGIN
from storaged.resize.layout import KERNEL_MINIMUM, Chunk, Layout, holes
from storaged.resize.pivot import WORTH_A_PIVOT, has_place, next_pivot
from storaged.units import MIB, SECTOR
from tests.resize.test_bounds import layouts

SYSTEM = Chunk(0, 8 * MIB, 16384, 0, "system", (MIB,), 8 * MIB)
LONG = 128 * MIB


def data(start: int, length: int, used: int, balloon: int = 0) -> Chunk:
    """A data chunk whose free room is in one piece; sizes in MiB."""
    free = length - used
    rooms = (free * MIB,) if free else ()
    held = (balloon * MIB,) if balloon else ()
    return Chunk(
        start * MIB, length * MIB, used * MIB, balloon * MIB, "data", (start * MIB,), length * MIB, rooms, held
    )


def metadata(start: int, length: int, used: int) -> Chunk:
    """A metadata chunk, single; sizes in MiB."""
    return Chunk(start * MIB, length * MIB, used * MIB, 0, "metadata", (start * MIB,), length * MIB)


def picture(size: int, *chunks: Chunk, device: int = 4096) -> Layout:
    """Sizes in MiB."""
    return Layout(size * MIB, device * MIB, (SYSTEM, *chunks), 2 * MIB)


def short(_: Chunk) -> int:
    """Every extent is one sector long."""
    return SECTOR


@given(layout=layouts(), longest=st.sampled_from([SECTOR, MIB, LONG]))
def test_a_pivot_gains_and_metadata_has_a_hole_made_for_it(layout: Layout, longest: int) -> None:
    pivot = next_pivot(layout, lambda chunk: min(longest, chunk.held), layout.device)
    if pivot is None:
        return
    assert layout.size <= pivot.size <= layout.device
    assert KERNEL_MINIMUM <= pivot.returns <= layout.size - WORTH_A_PIVOT
    assert pivot.chunk in layout.chunks
    assert pivot.chunk.kind in ("data", "metadata")
    assert not any(chunk.kind == "mixed" for chunk in layout.chunks)
    if any(chunk.balloon for chunk in layout.chunks):
        assert pivot.size - layout.size <= max(chunk.length for chunk in layout.chunks if chunk.kind == "data")
    if pivot.chunk.kind == "metadata":
        needed = pivot.chunk.used + layout.global_reserve + METADATA_MARGIN
        assert max(holes(layout.chunks, pivot.size)) >= len(pivot.chunk.stripes) * needed


def test_metadata_that_is_longer_than_it_need_be_goes_up_and_comes_back_shorter() -> None:
    layout = picture(700, data(9, 491, 491), metadata(500, 200, 2))
    assert compute(layout, short).minimum == layout.size
    pivot = next_pivot(layout, short, layout.device)
    assert pivot is not None
    assert pivot.chunk.kind == "metadata"
    assert pivot.size > layout.size
    assert pivot.returns <= 600 * MIB


def test_without_room_on_the_device_nothing_goes_up() -> None:
    layout = picture(700, data(9, 491, 491), metadata(500, 200, 2), device=700)
    assert next_pivot(layout, short, layout.device) is None


def test_nothing_goes_up_above_where_the_job_began() -> None:
    layout = picture(700, data(9, 491, 491), metadata(500, 200, 2))
    assert next_pivot(layout, short, layout.size) is None


def test_what_has_lost_its_place_meanwhile_stays() -> None:
    chunks = (data(9, 491, 491), metadata(500, 200, 2))
    assert has_place(picture(800, *chunks), chunks[1], short)
    assert not has_place(picture(700, *chunks), chunks[1], short)
    assert not has_place(picture(800, *chunks, data(700, 90, 10)), chunks[1], short)
    assert not has_place(picture(800, data(9, 491, 491), metadata(500, 200, 195)), chunks[1], short)
    assert not has_place(picture(800, chunks[0]), chunks[1], short)


def test_metadata_that_others_would_choke_on_stays() -> None:
    layout = picture(700, metadata(9, 8, 1), data(17, 483, 483), metadata(500, 200, 2))
    assert next_pivot(layout, short, layout.device) is None, "the kernel may put it all into the small one"


def test_metadata_that_is_short_lets_nothing_move() -> None:
    layout = picture(700, data(9, 300, 300), data(309, 191, 10), metadata(500, 200, 195))
    assert next_pivot(layout, short, layout.device) is None


def test_a_long_extent_goes_into_a_hole_once_chunks_are_as_long() -> None:
    layout = picture(1000, metadata(9, 80, 2), data(89, 260, 260), data(509, 330, 330), data(840, 160, 128))

    def longest(chunk: Chunk) -> int:
        return min(LONG, chunk.held)

    assert compute(layout, longest).minimum == layout.size, "a cut makes chunks of a tenth only"
    pivot = next_pivot(layout, longest, layout.device)
    assert pivot is not None
    assert pivot.chunk.logical == 840 * MIB
    assert pivot.size // 10 > 112 * MIB - 16 * MIB
    assert pivot.returns <= 840 * MIB
    small = replace(layout, device=layout.size)
    assert next_pivot(small, longest, small.device) is None


def test_what_only_the_balloon_holds_makes_way_for_metadata() -> None:
    layout = picture(600, data(9, 300, 300), data(309, 200, 200, 200), metadata(509, 91, 2), device=600)
    assert compute(layout, short).minimum == layout.size
    pivot = next_pivot(layout, short, layout.device)
    assert pivot is not None
    assert (pivot.chunk.logical, pivot.size) == (309 * MIB, layout.size)
    assert pivot.returns <= 309 * MIB + 96 * MIB


def test_what_a_swap_file_pins_stays() -> None:
    layout = picture(1000, metadata(9, 80, 2), data(89, 260, 260), data(509, 330, 330), data(840, 160, 128))
    pinned = replace(layout, chunks=(*layout.chunks[:-1], replace(layout.chunks[-1], pinned=True)))
    assert next_pivot(pinned, lambda chunk: min(LONG, chunk.held), pinned.device) is None
