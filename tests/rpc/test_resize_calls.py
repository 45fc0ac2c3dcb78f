"""ResizeFilesystem, GetResizeStatus and CancelResize as a host calls them, on a simulated guest."""

from __future__ import annotations

import asyncio
import errno
import time
from dataclasses import replace

import grpc
import pytest

from storaged import runtime
from storaged.errors import FilesystemError, Kind
from storaged.resize.job import JobState
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB, MIB
from tests.rpc.conftest import EMPTY, Guest, refused, until

STATUS = vm.ResizeFilesystemResponse
CRITICAL = vm.DISK_CRITICAL


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
