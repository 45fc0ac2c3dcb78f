"""`storaged.v1.Storage`: what Maitred has no words for."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from storaged import __version__
from storaged.core.model import Level
from storaged.core.state import BalloonState, State
from storaged.errors import InvalidRequest
from storaged.resize.job import Job, JobState
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import storaged_v1_pb2_grpc
from storaged.runtime import Snapshot, StorageService

Context = Any
LEAST_INTERVAL_S = 0.2
MOST_INTERVAL_S = 3600.0
BOUNDS_PATIENCE_S = 1.0

_LEVEL = {Level.NORMAL: pb.LEVEL_NORMAL, Level.LOW: pb.LEVEL_LOW, Level.CRITICAL: pb.LEVEL_CRITICAL}
_BALLOON = {
    BalloonState.IDLE: pb.BALLOON_IDLE,
    BalloonState.INFLATING: pb.BALLOON_INFLATING,
    BalloonState.DEFLATING: pb.BALLOON_DEFLATING,
    BalloonState.FAILED: pb.BALLOON_FAILED,
}
_JOB = {
    JobState.REQUESTED: pb.JOB_WAITING_FOR_CAPACITY,
    JobState.WAITING: pb.JOB_WAITING_FOR_CAPACITY,
    JobState.PREPARING: pb.JOB_PREPARING,
    JobState.RUNNING: pb.JOB_RUNNING,
    JobState.CANCELLING: pb.JOB_CANCELLING,
    JobState.DONE: pb.JOB_DONE,
    JobState.FAILED: pb.JOB_FAILED,
    JobState.CANCELLED: pb.JOB_CANCELLED,
}


class Storage(storaged_v1_pb2_grpc.StorageServicer):
    """The engine's own service."""

    def __init__(self, storage: StorageService) -> None:
        self._storage = storage

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Report]:
        interval = request.min_interval_s
        if not (math.isfinite(interval) and 0 <= interval <= MOST_INTERVAL_S):
            raise InvalidRequest(f"min_interval_s {interval} is not between 0 and {MOST_INTERVAL_S:g}")
        async for snapshot in self._storage.watch(max(interval, LEAST_INTERVAL_S)):
            yield self._report(snapshot)

    async def GetReport(self, request: pb.GetReportRequest, context: Context) -> pb.Report:
        await self._storage.bounds_lately(BOUNDS_PATIENCE_S)  # a report must come whatever the disk does
        return self._report(await self._storage.refreshed())

    async def Resize(self, request: pb.ResizeRequest, context: Context) -> pb.ResizeResponse:
        start = self._storage.retarget if request.retarget else self._storage.started
        return pb.ResizeResponse(job=_job(await start(request.size_bytes, best_effort=request.best_effort)))

    async def AskRoom(self, request: pb.AskRoomRequest, context: Context) -> AsyncIterator[pb.RoomAsked]:
        async for seen, size in self._storage.pleas():
            yield pb.RoomAsked(size_bytes=size, available_bytes=seen.available, fall_bytes_per_s=seen.rate)

    async def CancelResize(self, request: pb.CancelResizeRequest, context: Context) -> pb.CancelResizeResponse:
        return pb.CancelResizeResponse(job=_job(await self._storage.cancel()))

    async def Trim(self, request: pb.TrimRequest, context: Context) -> pb.TrimResponse:
        trimmed = await self._storage.trim(reclaim=request.reclaim_empty_chunks)
        return pb.TrimResponse(trimmed_bytes=trimmed)

    def _report(self, snapshot: Snapshot) -> pb.Report:
        fs = self._storage.world.filesystem
        state, space = snapshot.state, snapshot.space
        report = pb.Report(
            sequence=snapshot.sequence,
            time=_time(snapshot.wall),
            version=__version__,
            simulated=self._storage.world.simulated,
            pressure=_pressure(state),
            filesystem=pb.Filesystem(
                mountpoint=fs.mountpoint,
                uuid=fs.uuid,
                size_bytes=self._storage.current_size(),
                device_bytes=space.device,
                available_bytes=space.available,
                data_total_bytes=space.data_total,
                data_used_bytes=space.data_used,
                metadata_total_bytes=space.metadata_total,
                metadata_used_bytes=space.metadata_used,
                global_reserve_bytes=space.global_reserve,
                unallocated_bytes=space.unallocated,
                metadata_headroom_bytes=max(space.metadata_headroom, 0),
                data_chunk_bytes=space.data_chunk,
                exclusive_operation=space.exclusive_operation,
                read_only=space.read_only,
                discard_supported=fs.discard_supported(),
            ),
            balloon=self._balloon(snapshot),
            reclaimed_bytes_total=state.reclaimed,
            notes=snapshot.notes,
        )
        if state.job is not None:
            report.job.CopyFrom(_job(state.job))
        if snapshot.bounds is not None:
            report.bounds.minimum_size = snapshot.bounds.minimum
            report.bounds.guaranteed_size = snapshot.bounds.guaranteed
            report.bounds.why = snapshot.bounds.why
        if (found := state.dirty_found) is not None:
            report.dirty_limits_found.dirty_bytes = found.dirty_bytes
            report.dirty_limits_found.dirty_background_bytes = found.dirty_background_bytes
            report.dirty_limits_found.dirty_ratio = found.dirty_ratio
            report.dirty_limits_found.dirty_background_ratio = found.dirty_background_ratio
        return report

    def _balloon(self, snapshot: Snapshot) -> pb.Balloon:
        balloon = snapshot.state.balloon
        retry = balloon.retry_at if balloon.failures else None  # else it only looks once more
        return pb.Balloon(
            state=_BALLOON[balloon.state],
            size_bytes=balloon.size,
            target_bytes=snapshot.balloon_target,
            limit_bytes=balloon.limit,
            failure_reason=balloon.reason,
            retry_in_s=None if retry is None else max(retry - self._storage.world.clock.monotonic(), 0.0),
            inflated_bytes_total=snapshot.inflated_total,
            deflated_bytes_total=snapshot.deflated_total,
            metadata_relief_bytes=balloon.relief,
            unwritten_bytes=snapshot.unwritten.size * snapshot.space.data_copies if snapshot.unwritten.known else None,
            may_write_bytes=snapshot.reach,
            potential_bytes=snapshot.potential,
            warning=balloon.warning or self._storage.unsaved,
        )


def _pressure(state: State) -> pb.Pressure:
    pressure, report = state.pressure, state.report
    answer = pb.Pressure(
        level=_LEVEL[pressure.level] if pressure.known else pb.LEVEL_UNKNOWN,
        ignored_reports=state.ignored_reports,
    )
    if report is not None:
        answer.host_free_bytes = report.free
        answer.reported_at.CopyFrom(_time(report.wall))
    if pressure.pending is not None:
        answer.pending_level = _LEVEL[pressure.pending]
    return answer


def _job(job: Job) -> pb.Job:
    return pb.Job(
        id=job.id,
        state=_JOB[job.state],
        direction=pb.DIRECTION_SHRINK if job.shrinks else pb.DIRECTION_GROW,
        start_size=job.start_size,
        requested_size=job.requested,
        current_size=job.current_size,
        moved_bytes=job.moved,
        total_to_move_bytes=job.to_move,
        progress=job.progress,
        rate_bytes_per_s=job.rate,
        eta_s=job.eta,
        started_at=_time(job.started),
        ended_at=_time(job.ended) if job.ended else None,
        reason=job.reason,
        best_effort=job.best_effort,
    )


def _time(wall: float) -> Timestamp:
    return Timestamp(seconds=int(wall), nanos=int(wall % 1 * 1e9))
