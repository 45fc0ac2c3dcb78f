"""Fills the contract: counts events as they pass, and turns the published snapshot into samples at scrape time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from storaged.core import events as ev
from storaged.core.state import State
from storaged.metrics import build
from storaged.metrics.families import GUEST, LEVELS, OUTCOMES, REACTION_BUCKETS, word
from storaged.metrics.family import PLAIN, Distribution, Metric, Values, one_hot
from storaged.metrics.reader import SpaceReader
from storaged.resize.job import Job
from storaged.runtime import StorageService


class StorageCollector:
    """The guest's metrics. Made on the event loop; collected from any thread."""

    families = GUEST

    def __init__(self, storage: StorageService) -> None:
        self._storage = storage
        self._reader = SpaceReader(storage)
        self._build = build.labels()
        self._updates = {"success": 0, "failed": 0, "ignored": 0}
        self._jobs = {(way, end): 0 for way in ("grow", "shrink") for end in OUTCOMES.values()}
        self._reactions = [0] * (len(REACTION_BUCKETS) + 1)
        self._reacted_s = 0.0
        self._unanswered: list[float] = []  # when reports came in that nothing has come of yet
        self._unsettled: list[float] = []  # the same, still counting after a failure: the target is what they wait for
        self._was_active = False
        storage.observe(self._observe)

    def _observe(self, event: ev.Event, state: State) -> None:
        if isinstance(event, ev.HostReported):
            self._reported(event, state)
        elif isinstance(event, ev.BalloonSettled) and event.limit == state.balloon.limit:
            self._answered("success")
            for came in self._unsettled:
                self._reacted(event.at - came)
            self._unsettled.clear()
        elif isinstance(event, ev.BalloonFailed) and event.limit == state.balloon.limit:
            self._answered("failed")
        elif isinstance(event, ev.ReleaseRequested):
            self._unsettled.clear()  # nobody waits for that target any more
        job = state.job
        if self._was_active and job is not None and not job.active:
            self._jobs["shrink" if job.shrinks else "grow", OUTCOMES[job.state]] += 1
        self._was_active = job is not None and job.active

    def _reported(self, event: ev.HostReported, state: State) -> None:
        if state.report is not event.report:
            self._updates["ignored"] += 1
            return
        self._unanswered.append(event.report.at)
        self._unsettled.append(event.report.at)

    def _answered(self, result: str) -> None:
        self._updates[result] += len(self._unanswered)
        self._unanswered.clear()

    def _reacted(self, took: float) -> None:
        self._reactions[bisect_left(REACTION_BUCKETS, took)] += 1
        self._reacted_s += took

    def close(self) -> None:
        """Ask the filesystem no more."""
        self._reader.close()

    def collect(self) -> Iterator[Metric]:
        """One family after the other, in the contract's order."""
        values = self._values()
        for family in GUEST:
            yield Metric(family, values[family.name])

    def _values(self) -> dict[str, Values]:
        snapshot = self._storage.snapshot
        state = snapshot.state
        balloon, job, report, bounds = state.balloon, state.job, state.report, snapshot.bounds
        reading = self._reader.latest()
        space = reading.space
        running = state.active_job
        moved = snapshot.moved_total + (running.moved if running is not None else 0)
        return {
            "storaged_build_info": {self._build: 1},
            "storaged_disk_pressure": one_hot(
                LEVELS, state.pressure.level.name.lower() if state.pressure.known else "none"
            ),
            "storaged_host_free_bytes": _maybe(None if report is None else report.free),
            "storaged_host_update_timestamp_seconds": _maybe(None if report is None else report.wall),
            "storaged_balloon_state": one_hot(_known("storaged_balloon_state"), balloon.state.value),
            "storaged_balloon_size_bytes": _maybe(balloon.size),
            "storaged_balloon_target_bytes": _maybe(snapshot.balloon_target),
            "storaged_balloon_updates_total": {(result,): count for result, count in self._updates.items()},
            "storaged_balloon_adjusted_bytes_total": {
                ("inflate",): snapshot.inflated_total,
                ("deflate",): snapshot.deflated_total,
            },
            "storaged_balloon_reaction_seconds": {
                PLAIN: Distribution(REACTION_BUCKETS, list(self._reactions), self._reacted_s)
            },
            "storaged_unwritten_bytes": _maybe(
                snapshot.unwritten.size * space.data_copies if snapshot.unwritten.known else None
            ),
            "storaged_may_write_bytes": _maybe(self._storage.reach(space)),
            "storaged_filesystem_size_bytes": _maybe(self._storage.current_size()),
            "storaged_filesystem_available_bytes": _maybe(space.available),
            "storaged_filesystem_min_size_bytes": _maybe(None if bounds is None else bounds.minimum),
            "storaged_filesystem_read_only": _maybe(space.read_only),
            "storaged_filesystem_discard_supported": _maybe(reading.discard),
            "storaged_btrfs_unallocated_bytes": _maybe(space.unallocated),
            "storaged_btrfs_metadata_headroom_bytes": _maybe(space.metadata_headroom),
            "storaged_reclaimed_bytes_total": _maybe(state.reclaimed),
            "storaged_resize_state": one_hot(_known("storaged_resize_state"), word(job.state if job else None)),
            "storaged_resize_jobs_total": {(way, end): count for (way, end), count in self._jobs.items()},
            "storaged_internal_errors_total": _maybe(snapshot.faults),
            "storaged_resize_moved_bytes_total": _maybe(moved),
            **_of_job(running),
        }


def _of_job(job: Job | None) -> dict[str, Values]:
    """What is there while a job runs."""
    return {
        "storaged_resize_progress_ratio": _maybe(job.progress if job else None),
        "storaged_resize_target_bytes": _maybe(job.requested if job else None),
        "storaged_resize_start_time_seconds": _maybe(job.started if job else None),
        "storaged_resize_eta_seconds": _maybe(job.eta if job else None),
    }


_BY_NAME = {family.name: family for family in GUEST}


def _known(name: str) -> tuple[str, ...]:
    return _BY_NAME[name].labels[0][1]


def _maybe(value: float | None) -> Values:
    return {} if value is None else {PLAIN: float(value)}
