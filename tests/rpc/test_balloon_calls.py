"""UpdateStorageBalloon as a host calls it, on a simulated guest behind a real gRPC server."""

from __future__ import annotations

import asyncio
import errno
import time

import grpc
import pytest

from storaged import runtime
from storaged.errors import FilesystemError
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.sim.system import FOUND
from storaged.units import GIB, MIB
from tests.rpc.conftest import EMPTY, Guest, refused, until

LOW, CRITICAL = vm.DISK_LOW, vm.DISK_CRITICAL


async def test_after_success_applications_have_what_the_host_has(guest: Guest) -> None:
    for free in (5 * GIB, 2 * GIB, GIB, 0, 3 * GIB):
        assert await guest.report_free(free) == vm.SUCCESS
        available = (await guest.maitred.GetAvailableSpace(EMPTY)).available_space
        assert available <= max(free - GIB, 0) + guest.disk.data_chunk + 4 * MIB
        assert available >= min(max(free - GIB, 0), 7 * GIB) - MIB


async def test_a_host_that_does_not_know_changes_nothing(guest: Guest) -> None:
    await guest.report_free(3 * GIB)
    held = guest.world.balloon.size()
    assert await guest.report_free(-1, vm.DISK_NONE) == vm.SUCCESS
    assert await guest.report_free(GIB, vm.DISK_NONE) == vm.SUCCESS
    assert await guest.report_free(-(1 << 63), CRITICAL) == vm.SUCCESS
    assert guest.world.balloon.size() == held
    report = await guest.report()
    assert report.pressure.ignored_reports == 3
    assert report.pressure.host_free_bytes == 3 * GIB
    assert report.pressure.level == pb.LEVEL_NORMAL


@pytest.mark.parametrize("state", [4, 99, -1])
async def test_a_state_nobody_knows_is_refused(guest: Guest, state: int) -> None:
    before = guest.service.snapshot
    code, text = await refused(guest.report_free(GIB, state))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(state) in text
    assert guest.service.snapshot == before


async def test_two_reports_at_once_are_both_answered_and_the_later_holds(guest: Guest) -> None:
    going = guest.disk.faults.hang("sync")
    first = asyncio.ensure_future(guest.report_free(4 * GIB))
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(guest.report_free(2 * GIB))
    await asyncio.sleep(0.05)
    assert not first.done()
    guest.disk.faults.clear()
    going.set()
    assert set(await asyncio.wait_for(asyncio.gather(first, second), 5)) == {vm.SUCCESS}
    assert (await guest.report()).balloon.limit_bytes == GIB
    assert (await guest.maitred.GetAvailableSpace(EMPTY)).available_space <= GIB + guest.disk.data_chunk + 4 * MIB


async def test_a_disk_that_hangs_freezes_nobody(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "ANSWER_WITHIN_S", 0.3)
    monkeypatch.setattr(runtime, "READ_WITHIN_S", 0.2)
    guest.disk.faults.hang("extend")
    before = time.monotonic()
    report = asyncio.ensure_future(guest.report_free(2 * GIB))
    slowest = 0.0
    while not report.done():
        asked = time.monotonic()
        await guest.status()
        slowest = max(slowest, time.monotonic() - asked)
        await asyncio.sleep(0.01)
    assert await report == vm.BALLOON_INFLATE_FAILED
    assert time.monotonic() - before < 1
    assert slowest < 0.15
    assert (await guest.report()).balloon.state == pb.BALLOON_INFLATING, "also the report comes"
    guest.disk.faults.clear()

    async def holds() -> bool:
        return (await guest.report()).balloon.state == pb.BALLOON_IDLE

    await until(holds)
    assert await guest.report_free(2 * GIB) == vm.SUCCESS


async def test_a_trim_that_takes_long_delays_nobody(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "ANSWER_WITHIN_S", 0.5)
    guest.disk.faults.hang("trim")
    assert await guest.report_free(2 * GIB, LOW) == vm.SUCCESS
    assert await guest.report_free(GIB + GIB // 2, LOW) == vm.SUCCESS


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.EROFS, "Read-only file system"),
        (errno.EIO, "Input/output error"),
    ],
)
async def test_a_failure_is_answered_with_its_reason_in_the_report_and_tried_again(
    guest: Guest, number: int, text: str
) -> None:
    guest.disk.faults.fail("extend", FilesystemError(text, number), times=2)
    assert await guest.report_free(2 * GIB) == vm.BALLOON_INFLATE_FAILED
    balloon = (await guest.report()).balloon
    assert balloon.state == pb.BALLOON_FAILED
    assert text in balloon.failure_reason
    assert 0 <= balloon.retry_in_s <= guest.config.retry_most_s
    assert balloon.limit_bytes == GIB

    async def again() -> bool:
        return (await guest.report()).balloon.state == pb.BALLOON_IDLE

    await until(again)
    report = await guest.report()
    assert report.balloon.failure_reason == ""
    assert not report.balloon.HasField("retry_in_s")
    assert report.filesystem.available_bytes <= GIB + guest.disk.data_chunk + 4 * MIB
    assert "the balloon is at its target again" in report.notes


async def test_a_busy_kernel_is_named(guest: Guest) -> None:
    guest.disk.exclusive_operation = "balance paused"
    assert await guest.report_free(2 * GIB) == vm.BALLOON_INFLATE_FAILED
    report = await guest.report()
    assert "balance paused" in report.balloon.failure_reason
    assert report.filesystem.exclusive_operation == "balance paused"


async def test_a_read_only_filesystem_is_named(guest: Guest) -> None:
    guest.disk.read_only = True
    assert await guest.report_free(2 * GIB) == vm.BALLOON_INFLATE_FAILED
    report = await guest.report()
    assert "read-only" in report.balloon.failure_reason
    assert report.filesystem.read_only
    code, text = await refused(guest.resize(4 * GIB))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "read-only" in text


async def test_an_error_nobody_foresaw_ends_one_attempt_and_not_the_balloon(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "ANSWER_WITHIN_S", 0.5)
    guest.disk.faults.fail("extend", ValueError("broken"))  # type: ignore[arg-type]  # not what it should raise
    assert await guest.report_free(2 * GIB) == vm.BALLOON_INFLATE_FAILED
    assert await guest.report_free(2 * GIB) == vm.SUCCESS


async def test_write_back_limits_go_down_and_come_back_exactly(guest: Guest) -> None:
    await guest.report_free(2 * GIB, LOW)
    assert guest.sysctl.limits.dirty_bytes == guest.config.low_dirty
    found = (await guest.report()).dirty_limits_found
    assert (found.dirty_ratio, found.dirty_background_ratio) == (FOUND.dirty_ratio, FOUND.dirty_background_ratio)
    await guest.report_free(0, CRITICAL)
    assert guest.sysctl.limits.dirty_bytes == guest.config.critical_dirty
    report = await guest.report()
    assert report.pressure.level == pb.LEVEL_CRITICAL
    await guest.report_free(9 * GIB)
    assert (await guest.report()).pressure.pending_level == pb.LEVEL_NORMAL

    async def normal() -> bool:
        report = await guest.report()
        return report.pressure.level == pb.LEVEL_NORMAL and not report.HasField("dirty_limits_found")

    await until(normal)
    assert guest.sysctl.limits == FOUND
    assert not (await guest.report()).HasField("dirty_limits_found")
