"""The report, its stream and Trim, on a simulated guest behind a real gRPC server."""

from __future__ import annotations

import asyncio
import errno
import time

import grpc
import pytest

from storaged.errors import FilesystemError, Kind
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.units import GIB
from tests.rpc.conftest import EMPTY, Guest, refused


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


async def test_the_report_says_what_stands_at_the_bound(guest: Guest) -> None:
    guest.disk.write(2 * guest.disk.data_chunk)
    metadata = guest.disk.of("metadata")[0]
    at = metadata.start
    for chunk in guest.disk.of("data"):  # to the brim, and metadata above them
        chunk.start, at = at, at + chunk.length
    metadata.start = at
    bounds = (await guest.report()).bounds
    assert bounds.minimum_size == bounds.guaranteed_size == at + metadata.length
    assert bounds.why.startswith(f"metadata chunk at {at} cannot move: no hole of ")


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
