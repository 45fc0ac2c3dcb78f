"""The contract: every metric of the guest, its labels and when it is there. docs/metrics.md is made from this table."""

from __future__ import annotations

from storaged.core.state import BalloonState
from storaged.metrics.family import Family, Type
from storaged.resize.job import JobState

TOLD = "once the host has told"
COUNTED = "once preallocated files have been counted"
BOUNDED = "once somebody asked for the bounds"
RUNNING = "while a job runs"
ESTIMATED = "while a job runs and its rate is known"

LEVELS = ("none", "normal", "low", "critical")
OUTCOMES = {JobState.DONE: "success", JobState.FAILED: "failed", JobState.CANCELLED: "cancelled"}
REACTION_BUCKETS = (0.01, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0)
"""Seconds: an idle filesystem, a busy one, one that commits, the host's patience (20 s) coming near."""


def word(state: JobState | None) -> str:
    """A job's state as a label's value."""
    return "none" if state is None else state.value.replace(" ", "_")


def _state(*values: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("state", values),)


_G, _C, _H = Type.GAUGE, Type.COUNTER, Type.HISTOGRAM

GUEST = (
    Family(
        "storaged_build_info",
        _G,
        "Always 1; the labels tell what runs",
        (("version", ()), ("revision", ()), ("python", ())),
    ),
    Family("storaged_disk_pressure", _G, "Host disk pressure in force: 1 at the present level", _state(*LEVELS)),
    Family("storaged_host_free_bytes", _G, "Free bytes that the host told last", present=TOLD),
    Family("storaged_host_update_timestamp_seconds", _G, "When the host told it, as Unix time", present=TOLD),
    Family(
        "storaged_balloon_state",
        _G,
        "What the balloon is doing: 1 at the present state",
        _state(*(state.value for state in BalloonState)),
    ),
    Family("storaged_balloon_size_bytes", _G, "Bytes the balloon holds"),
    Family("storaged_balloon_target_bytes", _G, "Bytes the balloon should hold"),
    Family(
        "storaged_balloon_updates_total",
        _C,
        "UpdateStorageBalloon calls that were answered, by what came of them; ignored: the host did not know",
        (("result", ("success", "failed", "ignored")),),
    ),
    Family(
        "storaged_balloon_adjusted_bytes_total",
        _C,
        "Bytes the balloon took and gave back",
        (("direction", ("inflate", "deflate")),),
    ),
    Family(
        "storaged_balloon_reaction_seconds",
        _H,
        "Time from a host's report to the balloon at its target",
    ),
    Family(
        "storaged_unwritten_bytes",
        _G,
        "Bytes that applications have preallocated and not written, on the host's disk",
        present=COUNTED,
    ),
    Family("storaged_may_write_bytes", _G, "The most that can still reach the host's disk, by any kind of write"),
    Family("storaged_filesystem_size_bytes", _G, "Size of the filesystem"),
    Family("storaged_filesystem_available_bytes", _G, "Bytes of data that applications can still write"),
    Family("storaged_filesystem_min_size_bytes", _G, "Smallest size a shrink was last known to reach", present=BOUNDED),
    Family("storaged_filesystem_read_only", _G, "1 when the filesystem is read-only, also by force of the kernel"),
    Family("storaged_filesystem_discard_supported", _G, "1 when freed blocks can be handed back to the host"),
    Family("storaged_btrfs_unallocated_bytes", _G, "Bytes in no chunk: room for new ones"),
    Family(
        "storaged_btrfs_metadata_headroom_bytes", _G, "Metadata that fits before a new chunk is needed; may be negative"
    ),
    Family("storaged_reclaimed_bytes_total", _C, "Bytes trimmed back to the host, as the kernel counts"),
    Family(
        "storaged_resize_state",
        _G,
        "State of the resize job, of the last one when none runs: 1 at the present state",
        _state(*map(word, (None, *JobState))),
    ),
    Family(
        "storaged_resize_jobs_total",
        _C,
        "Resize jobs that ended",
        (("direction", ("grow", "shrink")), ("outcome", tuple(OUTCOMES.values()))),
    ),
    Family(
        "storaged_internal_errors_total", _C, "What failed in the engine by a fault of storaged; the log tells more"
    ),
    Family("storaged_resize_moved_bytes_total", _C, "Bytes relocated by shrinks"),
    Family("storaged_resize_progress_ratio", _G, "Share of the running job that is done", present=RUNNING),
    Family("storaged_resize_target_bytes", _G, "Size that the running job was asked for", present=RUNNING),
    Family("storaged_resize_start_time_seconds", _G, "When the running job began, as Unix time", present=RUNNING),
    Family("storaged_resize_eta_seconds", _G, "Time left for the running job", present=ESTIMATED),
)
