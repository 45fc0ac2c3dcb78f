"""The runner when the kernel refuses, when it is cancelled, and after a crash: it heals, and says what is true."""

from __future__ import annotations

import errno
import threading

import pytest

from storaged.core import events as ev
from storaged.errors import FilesystemError, Kind
from storaged.resize.job import Job, JobState
from storaged.units import GIB, MIB, SECTOR
from tests.resize.guest import Guest


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
