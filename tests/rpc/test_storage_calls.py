"""The storage calls as a host makes them, on a simulated guest behind a real gRPC server."""

from __future__ import annotations

import asyncio
import errno
import time
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from storaged import runtime
from storaged.errors import FilesystemError, Kind
from storaged.resize.job import JobState
from storaged.rpc.extension import Storage as StorageServicer
from storaged.rpc.maitred import Maitred
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.rpc.status import CODES
from storaged.sim.system import FOUND
from storaged.units import GIB, MIB
from tests.rpc.conftest import EMPTY, Guest, refused, until

STATUS = vm.ResizeFilesystemResponse
LOW, CRITICAL = vm.DISK_LOW, vm.DISK_CRITICAL


def test_every_kind_of_error_has_a_status_of_its_own() -> None:
    assert set(CODES) == set(Kind)
    assert len(set(CODES.values())) == len(Kind)
    assert grpc.StatusCode.OK not in CODES.values()


# --- UpdateStorageBalloon -------------------------------------------------------------------------------------


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


# --- ResizeFilesystem and GetResizeStatus ---------------------------------------------------------------------


async def test_a_host_that_polls_at_once_sees_the_resize(guest: Guest) -> None:
    going = guest.disk.faults.hang("resize")
    assert await guest.resize(4 * GIB) == STATUS.STARTED
    status = await guest.status()
    assert (status.resize_in_progress, status.current_size, status.target_size) == (True, 8 * GIB, 4 * GIB)
    going.set()
    await until(guest.idle)
    status = await guest.status()
    assert (status.current_size, status.target_size) == (4 * GIB, 4 * GIB)


@pytest.mark.parametrize("size", [12 * GIB, 12 * GIB + 1, 4 * GIB + 4095, 8 * GIB, 8 * GIB + 17])
async def test_the_size_that_was_asked_for_is_echoed(guest: Guest, size: int) -> None:
    assert await guest.resize(size) == STATUS.STARTED
    await until(guest.idle)
    assert (await guest.status()).current_size == size
    assert guest.disk.size == size // 4096 * 4096


async def test_a_second_resize_is_answered_in_band(guest: Guest) -> None:
    guest.disk.faults.hang("resize")
    answers = await asyncio.gather(*(guest.resize(size * GIB) for size in (4, 5, 6, 7)))
    assert sorted(answers) == [STATUS.ALREADY_IN_PROGRESS] * 3 + [STATUS.STARTED]
    assert await guest.resize(12 * GIB) == STATUS.ALREADY_IN_PROGRESS


async def test_when_a_job_is_over_the_balloon_is_what_the_report_says(guest: Guest) -> None:
    assert await guest.report_free(2 * GIB) == vm.SUCCESS
    for size in (6 * GIB, 3 * GIB, 12 * GIB, 5 * GIB):
        assert await guest.resize(size) == STATUS.STARTED
        while (await guest.status()).resize_in_progress:
            pass
        snapshot = guest.service.snapshot  # as it was published together with the job's end
        assert snapshot.state.balloon.size == guest.world.balloon.size()


async def test_who_waits_for_bounds_waits_for_no_job(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "READ_WITHIN_S", 0.2)
    guest.disk.faults.hang("sync")  # what has to come before the bounds are known
    guest.disk.faults.hang("resize")
    shrink = asyncio.ensure_future(guest.resize(6 * GIB))
    bounds = asyncio.ensure_future(refused(guest.maitred.GetResizeBounds(EMPTY)))
    await until(lambda: _reached(guest, "sync"))
    assert (await guest.maitred.GetAvailableSpace(EMPTY)).available_space > 0
    assert await guest.resize(12 * GIB) == STATUS.STARTED
    assert await asyncio.wait_for(shrink, 1) == STATUS.ALREADY_IN_PROGRESS
    code, text = await asyncio.wait_for(bounds, 1)
    assert code is grpc.StatusCode.ABORTED
    assert "known after it" in text


async def _reached(guest: Guest, operation: str) -> bool:
    return guest.disk.faults.calls[operation] > 0


@pytest.mark.parametrize(
    ("size", "code"),
    [
        (0, grpc.StatusCode.INVALID_ARGUMENT),
        (1, grpc.StatusCode.INVALID_ARGUMENT),
        (256 * MIB - 1, grpc.StatusCode.INVALID_ARGUMENT),
        (1 << 63, grpc.StatusCode.INVALID_ARGUMENT),
        ((1 << 64) - 1, grpc.StatusCode.INVALID_ARGUMENT),
        (300 * MIB, grpc.StatusCode.OUT_OF_RANGE),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_starts(guest: Guest, size: int, code: grpc.StatusCode) -> None:
    guest.disk.write(3 * GIB)
    state = guest.service.snapshot.state
    found, text = await refused(guest.resize(size))
    assert found is code
    assert str(size) in text
    assert guest.service.snapshot.state == state
    assert (await guest.status()).current_size == 8 * GIB
    assert guest.disk.faults.calls["resize"] == 0


async def test_the_bound_is_reached(guest: Guest) -> None:
    guest.disk.write(2 * GIB)
    await guest.report_free(3 * GIB)
    minimum = (await guest.maitred.GetResizeBounds(EMPTY)).minimum_size
    assert 2 * GIB <= minimum < 4 * GIB
    assert await guest.resize(minimum) == STATUS.STARTED
    job = await guest.ended()
    assert (job.state, job.current_size, job.reason) == (pb.JOB_DONE, minimum, "")


async def test_the_balloon_is_right_again_when_the_host_hears_of_the_end(guest: Guest) -> None:
    await guest.report_free(3 * GIB)
    await guest.resize(4 * GIB)
    await until(guest.idle)
    available = (await guest.maitred.GetAvailableSpace(EMPTY)).available_space
    assert available <= 2 * GIB + guest.disk.data_chunk + 4 * MIB
    assert available >= 2 * GIB - guest.disk.data_chunk


async def test_nothing_grows_while_the_host_is_critically_full(guest: Guest) -> None:
    await guest.report_free(0, CRITICAL)
    code, text = await refused(guest.resize(9 * GIB))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "critically" in text


async def test_a_job_waits_for_its_device_and_starts_when_it_is_there(guest: Guest) -> None:
    await guest.stop()
    guest.config = replace(guest.config, capacity_wait_s=60.0, capacity_poll_s=60.0)  # only the event tells
    await guest.start()
    assert await guest.resize(20 * GIB) == STATUS.STARTED
    status = await guest.status()
    assert (status.resize_in_progress, status.current_size) == (True, 8 * GIB)
    assert (await guest.report()).job.state == pb.JOB_WAITING_FOR_CAPACITY
    guest.disk.set_device(20 * GIB)
    guest.service.capacity_changed()
    job = await guest.ended()
    assert (job.state, job.current_size) == (pb.JOB_DONE, 20 * GIB)


async def test_a_job_finds_its_device_without_an_event(guest: Guest) -> None:
    await guest.resize(20 * GIB)
    guest.disk.set_device(24 * GIB)
    assert (await guest.ended()).state == pb.JOB_DONE


async def test_a_job_does_not_wait_for_ever(guest: Guest) -> None:
    started = time.monotonic()
    await guest.resize(20 * GIB)
    job = await guest.ended()
    assert job.state == pb.JOB_FAILED
    assert "did not grow within" in job.reason
    assert str(16 * GIB) in job.reason
    assert guest.config.capacity_wait_s <= time.monotonic() - started < guest.config.capacity_wait_s + 0.5
    status = await guest.status()
    assert (status.resize_in_progress, status.current_size, status.target_size) == (False, 8 * GIB, 20 * GIB)
    assert await guest.resize(12 * GIB) == STATUS.STARTED, "not in progress for ever"


async def test_a_failed_resize_leaves_a_reason_and_the_true_size(guest: Guest) -> None:
    guest.disk.faults.fail("resize", FilesystemError("the kernel said no", errno.EIO), times=10)
    await guest.resize(4 * GIB)
    job = await guest.ended()
    assert job.state == pb.JOB_FAILED
    assert "the kernel said no" in job.reason
    assert (await guest.status()).current_size == 8 * GIB


async def test_a_busy_kernel_is_waited_for(guest: Guest) -> None:
    guest.disk.faults.fail("resize", FilesystemError("balance", errno.EINPROGRESS, Kind.BUSY), times=2)
    await guest.resize(4 * GIB)
    assert (await guest.ended()).state == pb.JOB_DONE


async def test_a_paused_balance_is_not_waited_for(guest: Guest) -> None:
    guest.disk.exclusive_operation = "balance paused"
    await guest.resize(12 * GIB)
    job = await guest.ended()
    assert job.state == pb.JOB_FAILED
    assert "cancel the paused balance first" in job.reason


async def test_a_disk_that_fails_while_a_failure_is_healed_still_ends_the_job(guest: Guest) -> None:
    going = guest.disk.faults.hang("resize")
    await guest.resize(4 * GIB)
    guest.disk.faults.fail("resize", FilesystemError("no room", errno.ENOSPC), times=3)
    guest.disk.faults.fail("space", FilesystemError("broken", errno.EIO), times=3)
    going.set()
    await until(guest.idle, 1)


# --- CancelResize ---------------------------------------------------------------------------------------------


async def test_cancel_without_a_job(guest: Guest) -> None:
    code, _ = await refused(guest.storage.CancelResize(pb.CancelResizeRequest()))
    assert code is grpc.StatusCode.FAILED_PRECONDITION


async def test_cancel_while_waiting(guest: Guest) -> None:
    await guest.resize(20 * GIB)
    job = (await guest.storage.CancelResize(pb.CancelResizeRequest())).job
    assert (job.state, job.current_size, job.requested_size) == (pb.JOB_CANCELLED, 8 * GIB, 20 * GIB)
    assert job.reason
    assert job.HasField("ended_at")


async def test_cancel_while_preparing(guest: Guest) -> None:
    facts = await guest.service.bounds()

    async def bounds(**_: float) -> object:
        return facts

    guest.service.bounds = bounds  # type: ignore[assignment,method-assign]  # so that only the job waits for the disk
    going = guest.disk.faults.hang("sync")
    assert await guest.resize(4 * GIB) == STATUS.STARTED
    assert (await guest.report()).job.state == pb.JOB_PREPARING
    cancel = asyncio.ensure_future(guest.storage.CancelResize(pb.CancelResizeRequest()))
    await asyncio.sleep(0.05)
    assert not cancel.done(), "it answers at the end"
    assert (await guest.report()).job.state == pb.JOB_CANCELLING
    guest.disk.faults.clear()
    going.set()
    job = (await cancel).job
    assert (job.state, job.current_size, guest.disk.size) == (pb.JOB_CANCELLED, 8 * GIB, 8 * GIB)


async def test_cancel_while_running_keeps_the_steps_that_were_done(guest: Guest) -> None:
    await guest.report_free(2 * GIB)
    going = guest.disk.faults.hang("resize")
    await guest.resize(3 * GIB)

    async def running() -> bool:
        return guest.service.snapshot.state.job is not None and guest.disk.faults.calls["resize"] > 0

    await until(running)
    cancels = [asyncio.ensure_future(guest.storage.CancelResize(pb.CancelResizeRequest())) for _ in range(3)]

    async def cancelling() -> bool:
        job = guest.service.snapshot.state.job
        return job is not None and job.state is JobState.CANCELLING

    await until(cancelling)
    await asyncio.sleep(0.05)
    going.set()
    jobs = [(await cancel).job for cancel in cancels]
    assert {job.state for job in jobs} == {pb.JOB_CANCELLED}
    assert {job.current_size for job in jobs} == {guest.disk.size}
    assert 3 * GIB < guest.disk.size < 8 * GIB, "one step was made"
    assert (await guest.status()).current_size == guest.disk.size


async def test_stopping_the_daemon_ends_the_job_first(guest: Guest) -> None:
    await guest.report_free(2 * GIB)
    held = guest.world.balloon.size()
    await guest.resize(20 * GIB)
    await guest.stop()
    job = guest.service.snapshot.state.job
    assert job is not None
    assert (job.state, job.reason) == (JobState.CANCELLED, "storaged was stopped")
    assert guest.world.balloon.size() == held, "the balloon stays"
    await guest.start()
    report = await guest.report()
    assert report.job.state == pb.JOB_CANCELLED
    assert report.balloon.limit_bytes == GIB
    assert await guest.resize(12 * GIB) == STATUS.STARTED


# --- Resize of storaged.v1 ------------------------------------------------------------------------------------


async def test_a_best_effort_goes_below_the_minimum_and_ends_well(guest: Guest) -> None:
    guest.disk.write(2 * GIB)
    await guest.storage.Trim(pb.TrimRequest())  # a commit
    minimum = (await guest.maitred.GetResizeBounds(EMPTY)).minimum_size
    target = 512 * MIB
    assert (await refused(guest.storage.Resize(pb.ResizeRequest(size_bytes=target))))[0] is grpc.StatusCode.OUT_OF_RANGE
    job = (await guest.storage.Resize(pb.ResizeRequest(size_bytes=target, best_effort=True))).job
    assert (job.best_effort, job.requested_size, job.direction) == (True, target, pb.DIRECTION_SHRINK)
    ended = await guest.ended()
    assert (ended.state, ended.progress) == (pb.JOB_DONE, 1.0)
    assert ended.current_size == guest.disk.size
    assert target < guest.disk.size <= minimum
    assert ended.reason, "why it went no further"
    status = await guest.status()
    assert status.current_size == status.target_size == guest.disk.size, "hosts that compare the two see no failure"


async def test_only_a_shrink_can_be_a_best_effort(guest: Guest) -> None:
    for size in (8 * GIB, 9 * GIB):
        call = guest.storage.Resize(pb.ResizeRequest(size_bytes=size, best_effort=True))
        assert (await refused(call))[0] is grpc.StatusCode.OUT_OF_RANGE
    call = guest.storage.Resize(pb.ResizeRequest(best_effort=True))
    assert (await refused(call))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_another_target_while_a_job_runs_needs_a_word(guest: Guest) -> None:
    first = (await guest.storage.Resize(pb.ResizeRequest(size_bytes=20 * GIB))).job  # waits for its device
    assert (await refused(guest.storage.Resize(pb.ResizeRequest(size_bytes=6 * GIB))))[0] is grpc.StatusCode.ABORTED
    second = (await guest.storage.Resize(pb.ResizeRequest(size_bytes=6 * GIB, retarget=True))).job
    assert second.id != first.id
    assert (await guest.ended()).id == second.id
    assert guest.disk.size == 6 * GIB
    notes = (await guest.report()).notes
    assert any(f"another size was asked for: {6 * GIB} bytes" in note for note in notes)


async def test_a_new_target_that_cannot_be_cancels_nothing(guest: Guest) -> None:
    guest.disk.write(4 * GIB)
    await guest.maitred.GetResizeBounds(EMPTY)
    first = (await guest.storage.Resize(pb.ResizeRequest(size_bytes=20 * GIB))).job
    call = guest.storage.Resize(pb.ResizeRequest(size_bytes=GIB, retarget=True))
    assert (await refused(call))[0] is grpc.StatusCode.OUT_OF_RANGE
    now = (await guest.report()).job
    assert (now.id, now.state) == (first.id, pb.JOB_WAITING_FOR_CAPACITY)
    call = guest.storage.Resize(pb.ResizeRequest(size_bytes=5, retarget=True))
    assert (await refused(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert (await guest.report()).job.state == pb.JOB_WAITING_FOR_CAPACITY


async def test_nonsense_cancels_nothing_also_while_the_bounds_are_not_known(guest: Guest) -> None:
    first = (await guest.storage.Resize(pb.ResizeRequest(size_bytes=20 * GIB))).job
    for size, best_effort in ((5, False), (0, True), (1 << 63, False), (9 * GIB, True)):
        request = pb.ResizeRequest(size_bytes=size, retarget=True, best_effort=best_effort)
        code = (await refused(guest.storage.Resize(request)))[0]
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
    now = (await guest.report()).job
    assert (now.id, now.state) == (first.id, pb.JOB_WAITING_FOR_CAPACITY)


async def test_a_target_below_bounds_that_nobody_has_read_cancels_nothing(guest: Guest) -> None:
    guest.disk.write(4 * GIB)
    first = (await guest.storage.Resize(pb.ResizeRequest(size_bytes=20 * GIB))).job
    call = guest.storage.Resize(pb.ResizeRequest(size_bytes=GIB, retarget=True))
    assert (await refused(call))[0] is grpc.StatusCode.OUT_OF_RANGE
    assert (await guest.report()).job.state == pb.JOB_WAITING_FOR_CAPACITY
    guest.disk.read_only = True
    call = guest.storage.Resize(pb.ResizeRequest(size_bytes=19 * GIB, retarget=True))
    assert (await refused(call))[0] is grpc.StatusCode.FAILED_PRECONDITION
    now = (await guest.report()).job
    assert (now.id, now.state) == (first.id, pb.JOB_WAITING_FOR_CAPACITY)


async def test_who_gives_up_on_a_retarget_still_gets_it(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.disk.write(5 * GIB)
    for chunk in guest.disk.of("data"):
        chunk.used = max(chunk.used - 300 * MIB, 8 * MIB)
    guest.disk.speed = 10 * MIB
    await guest.storage.Resize(pb.ResizeRequest(size_bytes=5 * GIB))
    kernel = guest.service.world.resizer.cancel

    def cancel() -> None:
        time.sleep(0.6)
        kernel()

    monkeypatch.setattr(guest.service.world.resizer, "cancel", cancel)
    call = guest.storage.Resize(pb.ResizeRequest(size_bytes=7 * GIB, retarget=True), timeout=0.3)
    assert (await refused(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    guest.disk.speed = None

    async def there() -> bool:
        return guest.disk.size == 7 * GIB

    await until(there)


async def test_a_request_that_met_a_job_is_not_judged_by_what_was_known_under_it(guest: Guest) -> None:
    journal = guest.service.world.journal
    save = journal.save

    def slowly(record: dict[str, object]) -> None:
        time.sleep(0.3)
        save(record)

    journal.save = slowly  # type: ignore[method-assign]
    await guest.report_free(3 * GIB)
    guest.disk.set_device(16 * GIB)
    first = asyncio.create_task(guest.resize(15 * GIB))

    async def grown() -> bool:
        return guest.disk.size == 15 * GIB

    await until(grown)
    # The kernel has grown it, and the journal is being written: the job is not over yet.
    assert await guest.resize(9 * GIB) == STATUS.ALREADY_IN_PROGRESS
    assert await first == STATUS.STARTED
    await guest.ended()
    assert guest.disk.size == 15 * GIB


async def test_retarget_without_a_job_is_a_resize(guest: Guest) -> None:
    job = (await guest.storage.Resize(pb.ResizeRequest(size_bytes=7 * GIB, retarget=True))).job
    assert (await guest.ended()).id == job.id
    assert guest.disk.size == 7 * GIB


# --- the report and its stream --------------------------------------------------------------------------------


async def test_the_report_adds_up(guest: Guest) -> None:
    guest.disk.write(GIB)
    await guest.report_free(3 * GIB)
    report = await guest.report()
    fs = report.filesystem
    assert report.simulated
    assert report.version
    assert (fs.size_bytes, fs.device_bytes, fs.mountpoint) == (8 * GIB, 16 * GIB, "/sim")
    assert fs.available_bytes == fs.data_total_bytes - fs.data_used_bytes + fs.unallocated_bytes
    assert report.pressure.host_free_bytes == 3 * GIB
    assert report.balloon.limit_bytes == 2 * GIB
    assert report.balloon.size_bytes == guest.world.balloon.size()
    assert report.balloon.inflated_bytes_total - report.balloon.deflated_bytes_total == report.balloon.size_bytes
    assert abs(report.time.seconds - time.time()) < 5
    assert not report.HasField("job")
    assert not report.HasField("dirty_limits_found")


async def test_the_report_has_the_bounds_of_now(guest: Guest) -> None:
    for size in (GIB, 2 * GIB):
        guest.disk.write(size)
        report = await guest.report()
        assert report.bounds.minimum_size == (await guest.maitred.GetResizeBounds(EMPTY)).minimum_size
        assert report.bounds.guaranteed_size >= report.bounds.minimum_size
        assert report.bounds.why


async def test_reports_one_after_the_other_leave_the_disk_alone(guest: Guest) -> None:
    await guest.report()
    before = guest.disk.faults.calls["sync"]
    for _ in range(10):
        await guest.report()
    assert guest.disk.faults.calls["sync"] == before


async def test_before_the_first_report_nothing_is_made_up(guest: Guest) -> None:
    report = await guest.report()
    assert report.pressure.level == pb.LEVEL_UNKNOWN
    assert not report.pressure.HasField("host_free_bytes")
    assert not report.balloon.HasField("limit_bytes")


async def report_of(stream: object) -> pb.Report:
    """The next report of a stream."""
    answer = await stream.read()  # type: ignore[attr-defined]  # a call of grpc.aio
    assert isinstance(answer, pb.Report)
    return answer


async def test_watch_starts_with_what_is_and_goes_on_with_what_changes(guest: Guest) -> None:
    stream = guest.storage.Watch(pb.WatchRequest())
    first = await report_of(stream)
    await guest.report_free(3 * GIB)
    second = await asyncio.wait_for(report_of(stream), 2)
    assert second.sequence > first.sequence
    assert second.balloon.limit_bytes == 2 * GIB
    stream.cancel()


@pytest.mark.parametrize("interval", [-1.0, 3601.0, float("nan"), float("inf")])
async def test_watch_refuses_intervals_that_make_no_sense(guest: Guest, interval: float) -> None:
    code, text = await refused(guest.storage.Watch(pb.WatchRequest(min_interval_s=interval)).read())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "min_interval_s" in text


async def test_trim(guest: Guest) -> None:
    guest.disk.write(2 * GIB)
    guest.disk.delete(2 * GIB)
    answer = await guest.storage.Trim(pb.TrimRequest(reclaim_empty_chunks=True))
    assert answer.trimmed_bytes > 0
    assert guest.disk.of("data") == []
    assert (await guest.report()).reclaimed_bytes_total == answer.trimmed_bytes


@pytest.mark.parametrize("reclaim", [True, False])
async def test_a_trim_reaches_what_was_deleted_just_before_it(guest: Guest, reclaim: bool) -> None:
    guest.disk.write(2 * GIB)
    guest.disk.delete(2 * GIB)
    await guest.storage.Trim(pb.TrimRequest(reclaim_empty_chunks=reclaim))
    assert (guest.disk.freed, guest.disk.untrimmed) == (0, 0)


async def test_a_trim_that_fails_says_why(guest: Guest) -> None:
    guest.disk.faults.fail("trim", FilesystemError("interrupted", errno.EINTR, Kind.BUSY))
    code, text = await refused(guest.storage.Trim(pb.TrimRequest()))
    assert code is grpc.StatusCode.ABORTED
    assert "interrupted" in text


# --- the server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "vm_tools.Maitred", "storaged.v1.Storage"])
async def test_health(guest: Guest, name: str) -> None:
    stub: Any = health_pb2_grpc.HealthStub(guest.channel)  # described for blocking channels
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    code, _ = await refused(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_reflection(guest: Guest) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", guest.channel))
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        names = {service.name for service in answer.list_services_response.service}
        assert {"vm_tools.Maitred", "storaged.v1.Storage", "grpc.health.v1.Health"} <= names


def test_every_method_of_the_contract_is_there() -> None:
    assert {method.name for method in vm.DESCRIPTOR.services_by_name["Maitred"].methods} <= set(vars(Maitred))


async def test_bytes_that_are_no_message_harm_nobody(guest: Guest) -> None:
    for method in ("ResizeFilesystem", "UpdateStorageBalloon", "GetResizeStatus"):
        call: Any = guest.channel.unary_unary(f"/vm_tools.Maitred/{method}")
        code, _ = await refused(call(b"\xff\xff\xff"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await guest.status()).current_size == 8 * GIB


async def test_an_error_nobody_foresaw_is_internal_and_the_daemon_lives(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(guest.service, "bounds", broken)
    code, text = await refused(guest.maitred.GetResizeBounds(EMPTY))
    assert code is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in text
    assert "secret detail" not in text
    assert (await guest.status()).current_size == 8 * GIB


async def test_a_broken_step_is_told_to_whoever_waits_and_ends_nothing(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("storaged.writer.machine.step", broken)
        code, _ = await refused(guest.report_free(3 * GIB))
        assert code is grpc.StatusCode.INTERNAL
    assert await guest.report_free(3 * GIB) == vm.SUCCESS


def test_every_method_of_the_extension_is_served() -> None:
    for method in pb.DESCRIPTOR.services_by_name["Storage"].methods:
        assert method.name in vars(StorageServicer)


async def test_the_kernel_names_itself(guest: Guest) -> None:
    answer = await guest.maitred.GetKernelVersion(EMPTY)
    assert answer.kernel_release
    assert answer.kernel_version


async def test_a_restart_finds_limit_level_and_write_back_limits_again(guest: Guest) -> None:
    await guest.report_free(2 * GIB, LOW)
    held = guest.world.balloon.size()
    await guest.stop()
    guest.config = replace(guest.config, settle_s=0.05)
    await guest.start()
    report = await guest.report()
    assert report.pressure.level == pb.LEVEL_LOW
    assert report.pressure.host_free_bytes == 2 * GIB
    assert report.balloon.limit_bytes == GIB
    assert guest.world.balloon.size() == held
    await guest.report_free(9 * GIB)

    async def normal() -> bool:
        return guest.sysctl.limits == FOUND

    await until(normal)
