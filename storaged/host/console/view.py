"""From reports to what the page shows: plain values for JSON. Pure.

Absent numbers are null. An age becomes the time at which something was true, so that a guest of which there is no
news has the same text every time, and is not sent again.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from storaged.rpc.proto import storaged_host_v1_pb2 as pb

Json = dict[str, Any]
_AGE_GRAIN_S = 2.0


def seconds(time: Timestamp) -> float:
    """Seconds since 1970."""
    return float(time.seconds + time.nanos / 1e9)


def _known(message: Message, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _since(message: Message, field: str, now: float) -> float | None:
    age = _known(message, field)
    return None if age is None else (now - age) // _AGE_GRAIN_S * _AGE_GRAIN_S


def _word(name: str) -> str:
    """`GUEST_HANGING` is `hanging`."""
    return name.partition("_")[2].lower()


def point(found: pb.PressurePoint) -> list[float | str]:
    """A point of the history: time, free, reserve, promised, level."""
    return [
        seconds(found.time),
        found.free_bytes,
        found.reserve_bytes,
        found.promised_bytes,
        _word(pb.Level.Name(found.level)),
    ]


def present(pool: pb.Pool, now: float) -> list[float | str] | None:
    """The pool as it is now, as a point of its history."""
    if not pool.HasField("free_bytes") or pool.unreadable_reason:
        return None
    return [now, pool.free_bytes, pool.reserve_bytes, pool.promised_bytes, _word(pb.Level.Name(pool.level))]


def pool(found: pb.Pool, now: float) -> Json:
    """A pool without its history."""
    return {
        "name": found.name,
        "path": found.path,
        "total": _known(found, "total_bytes"),
        "free": _known(found, "free_bytes"),
        "reserve": found.reserve_bytes,
        "promised": found.promised_bytes,
        "unbound": found.unbound_bytes,
        "holds": _known(found, "promise_holds"),
        "exhausted_s": _known(found, "exhausted_in_s"),
        "falls": found.fall_bytes_per_s,
        "level": _word(pb.Level.Name(found.level)),
        "seen_at": _since(found, "age_s", now),
        "unreadable": found.unreadable_reason,
        "guests": found.guest_count,
        "sizes": _known(found, "sizes_bytes"),
        "sizes_limit": _known(found, "sizes_limit_bytes"),
    }


def guest(found: pb.Guest, now: float) -> Json:
    """A guest."""
    return {
        "name": found.name,
        "pool": found.pool,
        "state": _word(pb.GuestState.Name(found.state)),
        "logical": found.logical_bytes,
        "cost": found.allocated_bytes,
        "weight": found.weight,
        "grant": _known(found, "grant_bytes"),
        "left": found.left_bytes,
        "fenced": found.HasField("fenced_for_s"),
        "overruns": found.overruns,
        "unproven": found.unproven_reason,
        "writes": round(found.write_bytes_per_s, -3),
        "resizable": found.resizable,
        "not_resizable": found.not_resizable_reason,
        "size": _known(found, "filesystem_bytes"),
        "balloon": _known(found, "balloon_bytes"),
        "available": _known(found, "available_bytes"),
        "minimum": _known(found, "minimum_bytes"),
        "guaranteed": _known(found, "guaranteed_bytes"),
        "minimum_why": found.minimum_reason,
        "reported_at": _since(found, "report_age_s", now),
        "stale": found.stale_reason,
    }


_TOLD = ("size", "balloon", "available", "minimum", "guaranteed", "reported_at")


def carried(new: Json, old: Json | None) -> Json:
    """What a silent guest told last is worth seeing, as long as it is said to be old."""
    if not new["stale"] or old is None or new["size"] is not None:
        return new
    return new | {key: old[key] for key in _TOLD if new[key] is None} | {"minimum_why": old["minimum_why"]}


def resize(found: pb.Resize) -> Json:
    """A resize, running or ended."""
    return {
        "id": found.id,
        "guest": found.guest,
        "from": found.from_bytes,
        "to": found.to_bytes,
        "state": _word(pb.ResizeState.Name(found.state)),
        "stage": _word(pb.ResizeStage.Name(found.stage)),
        "progress": found.progress,
        "rate": _known(found, "rate_bytes_per_s"),
        "eta_s": _known(found, "eta_s"),
        "reason": found.reason,
        "started_at": seconds(found.started_at),
        "ended_at": seconds(found.ended_at) if found.HasField("ended_at") else None,
        "image": _known(found, "image_bytes"),
        "filesystem": _known(found, "filesystem_bytes"),
        "moved": found.moved_bytes,
        "resumed": found.resumed,
    }
