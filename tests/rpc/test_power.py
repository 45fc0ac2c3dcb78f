"""Shutdown and PrepareToSuspend: what runs ends safely, all is durable, the answer goes first."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import grpc
import pytest

from storaged.errors import Kind, StoragedError
from storaged.resize.job import JobState
from storaged.rpc import power as control
from storaged.rpc.proto import common_pb2, storaged_v1_pb2
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.sim.power import SimPower
from storaged.units import GIB, SECTOR
from tests.rpc.conftest import EMPTY, Guest, refused, until

CODE = grpc.StatusCode


class Switch(SimPower):
    """A power switch that tells what was so when it was used."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        self.guest = guest
        self.off = threading.Event()
        self.fails = ""
        self.synced_before: int | None = None

    def power_off(self) -> None:
        self.synced_before = self.guest.disk.faults.calls["sync"]
        super().power_off()
        if self.fails:
            raise StoragedError(self.fails, Kind.UNAVAILABLE)
        self.off.set()


@pytest.fixture
async def switch(guest: Guest) -> AsyncIterator[Switch]:
    """The guest with a switch, and what the daemon runs beside it."""
    await guest.stop()
    guest.power = one = Switch(guest)
    await guest.start()
    assert guest.server.power is not None
    running = asyncio.create_task(guest.server.power.run(guest.server.flushed))
    try:
        yield one
    finally:
        guest.disk.faults.clear()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def off(switch: Switch) -> None:
    assert await asyncio.to_thread(switch.off.wait, 5)


async def shrinking(guest: Guest) -> None:
    """A shrink that would take an hour is under way."""
    guest.disk.write(6 * GIB)
    for chunk in guest.disk.of("data")[:-2]:
        chunk.used = 0  # what is left is at the end, and must be moved
    guest.disk.speed = GIB / 3600
    assert await guest.resize(4 * GIB) == vm.ResizeFilesystemResponse.STARTED

    async def runs() -> bool:
        job = guest.service.snapshot.state.job
        return job is not None and job.state is JobState.RUNNING

    await until(runs)


async def test_the_answer_comes_before_the_power_goes(guest: Guest, switch: Switch) -> None:
    await guest.maitred.Shutdown(EMPTY)
    await off(switch)
    assert switch.done == ["check", "sync", "power off"]
    assert switch.synced_before
    assert switch.synced_before >= 1


async def test_a_running_resize_ends_safely_first(guest: Guest, switch: Switch) -> None:
    await shrinking(guest)
    await guest.maitred.Shutdown(EMPTY)
    job = guest.service.snapshot.state.job
    assert job is not None
    assert (job.state, job.reason) == (JobState.CANCELLED, control.GOING_DOWN)
    assert guest.disk.exclusive_operation == "none"
    saved = guest.journal.load()
    assert saved is not None
    assert control.GOING_DOWN in str(saved)
    await off(switch)


async def test_nothing_new_begins_after_it(guest: Guest, switch: Switch) -> None:
    await guest.maitred.Shutdown(EMPTY)
    await off(switch)
    for call in (guest.report_free(GIB), guest.resize(9 * GIB), guest.status()):
        assert await refused(call) == (CODE.UNAVAILABLE, control.GOING_DOWN)
    await guest.maitred.Shutdown(EMPTY)  # the same end, asked for again


async def test_a_resize_that_was_about_to_start_does_not(guest: Guest, switch: Switch) -> None:
    held = guest.disk.faults.hang("space")
    starting = asyncio.ensure_future(guest.resize(12 * GIB))
    await asyncio.sleep(0.05)
    await guest.maitred.Shutdown(EMPTY)
    held.set()
    code, text = await refused(starting)
    assert (code, control.GOING_DOWN in text) == (CODE.UNAVAILABLE, True)
    assert guest.service.snapshot.state.job is None
    assert guest.disk.size == 8 * GIB


async def test_a_refusal_leaves_everything_running(guest: Guest, switch: Switch) -> None:
    await shrinking(guest)
    switch.fault = StoragedError("logind would not power off: it answers 'no'", Kind.PRECONDITION)
    code, text = await refused(guest.maitred.Shutdown(EMPTY))
    assert (code, "logind would not" in text) == (CODE.FAILED_PRECONDITION, True)
    assert (await guest.status()).resize_in_progress
    assert (await guest.report()).job.progress < 1
    assert switch.done == []


async def test_when_the_power_stays_it_serves_again(guest: Guest, switch: Switch) -> None:
    switch.fails = "the bus is gone"
    await guest.maitred.Shutdown(EMPTY)

    async def serves() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return await guest.resize(12 * GIB) == vm.ResizeFilesystemResponse.STARTED
        return False

    await until(serves)
    assert (await guest.ended()).current_size == 12 * GIB
    assert switch.done == ["check", "sync", "power off"]
    switch.fails = ""
    await guest.maitred.Shutdown(EMPTY)
    await off(switch)
    assert switch.done[3:] == ["check", "sync", "power off"]


async def test_two_who_ask_get_one_end(guest: Guest, switch: Switch) -> None:
    await shrinking(guest)
    answers = await asyncio.gather(*(guest.maitred.Shutdown(EMPTY) for _ in range(3)))
    assert answers == [common_pb2.EmptyMessage()] * 3
    await off(switch)
    assert switch.done.count("power off") == 1


async def test_a_host_that_hangs_up_gets_what_it_asked_for(guest: Guest, switch: Switch) -> None:
    held = guest.disk.faults.hang("sync")
    call = guest.maitred.Shutdown(EMPTY)
    await asyncio.sleep(0.1)
    call.cancel()
    await asyncio.sleep(0.05)
    assert not switch.off.is_set(), "not before everything is durable"
    held.set()
    await off(switch)


async def test_a_hung_disk_does_not_keep_the_answer(
    guest: Guest, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SYNC_WITHIN_S", 0.2)
    guest.disk.faults.hang("sync")
    await guest.maitred.Shutdown(EMPTY, timeout=5)
    await off(switch)


async def test_the_slowest_answer_is_within_a_host_s_deadline() -> None:
    from storaged import runtime

    assert runtime.ANSWER_WITHIN_S + control.SYNC_WITHIN_S < 30


async def test_before_a_sleep_everything_is_durable_and_the_resize_has_stopped_safely(
    guest: Guest, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SLEEPS_WITHIN_S", 0.5)
    await shrinking(guest)
    before = guest.disk.faults.calls["sync"]
    await guest.maitred.PrepareToSuspend(EMPTY)
    assert guest.disk.faults.calls["sync"] > before
    assert switch.done == ["sync"]
    status = await guest.status()
    assert not status.resize_in_progress
    assert status.current_size // SECTOR * SECTOR == guest.disk.size
    job = (await guest.report()).job
    assert (job.state, job.reason) == (storaged_v1_pb2.JOB_CANCELLED, control.GOING_TO_SLEEP)
    saved = guest.journal.load()
    assert saved is not None
    assert "CANCELLED" in str(saved)
    code, text = await refused(guest.resize(16 * GIB))
    assert (code, control.GOING_TO_SLEEP in text) == (CODE.UNAVAILABLE, True)
    assert await guest.report_free(2 * GIB) == vm.SUCCESS, "the host is heard all the time"

    async def awake() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await guest.resize(16 * GIB)
        return (await guest.status()).resize_in_progress or guest.disk.size == 16 * GIB

    await until(awake)


async def test_no_end_of_a_sleep_opens_what_a_shutdown_closed(
    guest: Guest, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SLEEPS_WITHIN_S", 0.1)
    await guest.maitred.PrepareToSuspend(EMPTY)
    await guest.maitred.Shutdown(EMPTY)
    await asyncio.sleep(0.3)
    assert (await refused(guest.resize(16 * GIB)))[0] is CODE.UNAVAILABLE
    await off(switch)


async def test_a_host_hears_when_a_sleep_would_not_be_safe(
    guest: Guest, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SYNC_WITHIN_S", 0.2)
    guest.disk.faults.hang("sync")
    code, text = await refused(guest.maitred.PrepareToSuspend(EMPTY, timeout=5))
    assert (code, "0.2 s" in text) == (CODE.UNAVAILABLE, True)


async def test_a_switch_that_ends_every_process_is_left_to_the_very_end(guest: Guest) -> None:
    class Last(Switch):
        last = True  # what a process 1 has

    await guest.stop()
    guest.power = switch = Last(guest)
    await guest.start()
    power = guest.server.power
    assert power is not None
    await guest.maitred.Shutdown(EMPTY)
    async with asyncio.timeout(5):
        await power.run(guest.server.flushed)
    assert power.due
    assert switch.done == ["check", "sync"]
    power.power_off()
    assert switch.done[-1] == "power off"


async def test_without_a_switch_there_is_no_shutdown(guest: Guest) -> None:
    await guest.stop()
    guest.power = None
    await guest.start()
    for call in (guest.maitred.Shutdown(EMPTY), guest.maitred.PrepareToSuspend(EMPTY)):
        assert (await refused(call))[0] is CODE.UNIMPLEMENTED
