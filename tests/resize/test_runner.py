"""The runner on the simulation: what it says happened is what happened, and it always says the last word."""

from __future__ import annotations

import errno
import itertools
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.core import events as ev
from storaged.errors import FilesystemError, Kind
from storaged.resize.job import Job, JobState
from storaged.resize.layout import KERNEL_MINIMUM, Layout
from storaged.units import GIB, MIB, SECTOR
from tests.resize.guest import Guest

Turns = list[tuple[str, int]]
TURNS = st.lists(st.tuples(st.sampled_from(["write", "delete", "hold"]), st.integers(0, 8 * GIB)), max_size=10)


def aged(size: int, turns: Turns) -> Guest:
    """A filesystem that has lived through `turns`."""
    guest = Guest(size)
    for what, amount in turns:
        if what == "hold":
            guest.engine.hold(amount)
        else:
            getattr(guest.disk, what)(amount)
    return guest


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


@given(
    size=st.integers(512, 16 * 1024).map(lambda n: n * MIB),
    target=st.integers(0, 8 * 1024).map(lambda n: n * MIB),
    turns=TURNS,
)
def test_with_best_effort_it_goes_at_least_as_far_as_was_promised(size: int, target: int, turns: Turns) -> None:
    guest = aged(size, turns)
    used = sum(chunk.used for chunk in guest.disk.chunks)
    minimum = guest.minimum()
    if target >= size:
        return
    ended = guest.run(target, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert max(target, KERNEL_MINIMUM) <= guest.disk.size <= max(minimum, target, KERNEL_MINIMUM)
    assert bool(ended.reason) == (guest.disk.size > max(target, KERNEL_MINIMUM)), "why it is no smaller"
    assert sum(chunk.used for chunk in guest.disk.chunks) == used, "nobody's data is lost"
    assert not guest.disk.read_only, "metadata went nowhere without a hole for it"


@settings(max_examples=40)
@given(turns=TURNS, dice=st.randoms(use_true_random=False))
def test_a_best_effort_ends_however_the_guest_writes_on(turns: Turns, dice: random.Random) -> None:
    guest = aged(2 * GIB, turns)
    looks = 0
    look = guest.world.filesystem.layout

    def layout() -> Layout:
        nonlocal looks
        looks += 1
        assert looks < 1000
        (guest.disk.write if dice.random() < 0.5 else guest.disk.delete)(dice.randrange(1, 64) * MIB)
        return look()

    guest.world.filesystem.layout = layout  # type: ignore[method-assign]
    ended = guest.run(0, best_effort=True)
    assert ended.current_size <= 2 * GIB
    assert not guest.disk.read_only


def test_a_best_effort_that_gains_nothing_says_why_and_changes_nothing(guest: Guest) -> None:
    guest.disk.write(8 * GIB)
    ended = guest.run(GIB, best_effort=True)
    assert (ended.outcome, guest.disk.size) == (ev.Outcome.SUCCEEDED, 8 * GIB)
    assert "cannot move" in ended.reason or "unallocated" in ended.reason


@pytest.fixture
def scattered(guest: Guest) -> Guest:
    """Metadata at the top, no hole below it, and data that would fit into half of its chunks."""
    metadata = guest.disk.of("metadata")[0]
    guest.disk.write(4 * guest.disk.data_chunk)
    for chunk in guest.disk.of("data"):
        chunk.used = 300 * MIB
    metadata.start = max(chunk.start + chunk.length for chunk in guest.disk.chunks)
    guest.disk.of("data")[0].start -= metadata.length
    guest.disk.of("data")[0].length += metadata.length
    return guest


def test_what_is_rewritten_lets_a_shrink_go_further_than_was_promised(scattered: Guest) -> None:
    minimum = scattered.minimum()
    ended = scattered.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert scattered.disk.faults.calls["move_out"]
    assert scattered.disk.size < minimum - 200 * MIB
    assert sum(chunk.used for chunk in scattered.disk.of("data")) == 1200 * MIB


def test_a_chunk_that_is_too_long_goes_up_and_comes_back_shorter(topped: Guest) -> None:
    minimum = topped.minimum()
    sizes: list[int] = []
    resize = topped.world.resizer.resize

    def watched(size: int) -> None:
        resize(size)
        sizes.append(size)

    topped.world.resizer.resize = watched  # type: ignore[method-assign]
    ended = topped.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert topped.disk.size < minimum - 16 * MIB
    assert any(after > before for before, after in itertools.pairwise(sizes)), "room was taken back for a moment"
    assert not topped.disk.read_only


def test_metadata_whose_hole_somebody_took_stays(topped: Guest) -> None:
    minimum = topped.minimum()
    resize = topped.world.resizer.resize

    def watched(size: int) -> None:
        grows = topped.disk.size < size
        resize(size)
        if grows:
            topped.disk.write(topped.disk.unallocated())

    topped.world.resizer.resize = watched  # type: ignore[method-assign]
    ended = topped.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert topped.disk.size >= minimum
    assert not topped.disk.read_only
    assert not topped.disk.faults.calls["move_out"]


def test_under_a_balloon_applications_get_no_more_than_a_chunk_for_it(topped: Guest) -> None:
    topped.engine.hold(64 * MIB)
    space = topped.world.filesystem.space
    before, chunk = space().available, topped.disk.data_chunk
    seen: list[int] = []
    grown: list[int] = []
    resize = topped.world.resizer.resize

    def watched(size: int) -> None:
        seen.append(space().available)
        grown.append(size - topped.disk.size)
        resize(size)
        seen.append(space().available)

    topped.world.resizer.resize = watched  # type: ignore[method-assign]
    assert topped.run(0, best_effort=True).outcome is ev.Outcome.SUCCEEDED
    assert max(grown) > 0, "it was taken back"
    assert max(seen) <= before + chunk


def test_room_is_taken_back_only_where_the_device_has_it(topped: Guest) -> None:
    minimum = topped.minimum()
    topped.world.resizer.resize(minimum)
    topped.disk.set_device(minimum)
    topped.run(0, best_effort=True)
    assert topped.disk.size == minimum


@pytest.mark.parametrize("number", [errno.ECANCELED, errno.EIO, errno.ENOSPC])
def test_what_ends_while_room_is_taken_back_gives_it_up_again(topped: Guest, number: int) -> None:
    minimum = topped.minimum()
    topped.disk.faults.fail("move_out", FilesystemError("no", number), times=9)
    ended = topped.run(0, best_effort=True)
    outcomes = {errno.ECANCELED: ev.Outcome.STOPPED, errno.EIO: ev.Outcome.FAILED, errno.ENOSPC: ev.Outcome.SUCCEEDED}
    assert ended.outcome is outcomes[number]
    assert topped.disk.faults.calls["move_out"]
    assert topped.disk.size == minimum


def test_what_was_promised_is_taken_before_anything_else_is_tried(guest: Guest) -> None:
    guest.disk.write(4 * GIB)
    for chunk in guest.disk.of("data")[:2]:
        chunk.used = 0
    minimum = guest.minimum()
    order: list[str] = []
    guest.world.filesystem.reclaim_empty_chunks = lambda: order.append(f"reclaim at {guest.disk.size}")  # type: ignore[method-assign]
    guest.run(0, best_effort=True)
    assert order == [f"reclaim at {minimum}"] or not order
    assert guest.disk.size <= minimum


def test_a_best_effort_is_cancelled_while_it_rewrites(scattered: Guest) -> None:
    minimum = scattered.minimum()
    scattered.disk.faults.fail("move_out", FilesystemError("cancelled", errno.ECANCELED), times=2)
    ended = scattered.run(0, best_effort=True)
    assert (ended.outcome, scattered.disk.size) == (ev.Outcome.STOPPED, minimum)


def test_a_cancel_before_a_balance_has_begun_is_a_cancel(scattered: Guest) -> None:
    minimum = scattered.minimum()

    def move_out(logical: int, *, metadata: bool = False) -> None:
        scattered.runner._stops["a"].set()  # as `cancel` does, without waiting
        raise FilesystemError("Invalid argument", errno.EINVAL)

    scattered.world.resizer.move_out = move_out  # type: ignore[method-assign]
    ended = scattered.run(0, best_effort=True)
    assert (ended.outcome, scattered.disk.size) == (ev.Outcome.STOPPED, minimum)


def test_what_finds_no_room_to_be_rewritten_ends_nothing(scattered: Guest) -> None:
    minimum = scattered.minimum()
    scattered.disk.faults.fail("move_out", FilesystemError("no room", errno.ENOSPC), times=99)
    ended = scattered.run(0, best_effort=True)
    assert (ended.outcome, scattered.disk.size) == (ev.Outcome.SUCCEEDED, minimum)
    assert ended.reason
    assert scattered.disk.faults.calls["resize"] > 2, "what the kernel remembers of it is healed"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ETXTBSY])
def test_a_best_effort_ends_well_where_the_kernel_refuses_a_cut(guest: Guest, number: int) -> None:
    guest.disk.write(5 * GIB)
    for chunk in guest.disk.of("data"):
        chunk.used = max(chunk.used - 300 * MIB, 8 * MIB)
    minimum = guest.minimum()
    top = max(chunk.start + chunk.length for chunk in guest.disk.of("data"))
    kernel = guest.world.resizer.resize

    def resize(size: int) -> None:
        if size < top:
            raise FilesystemError("an active swap file lies above the new end", number)
        kernel(size)

    guest.world.resizer.resize = resize  # type: ignore[method-assign]
    ended = guest.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert minimum < top <= guest.disk.size < 8 * GIB
    assert ended.reason


def test_a_refusal_is_healed_whatever_ends_a_best_effort(scattered: Guest) -> None:
    calls = []

    def move_out(logical: int, *, metadata: bool = False) -> None:
        calls.append((logical, metadata))
        raise FilesystemError("no", errno.ENOSPC if len(calls) == 1 else errno.EIO)

    scattered.world.resizer.move_out = move_out  # type: ignore[method-assign]
    minimum = scattered.minimum()
    before = scattered.disk.faults.calls["resize"]
    assert scattered.run(0, best_effort=True).outcome is ev.Outcome.FAILED
    assert scattered.disk.size == minimum
    assert scattered.disk.faults.calls["resize"] - before >= 3, "the cut, and two that heal"


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


@pytest.mark.parametrize("number", [errno.EIO, errno.ETXTBSY, errno.EPERM])
def test_what_the_kernel_said_is_passed_on(guest: Guest, number: int) -> None:
    guest.disk.faults.fail("resize", FilesystemError("the kernel said no", number))
    ended = guest.run(4 * GIB)
    assert ended.outcome is ev.Outcome.FAILED
    assert "the kernel said no" in ended.reason
    assert guest.disk.size == 8 * GIB


def test_after_no_room_the_size_is_touched_each_time_so_that_writes_go_on(guest: Guest) -> None:
    resize = guest.world.resizer.resize
    asked: list[int] = []

    def refused(size: int) -> None:
        asked.append(size)
        if size == 4 * GIB:
            raise FilesystemError("no room", errno.ENOSPC)
        resize(size)

    guest.world.resizer.resize = refused  # type: ignore[method-assign]
    assert guest.run(4 * GIB).outcome is ev.Outcome.FAILED
    assert asked == [4 * GIB, 8 * GIB - SECTOR, 8 * GIB] * 3, "the failure, a sector less, and back"
    assert guest.disk.size == 8 * GIB


def test_a_filesystem_that_was_forced_read_only_is_named(guest: Guest) -> None:
    guest.disk.read_only = True
    ended = guest.run(4 * GIB)
    assert ended.outcome is ev.Outcome.FAILED
    assert "back up, unmount and check" in ended.reason


@pytest.mark.parametrize("best_effort", [False, True])
def test_a_filesystem_that_was_forced_read_only_at_the_very_end_is_no_success(guest: Guest, best_effort: bool) -> None:
    def tell(event: ev.JobPrepared | ev.JobProgressed | ev.JobEnded) -> None:
        guest.told.append(event)
        guest.disk.read_only = guest.disk.size == 4 * GIB

    ended = guest.run(4 * GIB, tell, best_effort=best_effort)
    assert (ended.outcome, ended.current_size) == (ev.Outcome.FAILED, 4 * GIB)
    assert "back up, unmount and check" in ended.reason


def test_what_could_not_be_healed_is_said_after_a_success_too(guest: Guest) -> None:
    def tell(event: ev.JobPrepared | ev.JobProgressed | ev.JobEnded) -> None:
        guest.told.append(event)
        if guest.disk.size == 4 * GIB:
            guest.disk.faults.fail("resize", FilesystemError("the kernel said no", errno.EIO))

    ended = guest.run(4 * GIB, tell)
    assert (ended.outcome, ended.current_size) == (ev.Outcome.SUCCEEDED, 4 * GIB)
    assert ended.reason == "healing it failed: the kernel said no"


def test_a_kill_from_outside_is_a_stop(guest: Guest) -> None:
    guest.disk.faults.fail(
        "resize", FilesystemError("the resize process was killed", errno.ECANCELED, Kind.UNAVAILABLE)
    )
    assert guest.run(4 * GIB).outcome is ev.Outcome.STOPPED


def test_a_cancel_that_was_meant_for_an_earlier_resize_is_survived(guest: Guest) -> None:
    guest.disk.faults.fail("resize", FilesystemError("cancelled", errno.ECANCELED))
    assert guest.run(4 * GIB).outcome is ev.Outcome.SUCCEEDED


def test_a_cancel_by_another_hand_stops_it_all_the_same(guest: Guest) -> None:
    guest.disk.faults.fail("resize", FilesystemError("cancelled", errno.ECANCELED), times=2)
    assert guest.run(4 * GIB).outcome is ev.Outcome.STOPPED


def test_a_busy_kernel_is_waited_for(guest: Guest) -> None:
    guest.disk.faults.fail("resize", FilesystemError("balance", errno.EINPROGRESS, Kind.BUSY))
    assert guest.run(12 * GIB).outcome is ev.Outcome.SUCCEEDED


def test_a_cancel_between_two_steps_keeps_the_steps_before(guest: Guest) -> None:
    guest.engine.hold(GIB)

    def tell(event: ev.JobPrepared | ev.JobProgressed | ev.JobEnded) -> None:
        guest.told.append(event)
        if isinstance(event, ev.JobProgressed):
            guest.runner.cancel("a")

    ended = guest.run(3 * GIB, tell)
    assert ended.outcome is ev.Outcome.STOPPED
    assert 3 * GIB < guest.disk.size < 8 * GIB


def test_a_cancel_while_the_kernel_moves_stops_it_soon(guest: Guest) -> None:
    guest.disk.write(3 * GIB)
    low = guest.disk.of("data")[0]
    low.used = 0
    guest.disk.speed = MIB
    target = guest.minimum()
    timer = threading.Timer(0.1, guest.runner.cancel, ["a"])
    timer.start()
    ended = guest.run(target)
    timer.join()
    assert ended.outcome is ev.Outcome.STOPPED
    assert guest.disk.exclusive_operation == "none"


def test_a_cancel_without_a_job_does_nothing(guest: Guest) -> None:
    guest.runner.cancel("another")
    assert guest.run(12 * GIB).outcome is ev.Outcome.SUCCEEDED


@pytest.mark.parametrize("unforeseen", [False, True])
def test_the_last_word_is_said_whatever_happened(guest: Guest, unforeseen: bool) -> None:
    if unforeseen:
        guest.disk.faults.fail("resize", ZeroDivisionError())  # type: ignore[arg-type]  # not what it should raise
    else:
        guest.disk.faults.fail("resize", FilesystemError("no room", errno.ENOSPC))
        guest.disk.faults.fail("space", FilesystemError("broken", errno.EIO))
    try:
        guest.run(4 * GIB)
    except (FilesystemError, ZeroDivisionError):
        pytest.fail("it was not said")


def test_nothing_is_healed_that_was_not_tried(guest: Guest) -> None:
    guest.disk.write(guest.world.filesystem.space().available)
    ended = guest.run(GIB)
    assert ended.outcome is ev.Outcome.FAILED
    assert guest.disk.faults.calls["resize"] == 0


def test_a_shrink_that_was_cut_off_is_healed(guest: Guest) -> None:
    # The kernel may go on believing that it has no room: a sector less and back makes it look again.
    guest.disk.faults.fail("resize", FilesystemError("killed", errno.ECANCELED, Kind.UNAVAILABLE))
    assert guest.run(4 * GIB).outcome is ev.Outcome.STOPPED
    assert guest.disk.faults.calls["resize"] == 3
    assert guest.disk.size == 8 * GIB


def test_a_heal_that_is_cancelled_too_ends_where_it_began(guest: Guest) -> None:
    for _ in range(3):
        guest.disk.faults.fail("resize", FilesystemError("cancelled", errno.ECANCELED))
    guest.run(4 * GIB)
    assert guest.disk.size == 8 * GIB


def test_after_a_crash_the_kernels_work_is_let_end_and_healed(guest: Guest) -> None:
    guest.disk.exclusive_operation = "resize"
    ended = threading.Event()

    def end() -> None:
        assert guest.disk.faults.calls["resize"] == 0
        ended.set()
        guest.disk.exclusive_operation = "none"

    timer = threading.Timer(0.1, end)
    timer.start()
    told = guest.runner.recover(Job("a", 4 * GIB, 8 * GIB, 8 * GIB, JobState.RUNNING))
    timer.join()
    assert ended.is_set()
    assert told == ""
    assert guest.disk.faults.calls["resize"] == 2
    assert guest.disk.size == 8 * GIB


def test_after_a_crash_in_a_grow_there_is_nothing_to_heal(guest: Guest) -> None:
    assert guest.runner.recover(Job("a", 12 * GIB, 8 * GIB, 8 * GIB, JobState.RUNNING)) == ""
    assert guest.disk.faults.calls["resize"] == 0


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


def test_a_grow_that_leaves_the_filesystem_read_only_is_no_success(guest: Guest) -> None:
    # The kernel tells nobody that the last commit of a grow has failed.
    resize = guest.world.resizer.resize

    def failing(size: int) -> None:
        resize(size)
        guest.disk.read_only = True

    guest.world.resizer.resize = failing  # type: ignore[method-assign]
    ended = guest.run(12 * GIB)
    assert ended.outcome is ev.Outcome.FAILED
    assert "read-only" in ended.reason


@pytest.mark.parametrize("best_effort", [False, True])
def test_a_cancel_after_the_last_cut_undoes_nothing(guest: Guest, best_effort: bool) -> None:
    guest.disk.write(GIB)
    metadata = guest.disk.of("metadata")[0]
    metadata.length, metadata.used = 8 * MIB, 6 * MIB

    def tell(event: ev.JobPrepared | ev.JobProgressed | ev.JobEnded) -> None:
        guest.told.append(event)
        if isinstance(event, ev.JobProgressed) and guest.disk.size == 4 * GIB:
            guest.runner._stops["a"].set()

    ended = guest.run(4 * GIB, tell, best_effort=best_effort)
    assert (ended.outcome, ended.current_size) == (ev.Outcome.SUCCEEDED, 4 * GIB)


def test_a_read_only_filesystem_is_named_whoever_says_so_first(guest: Guest) -> None:
    guest.disk.write(2 * GIB)
    sync = guest.world.filesystem.sync

    def committing() -> None:
        if guest.disk.size < 8 * GIB:
            guest.disk.read_only = True
            raise FilesystemError("committing the filesystem: Read-only file system", errno.EROFS)
        sync()

    guest.world.filesystem.sync = committing  # type: ignore[method-assign]
    ended = guest.run(3 * GIB)
    assert ended.outcome is ev.Outcome.FAILED
    assert "back up" in ended.reason


@pytest.mark.parametrize("how", ["cancel", "no room"])
def test_the_balloon_stands_still_until_a_pivot_is_back(topped: Guest, how: str) -> None:
    # A host that allows nothing: whatever the balloon does not hold, it takes, also what the way back needs.
    topped.disk.of("data")[0].used -= 100 * MIB
    topped.engine.hold(0)
    minimum = topped.minimum()

    def settle() -> None:
        topped.engine.hold(0, fresh=False)

    topped.settle = settle  # type: ignore[method-assign]
    move_out, resize = topped.world.resizer.move_out, topped.world.resizer.resize
    moved: list[int] = []
    refused: list[int] = []

    def moving(logical: int, *, metadata: bool = False) -> None:
        move_out(logical, metadata=metadata)
        moved.append(logical)
        if how == "cancel":
            topped.runner._stops["a"].set()

    def resizing(size: int) -> None:
        if how == "no room" and moved and not refused and size < topped.disk.size:
            refused.append(size)
            raise FilesystemError("no room", errno.ENOSPC)
        resize(size)

    topped.world.resizer.move_out = moving  # type: ignore[method-assign]
    topped.world.resizer.resize = resizing  # type: ignore[method-assign]
    ended = topped.run(0, best_effort=True)
    assert moved, "there was a pivot"
    assert ended.outcome is (ev.Outcome.STOPPED if how == "cancel" else ev.Outcome.SUCCEEDED)
    assert topped.disk.size <= minimum
    assert topped.disk.written < 8 * MIB, "nothing of the balloon was copied to the host"


def test_a_best_efforts_progress_is_measured_to_what_was_asked_for(scattered: Guest) -> None:
    scattered.run(0, best_effort=True)
    told = [event for event in scattered.told if isinstance(event, ev.JobProgressed)]
    before = [event for event in told if event.moved and event.current_size > scattered.disk.size]
    assert before
    assert all(event.moved < event.to_move for event in before), "there is more to come"


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
