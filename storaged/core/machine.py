"""The storage core: `step(state, event) -> (state, effects)`.

The rules, in prose:

1. A host report that carries no news changes nothing. Any other sets the limit of what applications may have,
   and the balloon is brought there; the answer goes out when it is there, or could not be.
2. The level follows the pressure table. Entering a level runs the effects of `ON_ENTER`, in order. The write-back
   limits found before the first change are kept, survive a crash, and are put back exactly at NORMAL.
3. A balloon that could not settle is tried again, at growing intervals and whenever something changed; so is one
   that settled while the kernel had room in hand that it will give back.
4. There is at most one resize job. It follows the table of `resize.job`; while it runs the balloon belongs to it,
   and afterwards the balloon is brought back to the limit.
5. Effects are listed in the order in which they are begun. A `Save` is durable before the next event is looked at,
   and so before any answer that depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from storaged.core import balloon as bl
from storaged.core import events as ev
from storaged.core import pressure as pr
from storaged.core import resize as rs
from storaged.core.model import Level
from storaged.core.state import Result, State
from storaged.resize import job as jb
from storaged.units import format_size, sector_floor


def step(state: State, event: ev.Event) -> Result:
    """The state after `event`, and the effects it asks for, in order."""
    return HANDLERS[type(event)](state, event)


def _tick(state: State, event: ev.Tick) -> Result:
    before = state.pressure.level
    state = replace(state, pressure=pr.settled(state.pressure, event.at, state.config))
    state, effects = bl.entered(state, before, event.at)
    if effects and state.report is not None and state.pressure.level is not before:
        # It settled for the worst of the wait; what the host said last may ask for better still.
        last = replace(state.report, at=event.at)
        state = replace(state, pressure=pr.reported(state.pressure, last, state.config))
    if state.restore_at is not None and event.at >= state.restore_at:
        state, restoring = bl.act(state, Level.NORMAL, event.at)
        effects = (*effects, *restoring)
    balloon = state.balloon
    if balloon.retry_at is not None and event.at >= balloon.retry_at:
        state, retry = bl.retry(state)
        return state, (*effects, *retry)
    if balloon.guard_at is not None and event.at >= balloon.guard_at and not balloon.pending:
        guarded = replace(balloon, guard_at=None)  # set again when the answer is there
        return replace(state, balloon=guarded), (*effects, ev.Sample(adjust=state.active_job is None))
    return state, effects


def _suspend_requested(state: State, event: ev.SuspendRequested) -> Result:
    return state, (ev.Save(), ev.Sync())


def _recovered(state: State, event: ev.Recovered) -> Result:
    effects: list[ev.Effect] = []
    limit = event.limit
    if event.balloon and limit is None:
        # A balloon nobody remembers: hold what it holds until the host speaks.
        limit = event.available
        effects.append(ev.Note(f"found a balloon of {format_size(event.balloon)} without a record of its limit"))
    elif event.balloon:
        effects.append(ev.Note(f"found the balloon again, {format_size(event.balloon)}"))
    level = event.level or Level.NORMAL
    state = replace(
        state,
        pressure=pr.Pressure(level, known=event.report is not None),
        report=event.report,
        dirty_found=event.dirty_found,
        reclaim_found=event.reclaim_found,
        trimmed_at=event.at if level is not Level.NORMAL else None,
        balloon=replace(state.balloon, limit=limit, size=event.balloon),
    )
    job = event.job
    if job is not None and job.active:
        reached = event.size == sector_floor(job.requested)
        # Before the kernel's work began (WAITING) nothing had been touched either way.
        last = replace(
            job,
            state=jb.JobState.DONE if reached else jb.JobState.FAILED,
            current_size=job.requested if reached else event.size,
            progress=1.0 if reached else job.progress,
            rate=None,
            eta=None,
            ended=event.wall,
            reason=""
            if reached
            else f"storaged was stopped while the job was {job.state.value}; the filesystem has {event.size} bytes",
        )
        text = "had finished" if reached else f"ended at {format_size(event.size)}"
        effects.append(
            ev.Note(f"the resize to {format_size(job.requested)} that was running {text}", warning=not reached)
        )
        state = replace(state, job=last)
    elif job is not None:
        state = replace(state, job=job)
    # After a reboot the limits are the kernel's own again; after a crash this changes nothing.
    state, acting = bl.act(state, level, event.at)
    effects += [effect for effect in acting if not isinstance(effect, ev.Trim | ev.Sync)]
    effects.append(ev.RuleOutReclaim())
    effects.append(ev.Save())
    state, retry = bl.retry(state)
    return state, (*effects, *retry)


def next_wakeup(state: State) -> float | None:
    """Monotonic time of the next Tick that has anything to do; None while nothing waits for time."""
    times = (
        pr.settles_at(state.pressure, state.config),
        state.balloon.retry_at,
        None if state.balloon.pending else state.balloon.guard_at,
        state.poll_at,
        state.restore_at,
    )
    return min((time for time in times if time is not None), default=None)


HANDLERS: dict[type[ev.Event], Callable[[State, Any], Result]] = {
    ev.HostReported: bl.host_reported,
    ev.BalloonSettled: bl.balloon_settled,
    ev.BalloonSampled: bl.balloon_sampled,
    ev.BalloonFailed: bl.balloon_failed,
    ev.ReleaseRequested: bl.release_requested,
    ev.DirtyLimitsFound: bl.dirty_limits_found,
    ev.DirtyLimitsRestored: bl.dirty_limits_restored,
    ev.ReclaimFound: bl.reclaim_found,
    ev.ReclaimRestored: bl.reclaim_restored,
    ev.Trimmed: bl.trimmed,
    ev.ResizeRequested: rs.resize_requested,
    ev.CancelRequested: rs.cancel_requested,
    ev.JobPrepared: rs.job_prepared,
    ev.JobProgressed: rs.job_progressed,
    ev.JobEnded: rs.job_ended,
    ev.CapacityChanged: rs.capacity_changed,
    ev.Tick: _tick,
    ev.SuspendRequested: _suspend_requested,
    ev.Recovered: _recovered,
}
