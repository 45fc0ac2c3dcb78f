"""The writer: one task owns the state, whoever asks gets an answer, and it ends safely."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storaged import runtime, writer
from storaged.core import events as ev
from storaged.core.model import Config, DirtyLimits, Told
from storaged.core.state import State
from storaged.errors import FilesystemError, Kind, StoragedError
from storaged.resize.job import JobState
from storaged.runtime import StorageService
from storaged.sim import MemoryJournal, SimDisk, SimSysctl, make_world
from storaged.sim.system import FOUND
from storaged.units import GIB, MIB, SECTOR
from tests.rpc.conftest import QUICK, RealTime, until


class Guest:
    """A service without a server, on a simulated disk."""

    def __init__(self, config: Config = QUICK) -> None:
        self.config = config
        self.disk = SimDisk(8 * GIB, 16 * GIB)
        self.sysctl = SimSysctl(faults=self.disk.faults)
        self.journal = MemoryJournal(self.disk.faults)
        self.service = self.fresh()

    def fresh(self) -> StorageService:
        """Another daemon on what there is."""
        world = make_world(self.disk, clock=RealTime(), sysctl=self.sysctl, journal=self.journal)
        self.service = StorageService(world, self.config)
        return self.service

    @property
    def available(self) -> int:
        """What applications can write."""
        return self.service.world.filesystem.space().available

    @property
    def state(self) -> State:
        """What readers see."""
        return self.service.snapshot.state


@pytest.fixture
async def guest(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guest]:
    monkeypatch.setattr(runtime, "ANSWER_WITHIN_S", 2.0)
    one = Guest()
    await one.service.start()
    try:
        yield one
    finally:
        one.disk.faults.clear()
        await one.service.stop()


async def test_a_snapshot_never_goes_back(guest: Guest) -> None:
    seen = []
    guest.service.observe(lambda _event, _state: seen.append(guest.service.snapshot.sequence))
    await guest.service.report(Told.NORMAL, 3 * GIB)
    await guest.service.resize(12 * GIB)
    await until(lambda: ended(guest))
    assert seen == sorted(set(seen))


async def ended(guest: Guest) -> bool:
    """True when no job is active."""
    return guest.state.active_job is None


async def test_a_release_that_is_not_through_is_not_said_to_be(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ANSWER_WITHIN_S", 0.3)
    await guest.service.report(Told.NORMAL, 3 * GIB)
    let_go = guest.disk.faults.hang("remove")
    with pytest.raises(FilesystemError, match="not released yet"):
        await guest.service.release()
    let_go.set()
    guest.disk.faults.clear()
    await guest.service.release()
    assert guest.service.world.balloon.size() == 0


async def test_the_answer_is_true_when_it_comes(guest: Guest) -> None:
    for free in (5 * GIB, 2 * GIB, GIB, 9 * GIB):
        assert await guest.service.report(Told.NORMAL, free) == ""
        space = guest.service.world.filesystem.space()
        assert guest.service.snapshot.space.available == space.available
        assert space.available - max(free - GIB, 0) < SECTOR or guest.service.world.balloon.size() == 0
        assert guest.journal.text is not None
        assert f'"limit": {max(free - GIB, 0)}' in guest.journal.text, "and durable"


async def test_many_reports_at_once_end_at_the_last(guest: Guest) -> None:
    frees = [GIB, 5 * GIB, 2 * GIB, 7 * GIB, 3 * GIB]
    answers = await asyncio.gather(*(guest.service.report(Told.NORMAL, free) for free in frees))
    assert set(answers) == {""}
    assert guest.state.balloon.limit == 2 * GIB
    available = guest.service.world.filesystem.space().available
    assert available <= 2 * GIB + guest.disk.data_chunk + (4 << 20)


async def test_a_report_that_nobody_waits_for_any_more_still_counts(guest: Guest) -> None:
    going = guest.disk.faults.hang("extend")
    task = asyncio.ensure_future(guest.service.report(Told.NORMAL, 3 * GIB))
    await asyncio.sleep(0.02)
    task.cancel()
    going.set()
    assert await guest.service.report(Told.NORMAL, 3 * GIB) == ""


async def test_a_limit_that_cannot_be_saved_is_held_and_no_success(guest: Guest) -> None:
    guest.disk.faults.fail("save", FilesystemError("no room for the journal", errno.ENOSPC), times=2)
    for _ in range(2):  # the second time nothing is new but what was not saved
        assert "no room for the journal" in await guest.service.report(Told.NORMAL, 3 * GIB)
        assert guest.available <= 2 * GIB + 64 * MIB, "held all the same"
    assert any("no room for the journal" in note for note in guest.service.snapshot.notes)
    assert await guest.service.report(Told.NORMAL, 2 * GIB) == ""
    assert guest.journal.text is not None
    assert f'"limit": {GIB}' in guest.journal.text


@pytest.mark.parametrize("text", ["{}", '{"version": 99}', '{"version": 1, "limit": -5}'])
async def test_a_journal_that_cannot_be_believed_is_noted_and_stops_nothing(text: str) -> None:
    guest = Guest()
    guest.journal.text = text
    await guest.service.start()
    assert any("cannot be believed" in note for note in guest.service.snapshot.notes)
    assert await guest.service.report(Told.NORMAL, 3 * GIB) == ""
    await guest.service.stop()


async def test_a_balloon_without_a_journal_is_kept() -> None:
    guest = Guest()
    await guest.service.start()
    await guest.service.report(Told.NORMAL, 3 * GIB)
    held = guest.service.world.balloon.size()
    await guest.service.stop()
    guest.journal.text = None
    await guest.fresh().start()
    assert guest.service.world.balloon.size() == held
    assert any("without a record" in note for note in guest.service.snapshot.notes)
    await guest.service.stop()


async def test_release_gives_all_back_and_the_next_start_holds_nothing() -> None:
    guest = Guest()
    await guest.service.start()
    await guest.service.report(Told.CRITICAL, 0)
    assert guest.sysctl.limits != FOUND
    await guest.service.stop(release=True)
    assert guest.sysctl.limits == FOUND
    assert guest.service.world.balloon.size() == 0
    await guest.fresh().start()
    assert guest.state.balloon.limit is None
    assert guest.service.world.balloon.size() == 0
    await guest.service.stop()


async def test_a_release_that_fails_says_why(guest: Guest) -> None:
    await guest.service.report(Told.NORMAL, 3 * GIB)
    guest.disk.faults.fail("remove", FilesystemError("in use", errno.EBUSY, Kind.BUSY))
    with pytest.raises(FilesystemError, match="in use"):
        await guest.service.release()


async def test_write_back_limits_that_could_not_be_put_back_are_tried_again(guest: Guest) -> None:
    await guest.service.report(Told.LOW, 2 * GIB)
    guest.disk.faults.fail("set_dirty_limits", FilesystemError("busy", errno.EBUSY))
    for _ in range(3):
        await guest.service.report(Told.NORMAL, 9 * GIB)
        await asyncio.sleep(QUICK.settle_s + 0.1)
    assert guest.sysctl.limits == FOUND


async def test_suspend_leaves_everything_durable(guest: Guest) -> None:
    await guest.service.report(Told.NORMAL, 3 * GIB)
    syncs = guest.disk.faults.calls["sync"]
    saves = guest.disk.faults.calls["save"]
    await guest.service.suspend()
    assert guest.disk.faults.calls["sync"] == syncs + 1
    assert guest.disk.faults.calls["save"] == saves + 1


async def test_available_is_the_kernels_number_where_it_can_be_believed(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = guest.service.world.filesystem
    monkeypatch.setattr(fs, "statvfs_available", lambda: 123)
    assert await guest.service.available() == 123
    monkeypatch.setattr(fs, "statvfs_available", lambda: None)
    assert await guest.service.available() == fs.space().available


async def test_bounds_while_a_job_runs_are_those_before_it(guest: Guest) -> None:
    guest.disk.write(GIB)
    before = await guest.service.bounds()
    going = guest.disk.faults.hang("resize")
    await guest.service.resize(4 * GIB)
    assert await asyncio.wait_for(guest.service.bounds(), 1) == before
    going.set()
    await until(lambda: ended(guest))


async def test_watch_says_the_same_thing_once(guest: Guest) -> None:
    stream = guest.service.watch(0.01)
    await anext(stream)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.1)


async def test_trim_on_a_disk_that_cannot(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest.service.world.filesystem, "discard_supported", lambda: False)
    with pytest.raises(StoragedError, match="cannot discard") as caught:
        await guest.service.trim(reclaim=False)
    assert caught.value.kind is Kind.UNSUPPORTED


async def test_a_trim_in_the_background_that_fails_is_noted(guest: Guest) -> None:
    guest.disk.faults.fail("trim", FilesystemError("interrupted", errno.EINTR))
    await guest.service.report(Told.LOW, 2 * GIB)

    async def noted() -> bool:
        return any("interrupted" in note for note in guest.service.snapshot.notes)

    await until(noted)


async def test_a_cancel_answers_with_the_job_that_it_cancelled(guest: Guest) -> None:
    await guest.service.resize(12 * GIB)
    await until(lambda: ended(guest))
    first = guest.state.job
    assert first is not None
    cancels = [guest.service.resize(20 * GIB), guest.service.cancel()]
    _, job = await asyncio.gather(*cancels, return_exceptions=True)
    if not isinstance(job, BaseException):
        assert getattr(job, "id", None) != first.id


async def test_a_cancel_behind_other_events_answers_with_its_own_job(guest: Guest) -> None:
    await guest.service.resize(12 * GIB)
    await until(lambda: ended(guest))
    clock = guest.service.world.clock
    facts = ev.Facts(12 * GIB, 16 * GIB, GIB)
    guest.service._post(ev.Trimmed(0))
    guest.service._post(ev.ResizeRequested(20 * GIB, "second", facts, clock.monotonic(), clock.wall()))
    job = await guest.service.cancel()
    assert (job.id, job.state) == ("second", JobState.CANCELLED)


async def test_write_back_limits_are_never_taken_for_the_machines_own_twice(guest: Guest) -> None:
    await guest.service.report(Told.LOW, 2 * GIB)
    await guest.service.report(Told.CRITICAL, 0)
    assert guest.state.dirty_found == FOUND
    assert guest.sysctl.limits == DirtyLimits(QUICK.critical_dirty, QUICK.critical_dirty // 2, 0, 0)


async def test_stop_twice_and_stop_before_start() -> None:
    guest = Guest()
    await guest.service.stop()
    await guest.service.start()
    await guest.service.stop()
    await guest.service.stop()


@pytest.mark.parametrize("level", ["LOW", "CRITICAL"])
async def test_after_a_reboot_the_write_back_limits_are_lowered_again(level: str, tmp_path: Path) -> None:
    """A reboot resets /proc/sys, and the journal still says that the host is short."""
    guest = Guest()
    await guest.service.start()
    await guest.service.report(Told[level], 2 * GIB)
    await guest.service.stop()
    guest.sysctl = SimSysctl(faults=guest.disk.faults)
    await guest.fresh().start()
    limits = guest.sysctl.limits
    await guest.service.stop()
    assert limits.dirty_bytes > 0


async def test_it_stops_also_when_an_event_comes_in_the_same_moment() -> None:
    """Python 3.11's wait_for swallows a cancel that meets a result."""
    for turns in range(6):
        guest = Guest()
        await guest.service.start()
        await guest.service.report(Told.NORMAL, 3 * GIB)
        stopping = asyncio.ensure_future(guest.service.stop())
        for _ in range(turns):
            await asyncio.sleep(0)
        guest.service._post(ev.Trimmed(0))
        await asyncio.wait_for(stopping, 10)
