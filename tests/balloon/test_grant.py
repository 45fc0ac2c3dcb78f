"""What a grant leaves: the arithmetic, and that no order of writes gets more than it out of the host."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.balloon import grant as gr
from storaged.balloon import target
from storaged.balloon.engine import BalloonEngine
from storaged.balloon.grant import Grant
from storaged.core.model import Space
from storaged.errors import FilesystemError, Kind
from storaged.sim import SimBalloonFile, SimDisk, SimFilesystem, SimPreallocated
from storaged.units import GIB, MIB
from tests.balloon.test_target import FRESH

sizes = st.integers(0, 4 * GIB)
HAPPENINGS = ["write", "preallocate", "fill in", "sample", "again", "delete"]


class Guest:
    """A simulated filesystem, its engine, and applications that preallocate."""

    def __init__(self) -> None:
        self.disk = SimDisk(8 * GIB)
        self.filesystem = SimFilesystem(self.disk)
        self.preallocated = SimPreallocated(self.disk)
        self.engine = BalloonEngine(self.filesystem, SimBalloonFile(self.disk), self.preallocated)

    @property
    def available(self) -> int:
        """What applications could write."""
        return self.filesystem.space().available


@given(limit=sizes, unwritten=sizes, then=sizes, now=sizes)
def test_what_is_left_falls_with_what_is_spent_and_never_rises_above_the_start(
    limit: int, unwritten: int, then: int, now: int
) -> None:
    grant = Grant(limit, then, unwritten)
    assert gr.left(grant, then) == grant.free == max(limit - unwritten, 0)
    assert 0 <= gr.left(grant, now) <= grant.free
    assert gr.left(grant, now + 1) <= gr.left(grant, now)
    assert gr.left(grant, now) >= grant.free - max(now - then, 0)
    assert gr.left(Grant(limit, None, unwritten), now) == grant.free, "nothing is known of what was spent"
    assert grant.overcommitted == (unwritten > limit)


@given(limit=sizes, then=sizes, deleted=sizes)
def test_what_was_deleted_before_the_report_is_no_room_to_be_written_again(limit: int, then: int, deleted: int) -> None:
    grant = gr.committed(Grant(limit, then), max(then - deleted, 0))
    assert gr.left(grant, then) == max(limit - min(deleted, then), 0)
    assert gr.committed(grant, then) == grant, "a later commit gives nothing back"
    assert gr.committed(Grant(limit), then).spent is None


@given(limit=sizes, written=sizes, unwritten=sizes)
def test_counted_later_all_that_reached_the_device_is_spent(limit: int, written: int, unwritten: int) -> None:
    before = Grant(limit, 0, GIB, known=False, device_written=5)
    grant = gr.counted_again(before, 7, unwritten, device_written=5 + written)
    assert (grant.limit, grant.spent, grant.unwritten, grant.known) == (max(limit - written, 0), 7, unwritten, True)


@given(
    limit=st.integers(0, 3 * GIB),
    before=st.integers(0, 3 * GIB),
    writes=st.lists(
        st.tuples(st.sampled_from(HAPPENINGS), st.integers(0, GIB)),
        max_size=12,
    ),
)
def test_after_success_no_order_of_writes_takes_more_of_the_host(
    limit: int, before: int, writes: list[tuple[str, int]]
) -> None:
    guest = Guest()
    guest.disk.preallocate(before)
    try:
        guest.engine.hold(limit)
    except FilesystemError:
        assert guest.disk.unwritten > limit
        limit = guest.disk.unwritten  # these can be written, and nothing else
    assert guest.available + guest.disk.unwritten <= limit + target.slack(guest.filesystem.space())
    then, deleted = guest.disk.device_written, 0
    for what, size in writes:
        if what == "write":
            guest.disk.write(size)
        elif what == "preallocate":
            guest.disk.preallocate(size)
        elif what == "fill in":
            guest.disk.write_preallocated(size)
        elif what == "delete":
            deleted += guest.disk.delete(size)
        elif what == "sample":
            guest.engine.sample(GIB, adjust=True)
        else:
            with contextlib.suppress(FilesystemError):  # more is preallocated than is left
                guest.engine.hold(limit, fresh=False)
    grown = guest.disk.device_written - then - deleted
    assert grown <= limit + target.slack(guest.filesystem.space())
    guest.disk.write(guest.available)
    guest.disk.write_preallocated(guest.disk.unwritten)
    assert guest.disk.device_written - then - deleted <= limit + target.slack(guest.filesystem.space())


def test_more_preallocated_than_allowed_is_refused_and_stays_writable() -> None:
    guest = Guest()
    guest.disk.preallocate(1536 * MIB)
    with pytest.raises(FilesystemError, match=r"have preallocated 1\.50 GiB .* 300 MiB are allowed"):
        guest.engine.hold(300 * MIB)
    assert guest.available <= target.IDLE_SLACK, "nothing is given"
    assert guest.disk.write_preallocated(1536 * MIB) == 1536 * MIB
    assert guest.engine.hold(300 * MIB).space.available == pytest.approx(300 * MIB, abs=target.TOLERANCE)


def test_until_it_is_known_everything_counts_as_preallocated() -> None:
    guest = Guest()
    guest.preallocated.known = False
    guest.disk.write(GIB)
    with pytest.raises(FilesystemError, match="still being counted") as caught:
        guest.engine.hold(GIB // 2)
    assert caught.value.kind is Kind.BUSY
    held = guest.engine.hold(3 * GIB)
    assert held.again, "it looks again soon"
    assert held.space.available == pytest.approx(2 * GIB, abs=target.TOLERANCE)
    guest.disk.write(100 * MIB)
    assert guest.engine.hold(3 * GIB, fresh=False).again
    guest.preallocated.known = True
    held = guest.engine.hold(3 * GIB, fresh=False)
    assert held.space.available == pytest.approx(3 * GIB - 100 * MIB, abs=target.TOLERANCE), "less what was written"


def test_what_became_available_is_taken_again() -> None:
    guest = Guest()
    guest.engine.hold(GIB)
    guest.disk.size = guest.disk.device = 12 * GIB  # grown by hand
    assert guest.engine.must_act(guest.filesystem.space())
    guest.engine.sample(GIB, adjust=False)
    assert guest.available > 4 * GIB, "a job adjusts by itself"
    guest.engine.sample(GIB, adjust=True)
    assert guest.available == pytest.approx(GIB, abs=target.TOLERANCE)
    assert not guest.engine.must_act(guest.filesystem.space())


def test_giving_back_stops_when_it_frees_nothing() -> None:
    guest = Guest()
    guest.engine.hold(GIB)
    before = guest.engine.size()
    pinned = guest.filesystem.space

    def space() -> Space:  # a snapshot of the balloon holds what it gives back
        now = pinned()
        return replace(now, data_used=now.data_used + before - guest.engine.size())

    guest.filesystem.space = space  # type: ignore[method-assign]
    held = guest.engine.hold(5 * GIB)
    assert "a snapshot or a copy" in held.warning
    assert before - held.size <= 2 * guest.disk.data_chunk


@given(limit=sizes)
def test_with_two_copies_half_of_the_limit_can_be_written(limit: int) -> None:
    space = replace(FRESH, data_copies=2)
    assert target.goal(space, limit // 2) * 2 <= limit
    assert space.available == space.data_free + space.unallocated // 2


def test_room_in_a_read_only_chunk_is_available_and_cannot_be_taken() -> None:
    space = replace(FRESH, data_total=4 * GIB, data_used=GIB, data_readonly=GIB, unallocated=0)
    assert (space.available, space.takeable, space.data_free) == (3 * GIB, 2 * GIB, 2 * GIB)
    assert target.next_move(space, 0, 0).by <= 2 * GIB
    rest = replace(space, data_used=3 * GIB)
    assert target.next_move(rest, 2 * GIB, 0).by == 0, "nothing to take"
    assert rest.available > target.ceiling(rest, 0), "but it is no success"


def test_what_became_unwritten_without_taking_free_room_comes_out_of_what_is_left() -> None:
    guest = Guest()
    guest.engine.hold(GIB)
    guest.disk.preallocate(200 * MIB)  # out of the grant
    guest.engine.count(1.0)
    assert not guest.engine.must_act(guest.filesystem.space())
    guest.disk.unwritten += 300 * MIB  # in room that was used before, and is written no more
    guest.disk.write(300 * MIB)
    guest.engine.count(1.0)
    assert not guest.engine.must_act(guest.filesystem.space()), "as much was spent meanwhile"
    guest.disk.unwritten += 300 * MIB
    guest.engine.count(1.0)
    assert guest.engine.must_act(guest.filesystem.space())
    guest.engine.sample(GIB, adjust=True)
    assert guest.available == pytest.approx(GIB - 800 * MIB, abs=target.TOLERANCE)


@given(then=sizes, now=sizes, unwritten_then=sizes, unwritten_now=sizes)
def test_only_what_spending_does_not_explain_counts(
    then: int, now: int, unwritten_then: int, unwritten_now: int
) -> None:
    grant = Grant(GIB, then, unwritten_then)
    excess = gr.unexplained(grant, now, unwritten_now)
    assert excess == max(unwritten_now - unwritten_then - max(now - then, 0), 0)
    assert gr.unexplained(replace(grant, known=False), now, unwritten_now) == 0
    assert gr.unexplained(replace(grant, spent=None), now, unwritten_now) == 0
