"""Resize of storaged.v1: best efforts and retargets, on a simulated guest behind a real gRPC server."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB, MIB
from tests.rpc.conftest import EMPTY, Guest, refused, until

STATUS = vm.ResizeFilesystemResponse


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


async def test_two_retargets_at_once_are_both_heard_and_the_later_holds(guest: Guest) -> None:
    guest.disk.write(3 * GIB)
    guest.disk.of("data")[0].used = 0
    guest.disk.speed = 200 * MIB
    minimum = (await guest.maitred.GetResizeBounds(EMPTY)).minimum_size
    await guest.storage.Resize(pb.ResizeRequest(size_bytes=minimum))

    async def running() -> bool:
        return guest.disk.faults.calls["resize"] > 0

    await until(running)
    sizes = (minimum + 100 * MIB, 12 * GIB)
    calls = [guest.storage.Resize(pb.ResizeRequest(size_bytes=size, retarget=True)) for size in sizes]
    asked = {(await call).job.requested_size for call in calls}
    assert asked == set(sizes)


async def test_who_gives_up_on_a_retarget_still_gets_it(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.disk.write(5 * GIB)
    for chunk in guest.disk.of("data"):
        chunk.used = max(chunk.used - 300 * MIB, 8 * MIB)
    guest.disk.speed = 10 * MIB
    await guest.storage.Resize(pb.ResizeRequest(size_bytes=5 * GIB))

    async def running() -> bool:
        return guest.disk.faults.calls["resize"] > 0

    await until(running)  # before, a cancel need not ask the kernel
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
