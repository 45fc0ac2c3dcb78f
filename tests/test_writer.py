"""The writer when something goes wrong: it is told, counted and survived, and nothing is done before it is saved."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest

from storaged import writer
from storaged.core import events as ev
from storaged.core import machine
from storaged.core.model import Told
from storaged.errors import FilesystemError, StoragedError
from storaged.resize.job import JobState
from storaged.sim.system import FOUND
from storaged.units import GIB, MIB
from tests.rpc.conftest import QUICK, until
from tests.test_runtime import Guest, ended

NO_ROOM = FilesystemError("no room for the journal", errno.ENOSPC)
ALWAYS = 10**6


@pytest.fixture
async def guest(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guest]:
    monkeypatch.setattr(writer, "REST_AFTER_A_FAULT_S", 0.05)
    one = Guest()
    await one.service.start()
    try:
        yield one
    finally:
        monkeypatch.undo()
        one.disk.faults.clear()
        await one.service.stop()


def broken(*_: object) -> None:
    raise ZeroDivisionError("a fault of ours")


# --- faults of ours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [ev.Trimmed(0), ev.BalloonSampled(0, 0, 0.0), ev.Tick(0.0, 0.0)])
async def test_an_event_that_cannot_be_handled_is_told_counted_and_survived(
    event: ev.Event, guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(machine.HANDLERS, type(event), broken)
    guest.service._post(event)
    assert await guest.service.report(Told.NORMAL, 3 * GIB) == ""
    await asyncio.wait_for(guest.service.alive(), 2)
    assert guest.service.snapshot.faults >= 1
    assert f"handling {type(event).__name__} failed" in caplog.text
    assert "a fault of ours" in caplog.text
    assert any("a fault of ours" in note for note in guest.service.snapshot.notes)


async def test_what_waits_for_time_and_always_fails_does_not_run_hot(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await guest.service.report(Told.NORMAL, 3 * GIB)  # from here on a Tick is due every 0.2 s
    monkeypatch.setitem(machine.HANDLERS, ev.Tick, broken)
    await asyncio.sleep(1.0)
    assert 1 <= guest.service.snapshot.faults <= 25
    assert await guest.service.report(Told.NORMAL, 2 * GIB) == ""


async def test_a_device_that_cannot_be_asked_ends_nothing(guest: Guest) -> None:
    await guest.service.resize(20 * GIB)
    job = guest.state.active_job
    assert job is not None
    assert job.state is JobState.WAITING
    guest.disk.faults.fail("device_size", FilesystemError("no such device", errno.ENODEV), times=2)
    await asyncio.sleep(0.15)
    guest.disk.set_device(24 * GIB)
    await until(lambda: ended(guest))
    assert guest.state.job is not None
    assert guest.state.job.state is JobState.DONE
    assert any("no such device" in note for note in guest.service.snapshot.notes)


async def test_an_effect_that_fails_does_not_take_the_answer_with_it(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest.sysctl, "dirty_limits", broken)
    assert await asyncio.wait_for(guest.service.report(Told.LOW, 2 * GIB), 2) == ""
    assert guest.service.snapshot.faults >= 1
    assert guest.journal.text is not None
    assert f'"limit": {GIB}' in guest.journal.text


async def test_an_observer_that_fails_takes_nothing_with_it(guest: Guest) -> None:
    seen = []
    guest.service.observe(broken)
    guest.service.observe(lambda event, _: seen.append(event))
    assert await guest.service.report(Told.NORMAL, 3 * GIB) == ""
    assert seen
    assert guest.service.snapshot.faults >= 1


async def test_a_writer_that_was_ended_by_others_begins_again(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    assert guest.service._writer is not None
    guest.service._writer.cancel()
    assert await asyncio.wait_for(guest.service.report(Told.NORMAL, 3 * GIB), 2) == ""
    assert "the engine's writer ended" in caplog.text
    assert guest.service.snapshot.faults == 1


# --- the journal comes first ----------------------------------------------------------------------------------------


async def test_write_back_limits_are_not_lowered_before_those_found_are_saved(guest: Guest) -> None:
    guest.disk.faults.fail("save", NO_ROOM, times=ALWAYS)
    assert "no room for the journal" in await guest.service.report(Told.CRITICAL, 2 * GIB)
    assert guest.sysctl.limits == FOUND, "a crash now would forget them"
    guest.disk.faults.clear()
    assert await guest.service.report(Told.CRITICAL, 2 * GIB) == ""
    assert guest.sysctl.limits.dirty_bytes == QUICK.critical_dirty
    assert guest.journal.text is not None
    assert "dirty_ratio" in guest.journal.text


async def test_a_crash_while_the_journal_cannot_be_saved_leaves_the_limits_as_found(guest: Guest) -> None:
    guest.disk.faults.fail("save", NO_ROOM, times=ALWAYS)
    await guest.service.report(Told.LOW, 2 * GIB)
    guest.disk.faults.clear()
    other = Guest()
    other.disk, other.sysctl, other.journal = guest.disk, guest.sysctl, guest.journal
    await other.fresh().start()  # the first one is as good as killed: it says nothing more
    try:
        assert await other.service.report(Told.LOW, 2 * GIB) == ""
        await other.service.release()
        assert other.sysctl.limits == FOUND
    finally:
        await other.service.stop()


async def test_what_was_put_off_is_not_done_once_the_pressure_is_over(guest: Guest) -> None:
    guest.disk.faults.fail("save", NO_ROOM, times=ALWAYS)
    await guest.service.report(Told.LOW, 2 * GIB)
    await guest.service.report(Told.NORMAL, 100 * GIB)
    await asyncio.sleep(QUICK.settle_s + 0.1)
    await guest.service.report(Told.NORMAL, 100 * GIB)
    guest.disk.faults.clear()
    assert await guest.service.report(Told.NORMAL, 100 * GIB) == ""
    assert guest.sysctl.limits == FOUND


# --- who waits and what is held -------------------------------------------------------------------------------------


async def test_a_release_is_no_success_for_a_report_that_waits(guest: Guest) -> None:
    going = guest.disk.faults.hang("extend")
    report = asyncio.ensure_future(guest.service.report(Told.NORMAL, 3 * GIB))
    await asyncio.sleep(0.02)
    release = asyncio.ensure_future(guest.service.release())
    assert "released" in await asyncio.wait_for(report, 2)
    going.set()
    guest.disk.faults.clear()
    await release
    assert guest.service.world.balloon.size() == 0


async def test_a_late_settling_after_a_release_takes_no_newer_limit_back(guest: Guest) -> None:
    """A job ends when nothing is to be held, a report comes, and only then the job's thread gets the engine."""
    engine = guest.service._engine
    await guest.service.report(Told.NORMAL, 3 * GIB)
    assert engine.hold(None, fresh=False).size > 0, "that was said by nobody"
    assert guest.available <= 2 * GIB + 64 * MIB
    await guest.service.release()
    assert engine.hold(None, fresh=False).size == 0


async def test_a_retry_does_not_stand_in_for_a_report_that_waits(guest: Guest) -> None:
    going = guest.disk.faults.hang("extend")
    first = asyncio.ensure_future(guest.service.report(Told.NORMAL, 3 * GIB))
    await asyncio.sleep(0.02)
    guest.service._hold(2 * GIB, True)
    guest.service._hold(2 * GIB, False)
    assert guest.service._hold_next == [(2 * GIB, True)]
    going.set()
    guest.disk.faults.clear()
    await first


async def test_a_report_after_the_end_is_refused(guest: Guest) -> None:
    await guest.service.stop()
    with pytest.raises(StoragedError, match="stopp"):
        await asyncio.wait_for(guest.service.report(Told.NORMAL, 3 * GIB), 1)
