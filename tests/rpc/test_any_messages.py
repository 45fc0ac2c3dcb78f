"""Whatever a host sends, in whatever order and at once: the right status each time, and a refusal changes nothing."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import grpc
import grpc.aio
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.core.state import State
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.sim.system import FOUND
from storaged.units import GIB, MIB
from tests.rpc.conftest import EMPTY, Guest, until

DEVICE = 16 * GIB
OK = grpc.StatusCode.OK
Call = tuple[str, int, int]

frees = st.sampled_from([-(1 << 63), -1, 0, 1, GIB, 2 * GIB, 3 * GIB + 12345, 5 * GIB, (1 << 63) - 1])
sizes = st.sampled_from(
    [
        0,
        1,
        4096,
        256 * MIB - 1,
        256 * MIB,
        GIB,
        3 * GIB + 7,
        8 * GIB,
        12 * GIB,
        DEVICE,
        DEVICE + 1,
        1 << 63,
        (1 << 64) - 1,
    ]
)
calls: st.SearchStrategy[Call] = st.one_of(
    st.tuples(st.just("report"), st.sampled_from([0, 1, 2, 3, 4, 99, -1, -(1 << 31), (1 << 31) - 1]), frees),
    st.tuples(st.just("resize"), st.just(0), sizes),
    st.tuples(st.just("go"), st.integers(0, 3), sizes),
    st.tuples(
        st.sampled_from(["status", "bounds", "available", "cancel", "trim", "full report"]), st.just(0), st.just(0)
    ),
    st.tuples(
        st.sampled_from(["write", "delete", "device"]), st.just(0), st.integers(1, 24).map(lambda n: n * GIB // 2)
    ),
)


async def send(guest: Guest, call: Call) -> tuple[grpc.StatusCode, object]:  # noqa: C901, PLR0912  # one arm a call
    """Make one call; its status and answer."""
    name, state, number = call
    answer: object = None
    try:
        match name:
            case "report":
                answer = await guest.report_free(number, state)
            case "resize":
                answer = await guest.resize(number)
            case "go":
                request = pb.ResizeRequest(size_bytes=number, best_effort=bool(state & 1), retarget=bool(state & 2))
                answer = (await guest.storage.Resize(request)).job
            case "status":
                answer = await guest.status()
            case "bounds":
                answer = (await guest.maitred.GetResizeBounds(EMPTY)).minimum_size
            case "available":
                answer = (await guest.maitred.GetAvailableSpace(EMPTY)).available_space
            case "cancel":
                answer = (await guest.storage.CancelResize(pb.CancelResizeRequest())).job
            case "trim":
                answer = await guest.storage.Trim(pb.TrimRequest(reclaim_empty_chunks=True))
            case "full report":
                answer = await guest.report()
            case "write":
                guest.disk.write(number)
            case "delete":
                guest.disk.delete(number)
            case "device":
                guest.disk.set_device(max(number, guest.disk.size))
                guest.service.capacity_changed()
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return OK, answer


def judge(call: Call, code: grpc.StatusCode, answer: object) -> None:
    """The status that this call must have, whatever the state."""
    name, state, number = call
    impossible = name in ("resize", "go") and not 256 * MIB <= number < 1 << 63
    if (name == "report" and state not in (0, 1, 2, 3)) or impossible:
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    elif name == "go":
        refusals = (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED)
        assert code is OK or code in refusals, answer
        if isinstance(answer, pb.Job):
            assert (answer.requested_size, answer.best_effort) == (number, bool(state & 1))
    elif name == "resize":
        assert code in (OK, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION), answer
        assert code is OK or (isinstance(answer, str) and str(number) in answer)
    elif name == "cancel":
        assert code in (OK, grpc.StatusCode.FAILED_PRECONDITION)
    else:
        assert code is OK, answer
    if name == "bounds":
        assert isinstance(answer, int)
        assert answer >= 256 * MIB


def believed(state: State) -> object:
    """What a refusal must leave as it is: all but the passing of time."""
    return state.report, state.balloon.limit, state.ignored_reports, state.job and state.job.id, state.dirty_found


async def one_by_one(guest: Guest, sequence: list[Call]) -> None:
    """Each call by itself, with what it must do and what a refusal must not."""
    for call in sequence:
        before = believed(guest.service.snapshot.state)
        job = guest.service.snapshot.state.active_job
        code, answer = await send(guest, call)
        judge(call, code, answer)
        after = guest.service.snapshot.state
        if code is not OK:
            assert believed(after) == before
        elif call[0] == "report":
            assert answer in (vm.SUCCESS, vm.BALLOON_INFLATE_FAILED)
            if call[1] != 0 and call[2] >= 0:
                assert after.balloon.limit == max(call[2] - GIB, 0)
                space = guest.world.filesystem.space()
                slack = guest.disk.data_chunk + 4 * MIB
                assert answer != vm.SUCCESS or space.available <= max(call[2] - GIB, 0) + slack or after.active_job
            else:
                assert after.balloon.limit == before[1]  # type: ignore[index]  # the tuple of `believed`
        elif call[0] == "resize" and job is None:
            assert answer in (vm.ResizeFilesystemResponse.STARTED, vm.ResizeFilesystemResponse.ALREADY_IN_PROGRESS)
            assert after.job is not None
            assert after.job.requested == call[2]


async def play(sequence: list[Call], together: list[Call]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        guest = Guest(Path(directory), device=DEVICE)
        await guest.start()
        try:
            await one_by_one(guest, sequence)
            answers = await asyncio.gather(*(send(guest, call) for call in together))
            for call, (code, answer) in zip(together, answers, strict=True):
                judge(call, code, answer)
            await until(guest.idle)
            status = await guest.status()
            assert status.current_size // 4096 * 4096 == guest.disk.size
            assert await guest.report_free((1 << 63) - 1) == vm.SUCCESS
            assert guest.world.balloon.size() == 0, "with all the room in the world nothing is held"
            await until(lambda: limits_are_back(guest))
        finally:
            await guest.stop()


async def limits_are_back(guest: Guest) -> bool:
    """True once the write-back limits are what they were."""
    return guest.sysctl.limits == FOUND


@settings(max_examples=40)
@given(sequence=st.lists(calls, max_size=12), together=st.lists(calls, max_size=8))
def test_whatever_a_host_sends(sequence: list[Call], together: list[Call]) -> None:
    asyncio.run(play(sequence, together))
