"""The runner on the simulation: what it says happened is what happened, and it always says the last word."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.core import events as ev
from storaged.resize.job import Job, JobState
from storaged.units import GIB, MIB, SECTOR
from tests.resize.guest import TURNS, Guest, Turns, aged


def test_growing(guest: Guest) -> None:
    assert guest.run(12 * GIB + 5).outcome is ev.Outcome.SUCCEEDED
    assert guest.disk.size == 12 * GIB
    assert guest.told[0] == ev.JobPrepared("a")


def test_shrinking_goes_step_by_step_and_takes_the_balloons_room_first(guest: Guest) -> None:
    guest.engine.hold(GIB)
    most = guest.world.filesystem.space().available
    seen: list[int] = []

    def tell(event: ev.JobPrepared | ev.JobProgressed | ev.JobEnded) -> None:
        guest.told.append(event)
        if not isinstance(event, ev.JobEnded):
            seen.append(guest.world.filesystem.space().available)

    assert guest.run(3 * GIB, tell).outcome is ev.Outcome.SUCCEEDED
    assert guest.disk.size == 3 * GIB
    assert guest.disk.faults.calls["resize"] > 1
    assert guest.disk.written == 0, "nothing of the balloon was copied to the host"
    assert max(seen) <= most + guest.disk.data_chunk, "what applications can write never jumped"
    assert guest.settled == 1


@given(
    size=st.integers(256, 16 * 1024).map(lambda n: n * MIB),
    turns=TURNS,
)
def test_the_bound_that_is_told_is_reached(size: int, turns: Turns) -> None:
    guest = aged(size, turns)
    used = sum(chunk.used for chunk in guest.disk.chunks)
    minimum = guest.minimum()
    if minimum >= size:
        return
    ended = guest.run(minimum)
    assert (ended.outcome, ended.reason) == (ev.Outcome.SUCCEEDED, "")
    assert guest.disk.size == minimum
    assert sum(chunk.used for chunk in guest.disk.chunks) == used, "nobody's data is lost"


def test_a_grow_never_shrinks(guest: Guest) -> None:
    guest.engine.hold(GIB)
    guest.world.resizer.resize(12 * GIB)
    held = guest.world.balloon.size()
    job = Job("a", 9 * GIB, 8 * GIB, 8 * GIB, JobState.PREPARING)  # judged before somebody else made it larger
    guest.runner.run(job, guest.told.append, guest.settle)
    last = guest.told[-1]
    assert isinstance(last, ev.JobEnded)
    assert (last.outcome, last.current_size, guest.disk.size) == (ev.Outcome.FAILED, 12 * GIB, 12 * GIB)
    assert guest.world.balloon.size() == held
    assert "ask again" in last.reason


def test_below_what_is_possible_the_size_reached_is_told(guest: Guest) -> None:
    guest.disk.write(4 * GIB)
    ended = guest.run(GIB)
    assert ended.outcome is ev.Outcome.FAILED
    assert "cannot move" in ended.reason
    assert not guest.disk.read_only


def test_progress_never_names_a_size_that_never_was(guest: Guest) -> None:
    guest.engine.hold(GIB)
    guest.run(3 * GIB)
    sizes = [event.current_size for event in guest.told if isinstance(event, ev.JobProgressed)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 3 * GIB
    assert all(size % SECTOR == 0 for size in sizes)


def test_what_is_moved_is_counted(guest: Guest) -> None:
    guest.disk.write(3 * GIB)
    guest.disk.delete(GIB)
    low = guest.disk.of("data")[0]
    low.used = 0
    ended = guest.run(guest.minimum())
    assert ended.outcome is ev.Outcome.SUCCEEDED
    progress = [event for event in guest.told if isinstance(event, ev.JobProgressed)]
    assert progress[-1].moved == progress[-1].to_move
    assert ended.moved == guest.disk.written > 0


@pytest.fixture
def cramped() -> Guest:
    """As a cut leaves it: metadata went into a small chunk of mkfs, and the new one has gone again, empty."""
    guest = Guest()
    guest.disk.write(GIB)
    metadata = guest.disk.of("metadata")[0]
    metadata.length, metadata.used = 8 * MIB, 6 * MIB
    return guest


def test_metadata_without_room_gets_a_chunk_before_a_step_that_needs_it(cramped: Guest) -> None:
    disk = cramped.disk
    metadata, (low, top) = disk.of("metadata")[0], disk.of("data")[:2]
    low.start, low.length, low.used = 17 * MIB, 500 * MIB, 200 * MIB
    top.start, top.length, top.used = 717 * MIB, 500 * MIB, 100 * MIB
    disk.chunks, disk.size = [*disk.of("system"), metadata, low, top], 1217 * MIB
    ended = cramped.run(717 * MIB)
    assert (ended.outcome, ended.reason, disk.size) == (ev.Outcome.SUCCEEDED, "", 717 * MIB)
    assert disk.of("metadata")[0].length >= 100 * MIB
    assert not disk.read_only


def test_metadata_without_room_gets_a_chunk_at_the_end(cramped: Guest) -> None:
    ended = cramped.run(4 * GIB)
    assert (ended.outcome, cramped.disk.size) == (ev.Outcome.SUCCEEDED, 4 * GIB)
    assert cramped.disk.of("metadata")[0].length >= 40 * MIB, "before data takes the hole for it"


@pytest.mark.parametrize("target", [0, 8 * GIB, 10 * GIB])
def test_what_applications_may_write_falls_by_a_chunk_at_a_time(target: int) -> None:
    guest = Guest(16 * GIB)
    guest.disk.write(9 * GIB)
    for chunk in guest.disk.of("data")[:-1]:
        chunk.used = chunk.length // 3
    limit, chunk_length = 5 * GIB, guest.disk.data_chunk
    guest.engine.hold(limit)
    space, resize = guest.world.filesystem.space, guest.world.resizer.resize
    seen = [space().available]

    def watched(size: int) -> None:
        seen.append(space().available)
        resize(size)

    guest.world.resizer.resize = watched  # type: ignore[method-assign]
    assert guest.run(target or guest.minimum()).outcome is ev.Outcome.SUCCEEDED
    guest.engine.hold(limit, fresh=False)
    last = space().available
    assert max(seen) <= limit + chunk_length
    assert min(seen) >= min(limit, last) - 2 * chunk_length
    falls = [before - after for before, after in itertools.pairwise([*seen, last])]
    assert max(falls) <= 2 * chunk_length


def test_what_is_given_back_on_the_way_does_not_take_what_has_to_move(guest: Guest) -> None:
    guest.disk.write(6 * GIB)
    for chunk in guest.disk.of("data"):
        chunk.used = chunk.length // 2
    guest.engine.hold(2 * GIB)
    minimum = guest.minimum()
    assert guest.run(minimum).outcome is ev.Outcome.SUCCEEDED
    assert guest.disk.size == minimum
