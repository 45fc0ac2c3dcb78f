"""What a guest can still write, told beside the answer to UpdateStorageBalloon."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import FilesystemError
from storaged.rpc.bound import MAY_WRITE, POTENTIAL, REASON, SEQUENCE, Bound, Metadata, as_metadata, read_bound
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MAX_SIZE, MIB
from tests.rpc.conftest import Guest


async def told(guest: Guest, free: int) -> tuple[int, dict[str, str], Bound | None]:
    request = vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_NORMAL, free_space_bytes=free)
    call = guest.maitred.UpdateStorageBalloon(request)
    answer = await call
    beside = await call.trailing_metadata()
    return answer.result, {str(key): str(value) for key, value in beside}, read_bound(beside, MAX_SIZE)


async def test_the_answer_tells_what_the_report_tells(guest: Guest) -> None:
    result, beside, bound = await told(guest, 3 * GIB)
    assert result == vm_guest_pb2.SUCCESS
    assert bound is not None
    assert beside["x-request-id"], "what every call has is still there"
    report = await guest.report()
    assert bound.may_write == report.balloon.may_write_bytes >= 2 * GIB
    assert bound.potential == report.balloon.potential_bytes >= bound.may_write
    assert bound.sequence <= report.sequence
    assert not bound.reason
    assert REASON not in beside


async def test_why_it_did_not_get_there_is_told(guest: Guest) -> None:
    guest.disk.faults.fail("extend", FilesystemError("Input/output error", 5), times=20)
    result, _, bound = await told(guest, GIB + 256 * MIB)
    assert result == vm_guest_pb2.BALLOON_INFLATE_FAILED
    assert bound is not None
    assert bound.reason
    assert bound.may_write > 256 * MIB, "where it stands, not where it should"


async def test_writing_does_not_change_what_it_holds_and_can_take(guest: Guest) -> None:
    await guest.report_free(4 * GIB)
    before = (await guest.report()).balloon
    guest.disk.write(GIB)
    after = (await guest.report()).balloon
    assert after.potential_bytes == pytest.approx(before.potential_bytes, abs=MIB)
    assert after.may_write_bytes < before.may_write_bytes - 900 * MIB
    await guest.report_free(2 * GIB)
    assert (await guest.report()).balloon.potential_bytes < before.potential_bytes - GIB // 2


async def test_a_space_from_before_a_shrink_tells_too_little_and_nothing_negative(guest: Guest) -> None:
    await guest.report_free(2 * GIB)
    space = guest.world.filesystem.space()
    then = replace(space, data_used=0, data_total=0, unallocated=0)
    assert guest.service._engine.potential(then) == space.metadata_total * space.metadata_copies


@given(st.builds(Bound, *[st.integers(0, MAX_SIZE)] * 3, st.text(max_size=100)))
def test_what_is_told_is_what_is_read(bound: Bound) -> None:
    pairs = as_metadata(bound)
    assert all(text.isascii() and text.isprintable() for _, text in pairs), "what gRPC carries"
    assert read_bound(pairs, MAX_SIZE) == bound


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (),
        ((MAY_WRITE, "1"), (POTENTIAL, "2")),
        ((MAY_WRITE, "-1"), (POTENTIAL, "2"), (SEQUENCE, "3")),
        ((MAY_WRITE, "1"), (POTENTIAL, "1e3"), (SEQUENCE, "3")),
        ((MAY_WRITE, "1"), (POTENTIAL, b"2"), (SEQUENCE, "3")),
        ((MAY_WRITE, "1"), (POTENTIAL, str(1 << 80)), (SEQUENCE, "3")),
        ((MAY_WRITE, "1"), (POTENTIAL, "\u0662"), (SEQUENCE, "3")),
    ],
)
def test_what_is_no_bound_is_none(metadata: Metadata | None) -> None:
    assert read_bound(metadata, MAX_SIZE) is None
