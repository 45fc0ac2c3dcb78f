"""How big the balloon must be: it converges on a kernel that rounds, keeps the promise, takes no more than needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.balloon import target
from storaged.core.model import Space
from storaged.units import GIB, MIB, SECTOR
from tests.balloon.kernel import extended, limits, shrunk, spaces

MOST_MOVES = 64
FRESH = Space(
    size=20 * GIB,
    device=20 * GIB,
    data_total=GIB,
    data_used=0,
    metadata_total=GIB,
    metadata_used=MIB,
    global_reserve=5 * MIB,
    unallocated=17 * GIB,
    data_chunk=GIB,
    metadata_chunk=256 * MIB,
)


def settle(space: Space, held: int, limit: int, draw_extra: st.DataObject | None = None) -> tuple[Space, int, int]:
    """Move until there is no move; (space, held, moves)."""
    for moves in range(MOST_MOVES):
        by = target.next_move(space, held, limit).by
        if by == 0:
            return space, held, moves
        if by > 0:
            assert by % SECTOR == 0
            extra = draw_extra is not None and draw_extra.draw(st.booleans())
            after = extended(space, by, extra)
            assert after is not None, f"asked for {by}, more than there is: {space}"
            space = after
        else:
            assert -by <= held, "never more than it holds"
            space = shrunk(space, -by)
        held += by
        assert held >= 0
    raise AssertionError(f"no end after {MOST_MOVES} moves")


@given(found=spaces(), limit=limits, data=st.data())
def test_the_promise_holds_and_nothing_is_taken_beyond_it(
    found: tuple[Space, int], limit: int, data: st.DataObject
) -> None:
    before, held_before = found
    space, held, _ = settle(before, held_before, limit, data)
    assert space.available <= target.ceiling(space, limit)
    # Applications get what they may have, where the balloon is all that keeps it from them.
    if held:
        assert space.available >= limit - target.TOLERANCE
    assert space.available + held == before.available + held_before, "nothing is lost on the way"


@given(found=spaces(), limit=limits)
def test_where_metadata_has_room_the_limit_is_met_to_the_tolerance(found: tuple[Space, int], limit: int) -> None:
    before, held = found
    before = replace(before, metadata_used=0, metadata_total=GIB, global_reserve=MIB, mixed=False, data_copies=1)
    space, held, _ = settle(before, held, limit)
    if space.available > limit:
        assert space.available - limit < SECTOR
    elif held:
        assert space.available >= limit - target.TOLERANCE


def test_the_goal_is_never_beyond_the_ceiling() -> None:
    space = replace(FRESH, size=256 * MIB, data_chunk=25 * MIB, global_reserve=16 * MIB, mixed=True)
    assert target.goal(space, 0) <= target.ceiling(space, 0)


@given(found=spaces(), limit=limits)
def test_at_the_target_nothing_moves(found: tuple[Space, int], limit: int) -> None:
    space, held, _ = settle(*found, limit)
    assert target.next_move(space, held, limit) == target.SETTLED


@given(found=spaces(), first=limits, second=limits)
def test_there_and_back_leaves_what_the_second_limit_asks(found: tuple[Space, int], first: int, second: int) -> None:
    space, held, _ = settle(*found, first)
    space, held, _ = settle(space, held, second)
    assert space.available <= target.ceiling(space, second)
    assert held == 0 or space.available >= second - target.TOLERANCE


@given(found=spaces())
def test_a_limit_beyond_all_room_empties_the_balloon(found: tuple[Space, int]) -> None:
    _, held, _ = settle(*found, (1 << 63) - 1)
    assert held == 0


def test_a_fresh_filesystem_takes_few_moves_and_no_more_than_asked() -> None:
    space, held, moves = settle(FRESH, 0, 2 * GIB)
    assert (space.available, held) == (2 * GIB, 16 * GIB)
    assert moves <= 6


def test_the_last_chunks_are_taken_one_by_one() -> None:
    assert target.next_move(FRESH, 0, 0).by == 16 * GIB
    near = replace(FRESH, data_total=18 * GIB, data_used=16 * GIB, unallocated=0)
    assert target.next_move(near, 16 * GIB, 0).by == 2 * GIB
    last = replace(FRESH, data_total=GIB, data_used=GIB, unallocated=2 * GIB)
    assert target.next_move(last, GIB, 0).by == GIB


@given(found=spaces(), first=limits, second=limits)
def test_whole_sectors_are_given_back(found: tuple[Space, int], first: int, second: int) -> None:
    space, held, _ = settle(*found, first)
    assert target.next_move(space, held, second).by % SECTOR == 0


def test_differences_within_the_tolerance_are_left_alone() -> None:
    space = replace(FRESH, data_used=GIB, unallocated=GIB)
    assert target.next_move(space, GIB, GIB + target.TOLERANCE) == target.SETTLED
    assert target.next_move(space, GIB, GIB + target.TOLERANCE + 1).by == -target.TOLERANCE - SECTOR
    assert target.next_move(space, GIB, GIB - SECTOR + 1) == target.SETTLED
    assert target.next_move(space, GIB, GIB - SECTOR).by == SECTOR


@given(found=spaces())
def test_the_claim_is_nothing_with_headroom_and_at_most_half_a_data_chunk(found: tuple[Space, int]) -> None:
    space, _ = found
    claim = target.metadata_claim(space)
    assert claim >= 0
    if space.mixed:
        wanted = max(2 * space.global_reserve, target.comfortable_headroom(space))
        assert claim == min(wanted, space.data_chunk // 2)
    elif space.metadata_headroom >= target.comfortable_headroom(space):
        assert claim == 0
    else:
        assert 0 < claim <= space.data_chunk // 2
        assert claim <= space.metadata_chunk * space.metadata_copies // 2


def test_a_claim_leaves_room_for_a_metadata_chunk() -> None:
    short = replace(FRESH, metadata_total=8 * MIB, metadata_used=MIB)
    assert target.metadata_claim(short) == 128 * MIB
    space, _, _ = settle(short, 0, 2 * GIB)
    assert space.unallocated >= 128 * MIB
    space, _, _ = settle(short, 0, 0)
    assert space.unallocated >= 128 * MIB
    assert space.available <= target.ceiling(space, 0)


@given(free=st.integers(-(1 << 63), (1 << 63) - 1), more=st.integers(0, 4 * GIB))
def test_the_allowance_is_never_above_upstreams(free: int, more: int) -> None:
    assert target.allowance(free, GIB + more) <= max(free - GIB, 0)
    assert target.allowance(free, GIB) == max(free - GIB, 0)


@given(size=st.integers(SECTOR, 8 * GIB), rooms=st.lists(st.integers(1, GIB), max_size=100))
def test_every_piece_fits_where_it_is_meant_to_lie(size: int, rooms: list[int]) -> None:
    asked, left = target.pieces(size, rooms)
    assert sum(asked) + left == size
    free = list(rooms)
    for piece in asked:
        assert piece % SECTOR == 0
        # Whatever place of those that are long enough the kernel takes, the rest still fits.
        place = max(free)
        assert 0 < piece <= place
        free.remove(place)
    if left >= SECTOR and len(asked) < target.MOST_PIECES:
        assert all(room < target.WORTH_A_PIECE for room in free), "nothing worth it is left"


def test_a_chunk_that_goes_is_not_a_copy_of_the_superblock() -> None:
    assert not target.losing_a_chunk(FRESH)
    assert not target.losing_a_chunk(replace(FRESH, metadata_readonly=64 << 10))
    assert target.losing_a_chunk(replace(FRESH, metadata_readonly=8 * MIB))


@given(found=spaces())
def test_headrooms_are_ordered(found: tuple[Space, int]) -> None:
    space, _ = found
    assert 8 * MIB <= target.least_headroom(space) < target.comfortable_headroom(space) <= 128 * MIB


def test_relief_is_due_only_when_metadata_could_have_what_the_balloon_holds() -> None:
    short = replace(FRESH, metadata_total=64 * MIB, metadata_used=58 * MIB, unallocated=0)
    assert target.relief_due(short, GIB)
    assert not target.relief_due(short, 0)
    assert not target.relief_due(replace(short, mixed=True), GIB)
    assert not target.relief_due(replace(short, unallocated=GIB), GIB)
    assert not target.relief_due(FRESH, GIB)


@pytest.mark.parametrize(
    ("size", "left", "owed", "allowed"),
    [
        (512 * MIB, 512 * MIB, 10 * GIB, True),
        (512 * MIB, 512 * MIB - 1, 0, True),
        (512 * MIB, 0, 1, False),
        (512 * MIB + 1, 0, 0, False),
        (100 * MIB, 0, 412 * MIB, True),
    ],
)
def test_metadata_has_what_the_grant_allows_and_half_of_the_reserve_once(
    size: int, left: int, owed: int, allowed: bool
) -> None:
    assert target.relief_allowed(size, left, owed, GIB) is allowed


@given(found=spaces(), headroom=st.integers(0, GIB))
def test_who_is_tight_is_not_calm(found: tuple[Space, int], headroom: int) -> None:
    space, _ = found
    assert not (target.tight(space, headroom) and target.calm(space, headroom))


@given(found=spaces())
def test_whoever_is_due_relief_is_looked_at_often(found: tuple[Space, int]) -> None:
    space, held = found
    if target.relief_due(space, held):
        assert target.tight(space)
