"""What of the state must survive a crash, as a plain document, and back. Nothing in it is trusted blindly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from storaged.core.model import DirtyLimits, HostReport, KernelReclaim, Level, Told
from storaged.core.state import State
from storaged.resize.job import Job, JobState

VERSION = 1


@dataclass(frozen=True, slots=True)
class Remembered:
    """What an earlier daemon wrote down."""

    limit: int | None = None
    level: Level | None = None
    report: HostReport | None = None
    dirty_found: DirtyLimits | None = None
    reclaim_found: KernelReclaim | None = None
    job: Job | None = None


def to_record(state: State) -> dict[str, object]:
    """The document for `state`."""
    report, job = state.report, state.job
    return {
        "version": VERSION,
        "limit": state.balloon.limit,
        "level": state.pressure.level.name,
        "report": None if report is None else {"told": report.told.name, "free": report.free, "wall": report.wall},
        "dirty_found": None if state.dirty_found is None else asdict(state.dirty_found),
        "reclaim_found": None if state.reclaim_found is None else asdict(state.reclaim_found),
        # Progress is not written: it changes too often, and the filesystem itself tells what is true.
        "job": None
        if job is None
        else {
            "id": job.id,
            "requested": job.requested,
            "start_size": job.start_size,
            "current_size": job.current_size,
            "state": job.state.name,
            "started": job.started,
            "ended": job.ended,
            "reason": job.reason,
            "best_effort": job.best_effort,
        },
    }


def from_record(record: dict[str, Any], now: float) -> Remembered:
    """What `record` remembers; `now` is monotonic seconds. Raises ValueError for a document we did not write."""
    if record.get("version") != VERSION:
        raise ValueError(f"version {record.get('version')!r} is not {VERSION}")
    try:
        report, dirty, job, limit = (record[key] for key in ("report", "dirty_found", "job", "limit"))
        return Remembered(
            limit=None if limit is None else _natural(limit),
            level=Level[record["level"]],
            report=None
            if report is None
            else HostReport(Told[report["told"]], _natural(report["free"]), now, float(report["wall"])),
            dirty_found=None
            if dirty is None
            else DirtyLimits(**{field.name: _natural(dirty[field.name]) for field in fields(DirtyLimits)}),
            reclaim_found=_reclaim(record.get("reclaim_found")),  # earlier versions had none
            job=None
            if job is None
            else Job(
                id=str(job["id"]),
                requested=_natural(job["requested"]),
                start_size=_natural(job["start_size"]),
                current_size=_natural(job["current_size"]),
                state=JobState[job["state"]],
                started=float(job["started"]),
                ended=float(job["ended"]),
                reason=str(job["reason"]),
                best_effort=bool(job.get("best_effort", False)),  # earlier versions had none
                progress=1.0 if job["state"] == JobState.DONE.name else 0.0,
            ),
        )
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a journal of this program: {error!r}") from error


def _reclaim(found: dict[str, object] | None) -> KernelReclaim | None:
    if found is None:
        return None
    return KernelReclaim(**{field.name: _natural(found[field.name]) for field in fields(KernelReclaim)})


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number of bytes")
    return value
