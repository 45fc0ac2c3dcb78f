"""From what the host believes to the messages of `storaged.host.v1`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from storaged import __version__
from storaged.host.controller import Controller
from storaged.host.history import Point
from storaged.host.levels import Level
from storaged.host.members import Client, Member
from storaged.host.model import Guest, Presence, books, established
from storaged.host.saga_model import Outcome, Saga, Stage
from storaged.rpc.proto import storaged_host_v1_pb2 as pb

VERSION = __version__
STALE_S = 10.0
"""A report comes at least every few seconds while its guest is well."""
FALLS_LEAST = 1024.0
"""Bytes a second below which free space does not fall, but flutters."""

_LEVEL = {Level.NORMAL: pb.LEVEL_NORMAL, Level.LOW: pb.LEVEL_LOW, Level.CRITICAL: pb.LEVEL_CRITICAL}
_PRESENCE = {
    Presence.CONFIGURED: pb.GUEST_CONFIGURED,
    Presence.DISCOVERED: pb.GUEST_DISCOVERED,
    Presence.UP: pb.GUEST_UP,
    Presence.HANGING: pb.GUEST_HANGING,
    Presence.SUSPENDED: pb.GUEST_SUSPENDED,
    Presence.GONE: pb.GUEST_GONE,
}
_STAGE = {
    Stage.PREPARING: pb.STAGE_PREPARING,
    Stage.IMAGE: pb.STAGE_IMAGE,
    Stage.CAPACITY: pb.STAGE_CAPACITY,
    Stage.BALLOON: pb.STAGE_BALLOON,
    Stage.FILESYSTEM: pb.STAGE_FILESYSTEM,
    Stage.VERIFYING: pb.STAGE_VERIFYING,
    Stage.RESTORING: pb.STAGE_RESTORING,
    Stage.ENDED: pb.STAGE_ENDED,
}
_OUTCOME = {
    Outcome.DONE: pb.RESIZE_DONE,
    Outcome.FAILED: pb.RESIZE_FAILED,
    Outcome.CANCELLED: pb.RESIZE_CANCELLED,
}


def timestamp(wall: float) -> Timestamp:
    """Seconds since the epoch."""
    return Timestamp(seconds=int(wall), nanos=int(wall % 1 * 1e9))


def pool(controller: Controller, total: int | None, points: Sequence[Point]) -> pb.Pool:
    """A pool; `points` are its history."""
    state = controller.state
    seen, account = state.pool, books(state)
    answer = pb.Pool(
        name=controller.pool.name,
        path=controller.pool.path,
        total_bytes=total,
        reserve_bytes=max(account.reserve, 0),
        promised_bytes=max(account.promised, 0),
        unbound_bytes=max(account.unbound, 0),
        fall_bytes_per_s=max(seen.falls, 0.0),
        outside_bytes_per_s=max(seen.outside, 0.0),
        unreadable_reason=controller.unread,
        guest_count=len(controller.members),
    )
    if seen.at is not None:
        answer.free_bytes = account.free
        answer.level = _LEVEL[seen.pressure.level]
        answer.age_s = max(time.monotonic() - seen.at, 0.0)
        if seen.whole:
            answer.promise_holds = established(state)
        if seen.falls >= FALLS_LEAST:
            answer.exhausted_in_s = account.free / seen.falls
    for point in points:
        answer.history.add(
            time=timestamp(point.at),
            free_bytes=point.free,
            reserve_bytes=point.reserve,
            promised_bytes=point.promised,
            level=_LEVEL[point.level],
        )
    return answer


def guest(member: Member, controller: Controller, now: float, logical: int | None) -> pb.Guest:
    """A guest, with what it last reported; `logical`: its image's length, as seen lately."""
    config, believed = member.config, controller.state.guests.get(member.config.name)
    wrong = controller.conditions.now.reason(config.name)
    away = "" if member.client is not None else member.unmet or "it does not run"
    answer = pb.Guest(
        name=config.name,
        pool=config.pool,
        state=pb.GUEST_CONFIGURED,
        address=str(config.address),
        image=config.image,
        logical_bytes=logical or (believed.size if believed is not None else 0),
        weight=config.weight,
        resizable=not (away or wrong),
        not_resizable_reason=away or wrong,
        stale_reason=away,
    )
    if believed is not None:
        answer.state = _PRESENCE[believed.presence]
        answer.allocated_bytes = believed.image
        answer.left_bytes = believed.left
        answer.write_bytes_per_s = max(believed.rate, 0.0)
        answer.overruns = believed.overruns
        answer.claim_bytes = believed.claim + believed.claim_lacks
        if believed.fenced_until > now:
            answer.fenced_for_s = believed.fenced_until - now
        if believed.lease.bound:
            answer.grant_bytes = believed.lease.granted
            answer.beyond_bytes = believed.lease.beyond + believed.lease.raised
        if believed.runs:
            answer.unproven_reason = _unproven(believed)
    if member.client is not None:
        _reported(answer, member.client, now)
    return answer


def _unproven(guest: Guest) -> str:
    if not guest.lease.bound:
        return "it has not answered to a grant"
    return "" if guest.lease.proven else "its agent does not tell what is preallocated in the guest"


def resized(answer: pb.Guest, saga: Saga, *, newer_than_look: bool, newer_than_report: bool) -> None:
    """What a resize found at its end, where it is newer than what was seen or reported."""
    if saga.image is not None and newer_than_look:
        answer.logical_bytes = saga.image
    if answer.HasField("filesystem_bytes") and saga.filesystem is not None and newer_than_report:
        answer.filesystem_bytes = saga.filesystem
        for bound in ("minimum_bytes", "guaranteed_bytes", "minimum_reason"):
            answer.ClearField(bound)


def _reported(answer: pb.Guest, client: Client, now: float) -> None:
    report = client.report
    if client.reported_at is not None:
        answer.report_age_s = max(now - client.reported_at, 0.0)
    if report is None:
        silent = "it does not report any more" if client.reported_at is not None else "it has not reported yet"
        answer.stale_reason = "its agent is no storaged: it reports nothing" if client.plain else silent
        return
    old = answer.report_age_s > STALE_S
    answer.stale_reason = f"its last report is {answer.report_age_s:.0f} s old" if old else ""
    answer.filesystem_bytes = report.filesystem.size_bytes
    answer.balloon_bytes = report.balloon.size_bytes
    answer.available_bytes = report.filesystem.available_bytes
    if report.HasField("bounds"):
        if report.bounds.minimum_size:
            answer.minimum_bytes = report.bounds.minimum_size
        if report.bounds.guaranteed_size:
            answer.guaranteed_bytes = report.bounds.guaranteed_size
        answer.minimum_reason = report.bounds.why


def resize(saga: Saga) -> pb.Resize:
    """A resize."""
    if saga.active or saga.outcome is None:
        state = pb.RESIZE_CANCELLING if saga.cancelling else pb.RESIZE_RUNNING
    else:
        state = _OUTCOME[saga.outcome]
    return pb.Resize(
        id=saga.id,
        guest=saga.guest,
        from_bytes=saga.start,
        to_bytes=saga.to,
        state=state,
        stage=_STAGE[saga.stage],
        progress=saga.progress,
        rate_bytes_per_s=saga.rate,
        eta_s=saga.eta,
        reason=saga.reason,
        started_at=timestamp(saga.started),
        ended_at=timestamp(saga.ended) if saga.ended else None,
        image_bytes=saga.image,
        filesystem_bytes=saga.filesystem,
        moved_bytes=saga.moved,
        resumed=saga.resumed,
    )
