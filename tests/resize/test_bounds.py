"""How small it gets and by which steps: from any layout, never below what somebody's data holds."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from storaged.resize.bounds import compute
from storaged.resize.fit import Step, certain_room, fit, next_step, obstacle
from storaged.resize.layout import FIRST_USABLE, KERNEL_MINIMUM, Chunk, Layout, holes, left_to_move, with_balloon
from storaged.units import GIB, MIB, SECTOR, sector_ceil


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Chunks and holes up the device, DUP or single, with and without a balloon in them."""
    at = MIB
    chunks: list[Chunk] = []
    logical = 0
    for number in range(draw(st.integers(1, 12))):
        at += draw(st.sampled_from([0, 0, MIB, 64 * MIB, 3 * 65536]))
        kind = "system" if number == 0 else draw(st.sampled_from(["data"] * 8 + ["metadata", "metadata", "mixed"]))
        length = draw(st.integers(1, 4096)) * 65536
        stripes: tuple[int, ...] = (at,)
        at += length
        if draw(st.integers(0, 4)) == 0:
            at += draw(st.sampled_from([0, 8 * MIB]))
            stripes = (*stripes, at)
            at += length
        used = draw(st.sampled_from([0, length, length // 2 // SECTOR * SECTOR]))
        balloon = draw(st.sampled_from([0, used, used, used // 2 // SECTOR * SECTOR])) if kind == "data" else 0
        rooms = (length - used,) if kind == "data" and used < length else ()
        held = (balloon,) if balloon else ()
        chunks.append(Chunk(logical, length, used, balloon, kind, stripes, length, rooms, held))
        logical += length + draw(st.sampled_from([0, GIB]))
    size = max(sector_ceil(at), KERNEL_MINIMUM) + draw(st.integers(0, 1000)) * SECTOR
    return Layout(size, size + draw(st.sampled_from([0, GIB])), tuple(draw(st.permutations(chunks))))


def a_sector(_: Chunk) -> int:
    """Every extent is one sector long."""
    return SECTOR


def walk(layout: Layout, target: int) -> tuple[list[Step], Layout]:
    """The steps to `target`, with a kernel that moves nothing because nothing has to move; and what is left."""
    steps = []
    size = layout.size
    while size > target:
        step = next_step(layout, target, a_sector)
        assert target <= step.size < size, "every step goes down"
        assert not step.blocked
        steps.append(step)
        size = step.size
        gone = {chunk.logical for chunk in step.vacate}
        assert not any(c.used and c.top > size and c.logical not in gone for c in layout.chunks), "nothing is cut off"
        layout = replace(
            layout, size=size, chunks=tuple(c for c in layout.chunks if c.top <= size and c.logical not in gone)
        )
    return steps, layout


@given(layout=layouts())
def test_nothing_that_anybody_but_the_balloon_holds_lies_above_the_guaranteed_bound(layout: Layout) -> None:
    bound = guaranteed(layout)
    assert bound % SECTOR == 0
    assert KERNEL_MINIMUM <= bound <= layout.size
    for chunk in layout.chunks:
        if chunk.kind in ("metadata", "system") or chunk.used > chunk.balloon:
            assert chunk.top <= bound


def guaranteed(layout: Layout) -> int:
    """The bound below which something has to move."""
    return compute(layout, a_sector).guaranteed


@given(layout=layouts())
def test_evacuation_reaches_at_least_what_is_guaranteed(layout: Layout) -> None:
    bounds = compute(layout, a_sector)
    assert KERNEL_MINIMUM <= bounds.minimum <= bounds.guaranteed
    assert bounds.minimum % SECTOR == 0
    assert bounds.why


@given(layout=layouts())
def test_where_no_extent_fits_anywhere_nothing_below_the_guaranteed_is_promised_for_data(layout: Layout) -> None:
    layout = replace(layout, chunks=tuple(c for c in layout.chunks if c.kind in ("data", "system")))
    bounds = compute(layout, lambda _: 1 << 60)
    moved = [chunk for chunk in layout.chunks if chunk.top > bounds.minimum and chunk.held and chunk.kind == "data"]
    assert not moved


@given(layout=layouts(), share=st.floats(0, 1))
def test_the_steps_to_a_guaranteed_size_move_nothing_and_vacate_each_chunk_once(layout: Layout, share: float) -> None:
    minimum = guaranteed(layout)
    target = minimum + int((layout.size - minimum) * share) // SECTOR * SECTOR
    assert left_to_move(layout, target) == 0
    steps, _ = walk(layout, target)
    vacated = [chunk for step in steps for chunk in step.vacate]
    assert len({chunk.logical for chunk in vacated}) == len(vacated)
    assert sum(c.balloon for c in vacated) == sum(c.balloon for c in layout.chunks if c.top > target)
    assert all(len(step.vacate) <= 1 for step in steps), "one chunk at a time: what is available does not jump"
    assert all(step.moves == 0 for step in steps)


def every_cut(layout: Layout, longest: dict[int, int]) -> tuple[int, int]:
    """Minimum and guaranteed by judging the cut below each chunk, one after the other."""
    ordered = sorted(layout.chunks, key=lambda chunk: chunk.top, reverse=True)
    best = sure = layout.size
    for count in range(len(ordered) + 1):
        moving, staying = ordered[:count], ordered[count:]
        reach = max((longest[c.logical] for c in moving if c.held and c.kind == "data"), default=0)
        size, _ = fit(layout, moving, staying, reach)
        if size < best and not next_step(layout, size, lambda chunk: longest[chunk.logical]).blocked:
            best = size
        if all(chunk.vacant for chunk in moving):
            sure = min(sure, size)
    return best, sure


@given(layout=layouts(), dice=st.randoms(use_true_random=False))
def test_no_cut_that_fits_is_overlooked(layout: Layout, dice: random.Random) -> None:
    longest = {c.logical: dice.choice([SECTOR, c.held, c.held // 3 + SECTOR, 1 << 40]) for c in layout.chunks}
    bounds = compute(layout, lambda chunk: longest[chunk.logical])
    assert (bounds.minimum, bounds.guaranteed) == every_cut(layout, longest)
    assert bounds.why


@given(layout=layouts(), longest=st.sampled_from([SECTOR, MIB, 128 * MIB]))
def test_the_first_step_to_what_is_promised_is_never_blocked(layout: Layout, longest: int) -> None:
    minimum = compute(layout, lambda chunk: min(longest, chunk.held)).minimum
    assert minimum == layout.size or not next_step(layout, minimum, lambda chunk: min(longest, chunk.held)).blocked


def test_a_size_whose_first_step_is_blocked_is_not_promised() -> None:
    # A new metadata chunk is a tenth of the size that the call asks for, and that is large at first.
    system = Chunk(0, 8 * MIB, 16384, 0, "system", (MIB, 9 * MIB), 8 * MIB)
    low = chunk(10 * MIB, 512 * MIB, 273 * MIB, used=5 * MIB)
    up = chunk(600 * MIB, 300 * MIB, 885 * MIB, used=270 * MIB)
    metadata = Chunk(1000 * MIB, 64 * MIB, 2 * MIB, 0, "metadata", (1185 * MIB, 1249 * MIB), 64 * MIB)
    layout = Layout(1513 * MIB, 2 * GIB, (system, low, up, metadata), 4 * MIB)
    size, _ = fit(layout, [metadata, up], [low, system], SECTOR)
    assert next_step(layout, size, a_sector).blocked
    assert not next_step(layout, compute(layout, a_sector).minimum, a_sector).blocked
    assert size < compute(layout, a_sector).minimum < layout.size


@given(layout=layouts())
def test_each_chunk_is_asked_for_its_longest_extent_at_most_once(layout: Layout) -> None:
    asked: list[int] = []

    def longest(chunk: Chunk) -> int:
        asked.append(chunk.logical)
        return SECTOR

    compute(layout, longest)
    assert len(asked) == len(set(asked))


@given(layout=layouts())
def test_a_step_that_cannot_be_certain_says_so(layout: Layout) -> None:
    step = next_step(layout, KERNEL_MINIMUM, lambda _: 1 << 60)
    if step.moves:
        top = max((c for c in layout.chunks if c.used or c.kind != "data"), key=lambda c: c.top)
        assert step.blocked or top.kind != "data"


def chunk(logical: int, length: int, start: int, *, used: int = 0, balloon: int = 0, kind: str = "data") -> Chunk:
    rooms = (length - used,) if kind == "data" and used < length else ()
    return Chunk(logical, length, used, balloon, kind, (start,), length, rooms, (balloon,) if balloon else ())


def test_a_balloon_is_no_obstacle_and_a_byte_beside_it_is() -> None:
    low = chunk(0, 300 * MIB, MIB, used=MIB, kind="metadata")
    first = chunk(9 * GIB, 8 * MIB, 301 * MIB)
    top = chunk(GIB, GIB, 2 * GIB, used=GIB, balloon=GIB)
    assert guaranteed(Layout(8 * GIB, 8 * GIB, (low, first, top))) == 309 * MIB
    shared = replace(top, balloon=GIB - SECTOR)
    assert guaranteed(Layout(8 * GIB, 8 * GIB, (low, first, shared))) == 3 * GIB


def test_the_last_data_chunk_goes_only_where_another_can_be_made() -> None:
    low = chunk(0, 300 * MIB, MIB, used=MIB, kind="metadata")
    last = chunk(GIB, GIB, 2 * GIB, used=GIB, balloon=GIB)
    layout = Layout(8 * GIB, 8 * GIB, (low, last))
    bounds = compute(layout, a_sector)
    # The kernel makes no chunk while all of them take as much as the new size.
    assert bounds.minimum == bounds.guaranteed == 300 * MIB + GIB + 2 * MIB
    assert not next_step(layout, bounds.minimum, a_sector).blocked
    assert "last one" in next_step(layout, bounds.minimum - SECTOR, a_sector).blocked
    kept = replace(layout, chunks=(low, replace(last, stripes=(301 * MIB,))))
    assert compute(kept, a_sector).minimum == 301 * MIB + GIB


def test_no_new_chunk_is_counted_on_while_all_chunks_together_fill_the_new_size() -> None:
    metadata = chunk(0, 256 * MIB, MIB, used=MIB, kind="metadata")
    for hole, fits in ((100 * MIB, False), (300 * MIB, True)):
        full = chunk(GIB, GIB, 257 * MIB + hole, used=GIB)
        # Both holes are longer than what moves; the smaller one is not longer than the chunk that it moves out of.
        top = chunk(2 * GIB, 200 * MIB, full.top, used=50 * MIB)
        layout = Layout(2 * GIB, 2 * GIB, (metadata, full, top))
        assert compute(layout, a_sector).minimum == (full.top if fits else top.top)
        assert (next_step(layout, full.top, a_sector).blocked == "") is fits


def test_one_call_counts_all_that_still_has_to_move() -> None:
    # Metadata's turn comes second: what is below it has its place then, and the kernel makes no new chunk.
    up = chunk(533 * MIB, 96 * MIB, 533 * MIB, used=40 * MIB)
    metadata = chunk(469 * MIB, 64 * MIB, 469 * MIB, used=2 * MIB, kind="metadata")
    down = chunk(360 * MIB, 100 * MIB, 360 * MIB, used=20 * MIB)
    low = chunk(5 * MIB, 220 * MIB, 5 * MIB, used=100 * MIB)
    layout = Layout(629 * MIB, GIB, (low, down, metadata, up), 2 * MIB)
    assert not obstacle(layout, [up, metadata, down], [low], 350 * MIB, SECTOR)
    assert "no hole" in obstacle(layout, [metadata, down], [low], 350 * MIB, SECTOR, one_call=True)


def test_not_even_an_empty_chunk_goes_where_metadata_has_nothing_to_reserve() -> None:
    # As `mkfs.btrfs -m single` makes it, once data has taken all the rest.
    metadata = chunk(0, 8 * MIB, 5 * MIB, used=MIB, kind="metadata")
    low = chunk(20 * MIB, 400 * MIB, 13 * MIB, used=400 * MIB)
    empty = chunk(500 * MIB, 99 * MIB, 413 * MIB)
    for reserve, fits in ((2 * MIB, True), (5 * MIB, False)):
        layout = Layout(512 * MIB, GIB, (metadata, low, empty), reserve)
        assert (compute(layout, a_sector).minimum < 512 * MIB) is fits
        blocked = obstacle(layout, [empty], [metadata, low], 413 * MIB, SECTOR)
        assert ("metadata has 2097152 bytes beside the kernel's reserve" in blocked) is not fits


def test_data_that_goes_first_may_take_the_hole_of_metadata() -> None:
    up = chunk(300 * MIB, 30 * MIB, 400 * MIB, used=20 * MIB)
    metadata = chunk(200 * MIB, 40 * MIB, 350 * MIB, used=2 * MIB, kind="metadata")
    low = chunk(5 * MIB, 100 * MIB, 5 * MIB, used=100 * MIB)
    layout = Layout(430 * MIB, GIB, (low, metadata, up), 2 * MIB)
    assert not obstacle(layout, [up, metadata], [low], 350 * MIB, SECTOR)
    assert "may take" in obstacle(layout, [up, metadata], [low], 350 * MIB, SECTOR, one_call=True)
    below = replace(up, stripes=(310 * MIB,))
    assert not obstacle(layout, [metadata, below], [low], 310 * MIB, SECTOR, one_call=True)


def test_data_that_fits_below_is_moved_there() -> None:
    metadata = chunk(0, 256 * MIB, MIB, used=MIB, kind="metadata")
    low = chunk(GIB, GIB, 257 * MIB, used=GIB // 2)
    top = chunk(2 * GIB, GIB, 4 * GIB, used=GIB // 4)
    layout = Layout(8 * GIB, 8 * GIB, (metadata, low, top))
    bounds = compute(layout, a_sector)
    assert bounds.guaranteed == 5 * GIB
    assert bounds.minimum == 257 * MIB + GIB
    step = next_step(layout, bounds.minimum, a_sector)
    assert (step.size, step.moves, step.blocked) == (bounds.minimum, GIB // 4, "")
    assert left_to_move(layout, bounds.minimum) == GIB // 4


def test_an_extent_longer_than_every_piece_of_room_stays() -> None:
    metadata = chunk(0, 256 * MIB, MIB, used=MIB, kind="metadata")
    low = chunk(GIB, GIB, 257 * MIB, used=GIB // 2)
    low = replace(low, rooms=(64 * MIB,) * 8)
    top = chunk(2 * GIB, GIB, 257 * MIB + GIB, used=GIB // 4)
    layout = Layout(8 * GIB, 8 * GIB, (metadata, low, top))
    for longest, fits in ((SECTOR, True), (63 * MIB, False), (64 * MIB, False), (128 * MIB, False)):
        minimum = compute(layout, lambda _, most=longest: most).minimum  # type: ignore[misc]  # a default binds it
        assert (minimum < layout.chunks[2].top) is fits


def test_the_last_extent_needs_only_one_piece() -> None:
    metadata = chunk(0, 256 * MIB, MIB, used=MIB, kind="metadata")
    low = replace(chunk(GIB, GIB, 257 * MIB, used=GIB - 130 * MIB), rooms=(130 * MIB,))
    top = chunk(2 * GIB, GIB, 257 * MIB + GIB, used=128 * MIB)
    layout = Layout(8 * GIB, 8 * GIB, (metadata, low, top))
    assert compute(layout, lambda _: 128 * MIB).minimum == 257 * MIB + GIB
    more = replace(layout, chunks=(metadata, low, replace(top, used=131 * MIB)))
    assert compute(more, lambda _: 128 * MIB).minimum == top.top


def test_what_the_balloon_holds_below_is_room_too() -> None:
    metadata = chunk(0, 256 * MIB, MIB, used=MIB, kind="metadata")
    low = chunk(GIB, GIB, 257 * MIB, used=GIB, balloon=GIB)
    top = chunk(2 * GIB, GIB, 4 * GIB, used=GIB // 4)
    layout = Layout(8 * GIB, 8 * GIB, (metadata, low, top))
    assert compute(layout, a_sector).minimum < 4 * GIB
    assert next_step(layout, 2 * GIB, a_sector).blocked == ""


def test_mixed_chunks_go_only_where_the_balloon_alone_holds_them() -> None:
    chunks = [chunk(n * GIB, GIB, n * GIB + MIB, used=GIB, balloon=GIB, kind="mixed") for n in range(1, 4)]
    low = chunk(0, 256 * MIB, MIB, used=MIB, kind="mixed")
    assert compute(Layout(8 * GIB, 8 * GIB, (low, *chunks)), a_sector).minimum == 257 * MIB
    held = replace(chunks[1], balloon=GIB - SECTOR)
    assert compute(Layout(8 * GIB, 8 * GIB, (low, chunks[0], held, chunks[2])), a_sector).minimum == held.top
    full = replace(low, used=low.length)
    bounds = compute(Layout(8 * GIB, 8 * GIB, (full, *chunks), 4 * MIB), a_sector)
    assert bounds.minimum >= 257 * MIB + 12 * MIB, "room for metadata stays"


def test_mixed_chunks_stay() -> None:
    layout = Layout(8 * GIB, 8 * GIB, (chunk(0, 256 * MIB, 4 * GIB, used=MIB, kind="mixed"),))
    assert compute(layout, a_sector).minimum == 4 * GIB + 256 * MIB
    assert "mixes" in next_step(layout, GIB, a_sector).blocked


def test_metadata_moves_only_where_a_new_chunk_or_the_others_have_room() -> None:
    top = chunk(0, 256 * MIB, 4 * GIB, used=100 * MIB, kind="metadata")
    full = chunk(GIB, 3 * GIB, MIB, used=3 * GIB)
    layout = Layout(8 * GIB, 8 * GIB, (full, top), global_reserve=5 * MIB)
    assert compute(layout, a_sector).minimum >= 3 * GIB + 257 * MIB, "room for a new chunk stays"
    near = replace(layout, chunks=(full, replace(top, stripes=(3 * GIB + 2 * MIB,))))
    assert compute(near, a_sector).minimum == near.chunks[1].top
    assert "no hole" in next_step(near, 3 * GIB + MIB, a_sector).blocked


def test_the_second_copy_counts() -> None:
    dup = Chunk(0, 64 * MIB, MIB, 0, "metadata", (MIB, GIB), 64 * MIB)
    assert guaranteed(Layout(8 * GIB, 8 * GIB, (dup,))) == GIB + 64 * MIB


def test_nothing_goes_below_what_the_kernel_takes() -> None:
    low = (chunk(0, 8 * MIB, MIB, used=MIB, kind="system"), chunk(GIB, 100 * MIB, 9 * MIB, kind="metadata"))
    bounds = compute(Layout(8 * GIB, 8 * GIB, low), a_sector)
    assert (bounds.minimum, bounds.guaranteed) == (KERNEL_MINIMUM, KERNEL_MINIMUM)


def test_each_step_cuts_what_it_vacated() -> None:
    chunks = tuple(chunk(n * GIB, GIB, (n + 1) * GIB, used=GIB, balloon=GIB) for n in range(3))
    first = chunk(9 * GIB, 8 * MIB, MIB)
    steps, _ = walk(Layout(8 * GIB, 8 * GIB, (first, *chunks)), GIB)
    assert [(step.size, step.vacate) for step in steps] == [
        (3 * GIB, (chunks[2],)),
        (2 * GIB, (chunks[1],)),
        (GIB, (chunks[0],)),
    ]


def test_without_anything_above_one_step_does() -> None:
    (only,), _ = walk(Layout(8 * GIB, 8 * GIB, (chunk(0, GIB, MIB, used=GIB), chunk(GIB, GIB, 4 * GIB))), 2 * GIB)
    assert (only.size, only.vacate) == (2 * GIB, ())


@given(
    pieces=st.lists(st.integers(1, 40), max_size=6),
    longest=st.integers(1, 20),
    data=st.data(),
)
def test_what_is_called_certain_fits_in_whatever_order(pieces: list[int], longest: int, data: st.DataObject) -> None:
    """Sizes in sectors: extents go one after the other into any piece that is long enough.

    As long as less than the certain room was moved before it, each of them fits.
    """
    certain = certain_room((piece * SECTOR for piece in pieces), longest * SECTOR) // SECTOR
    left = list(pieces)
    while certain > 0:
        extent = data.draw(st.integers(1, longest))
        fitting = [index for index, piece in enumerate(left) if piece >= extent]
        assert fitting, f"an extent of {extent} finds no room in {left}"
        left[data.draw(st.sampled_from(fitting))] -= extent
        certain -= extent


@given(layout=layouts(), share=st.floats(0, 1))
def test_holes_are_what_no_stripe_covers(layout: Layout, share: float) -> None:
    size = int(layout.size * share)
    stripes = [(start, start + c.stripe_length) for c in layout.chunks for start in c.stripes]
    covered = sum(max(min(end, size) - max(start, FIRST_USABLE), 0) for start, end in stripes)
    assert sum(holes(layout.chunks, size)) == max(size - FIRST_USABLE, 0) - covered
    assert all(hole > 0 for hole in holes(layout.chunks, size))


def test_extents_in_any_order_add_up_and_those_outside_count_nowhere() -> None:
    chunks = (chunk(0, GIB, 0, used=GIB), chunk(3 * GIB, GIB, GIB, used=GIB))
    held = with_balloon(reversed(chunks), [(3 * GIB + 5, 10), (0, 7), (20, 3), (GIB, GIB), (9 * GIB, 1)])
    assert [c.balloon for c in held] == [10, 10]
    assert [c.balloon_rooms for c in held] == [(7, 3), (10,)]
    assert [c.logical for c in held] == [0, 3 * GIB]


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=8),
    data=st.data(),
)
def test_each_extent_of_the_balloon_counts_in_its_chunk(lengths: list[int], data: st.DataObject) -> None:
    chunks, extents, expected, at = [], [], [], 0
    for length in lengths:
        chunks.append(chunk(at, length, at, used=length))
        place, mine = at, []
        while place < at + length:
            extent = data.draw(st.integers(1, at + length - place))
            if data.draw(st.booleans()):
                mine.append((place, extent))
            place += extent
        extents += mine
        expected.append(sum(extent for _, extent in mine))
        at += length + data.draw(st.integers(0, 3))
    assert [c.balloon for c in with_balloon(chunks, data.draw(st.permutations(extents)))] == expected


def test_a_balloon_never_counts_more_than_the_chunk_says_is_used() -> None:
    (held,) = with_balloon([chunk(0, GIB, 0, used=MIB)], [(0, GIB)])
    assert held.balloon == MIB
