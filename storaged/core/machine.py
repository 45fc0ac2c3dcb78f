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

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from storaged.balloon.target import allowance
from storaged.core import events as ev
from storaged.core import pressure as pr
from storaged.core.model import Config, DirtyLimits, HostReport, Level
from storaged.errors import Kind
from storaged.resize import job as jb
from storaged.units import MAX_SIZE, format_size, sector_floor


class BalloonState(enum.Enum):
    """What the balloon is doing."""

    IDLE = "idle"
    INFLATING = "inflating"
    DEFLATING = "deflating"
    FAILED = "failed"


class BalloonSignal(enum.Enum):
    """What can happen to the balloon."""

    TIGHTEN = "tighten"  # a smaller limit than before
    LOOSEN = "loosen"
    SETTLED = "settled"
    FAILED = "failed"


BALLOON_AFTER: dict[BalloonState, dict[BalloonSignal, BalloonState]] = {
    state: {
        BalloonSignal.TIGHTEN: BalloonState.INFLATING,
        BalloonSignal.LOOSEN: BalloonState.DEFLATING,
        BalloonSignal.SETTLED: BalloonState.IDLE,
        BalloonSignal.FAILED: BalloonState.FAILED,
    }
    for state in BalloonState
}
"""The newest signal wins: a balloon may turn round, or be told to settle, in any state."""


@dataclass(frozen=True, slots=True)
class Balloon:
    """What is known of the balloon. `limit` None means that nothing is held back."""

    state: BalloonState = BalloonState.IDLE
    limit: int | None = None
    size: int = 0
    pending: bool = False  # a HoldAvailable is under way
    asked: bool = False  # somebody waits for an answer
    failures: int = 0
    reason: str = ""
    retry_at: float | None = None
    relief: int = 0  # given to metadata since the last report
    guard_at: float | None = None


@dataclass(frozen=True, slots=True)
class State:
    """Everything the daemon believes."""

    config: Config = field(default_factory=Config)
    pressure: pr.Pressure = field(default_factory=pr.Pressure)
    report: HostReport | None = None
    ignored_reports: int = 0
    balloon: Balloon = field(default_factory=Balloon)
    dirty_found: DirtyLimits | None = None
    restore_at: float | None = None  # the write-back limits could not be put back: try again then
    trimmed_at: float | None = None
    reclaimed: int = 0
    job: jb.Job | None = None
    poll_at: float | None = None

    @property
    def active_job(self) -> jb.Job | None:
        """The job that has not ended, if any."""
        return self.job if self.job is not None and self.job.active else None


Result = tuple[State, tuple[ev.Effect, ...]]


def _lower(config: Config, level: Level) -> ev.SetDirtyLimits:
    return ev.SetDirtyLimits(config.critical_dirty if level is Level.CRITICAL else config.low_dirty)


ON_ENTER: dict[Level, tuple[str, ...]] = {
    Level.NORMAL: ("restore dirty limits",),
    Level.LOW: ("lower dirty limits", "trim"),
    Level.CRITICAL: ("floor dirty limits", "flush", "trim"),
}
"""What each level asks for when it is entered; whatever the level, the balloon is sized continuously."""

_ACTIONS: dict[str, Callable[[State], tuple[ev.Effect, ...]]] = {
    "restore dirty limits": lambda s: (ev.RestoreDirtyLimits(s.dirty_found),) if s.dirty_found is not None else (),
    "lower dirty limits": lambda s: (_lower(s.config, Level.LOW),),
    "floor dirty limits": lambda s: (_lower(s.config, Level.CRITICAL),),
    "flush": lambda _: (ev.Sync(),),
    "trim": lambda _: (ev.Trim(),),
}


def step(state: State, event: ev.Event) -> Result:
    """The state after `event`, and the effects it asks for, in order."""
    return HANDLERS[type(event)](state, event)


# --- pressure and balloon -------------------------------------------------------------------------------------


def _host_reported(state: State, event: ev.HostReported) -> Result:
    report = event.report
    if pr.carries_no_news(report):
        return replace(state, ignored_reports=state.ignored_reports + 1), (ev.IgnoreReport(),)
    limit = allowance(report.free, state.config.reserve)
    before, limit_before = state.pressure.level, state.balloon.limit
    state = replace(state, report=report, pressure=pr.reported(state.pressure, report, state.config))
    state, effects = _entered(state, before, report.at)
    balloon = state.balloon
    signal = BalloonSignal.TIGHTEN if balloon.limit is None or limit < balloon.limit else BalloonSignal.LOOSEN
    balloon = replace(
        balloon,
        state=BALLOON_AFTER[balloon.state][signal],
        limit=limit,
        pending=True,
        asked=True,
        relief=0,
        retry_at=None,
    )
    # The answer waits for both: a crash half-way must not forget what was promised.
    news = limit != limit_before or state.pressure.level is not before
    return replace(state, balloon=balloon), (ev.HoldAvailable(limit), *effects, *((ev.Save(),) if news else ()))


def _entered(state: State, before: Level, now: float) -> Result:
    """The effects of a change of level since `before`, and of staying above NORMAL."""
    level = state.pressure.level
    effects: list[ev.Effect] = []
    if level is not before:
        effects.append(ev.Note(f"host pressure {before.name} -> {level.name}", warning=level > before))
        state, acting = _act(state, level, now)
        effects.extend(acting)
    elif (
        level is not Level.NORMAL
        and state.trimmed_at is not None
        and now - state.trimmed_at >= state.config.trim_again_s
    ):
        effects.append(ev.Trim())
    if any(isinstance(effect, ev.Trim) for effect in effects):
        state = replace(state, trimmed_at=now)
    return state, tuple(effects)


def _guard_at(state: State, event: ev.BalloonSettled | ev.BalloonGuarded) -> float | None:
    """When to look at metadata headroom next: never while nothing is held back."""
    if not event.size:
        return None
    config = state.config
    if event.tight:
        return event.at + config.guard_soon_s
    calm = isinstance(event, ev.BalloonGuarded) and event.calm
    return event.at + (max(config.guard_calm_s, config.guard_every_s) if calm else config.guard_every_s)


def _act(state: State, level: Level, now: float) -> Result:
    """What entering `level` asks for."""
    restoring = level is Level.NORMAL and state.dirty_found is not None
    # What was found is forgotten only once it is back.
    state = replace(state, restore_at=now + state.config.retry_most_s if restoring else None)
    return state, tuple(effect for action in ON_ENTER[level] for effect in _ACTIONS[action](state))


def _balloon_settled(state: State, event: ev.BalloonSettled) -> Result:
    balloon = state.balloon
    guard_at = _guard_at(state, event)
    if event.limit != balloon.limit:
        # A newer limit came meanwhile; its own HoldAvailable is on the way.
        return replace(state, balloon=replace(balloon, size=event.size, guard_at=guard_at)), ()
    settled = replace(
        balloon,
        state=BALLOON_AFTER[balloon.state][BalloonSignal.SETTLED],
        size=event.size,
        pending=False,
        asked=False,
        failures=0,
        reason="",
        retry_at=event.at + state.config.retry_first_s if event.again and event.limit is not None else None,
        guard_at=guard_at,
    )
    effects: tuple[ev.Effect, ...] = (ev.AnswerReport(),) if balloon.asked else ()
    if balloon.failures:
        effects = (*effects, ev.Note("the balloon is at its target again"))
    return replace(state, balloon=settled), effects


def _balloon_guarded(state: State, event: ev.BalloonGuarded) -> Result:
    balloon = replace(
        state.balloon,
        size=event.size,
        relief=state.balloon.relief + event.relief,
        guard_at=_guard_at(state, event),
    )
    note = ev.Note(f"gave {format_size(event.relief)} of the balloon to metadata, which was running out")
    return replace(state, balloon=balloon), ((note,) if event.relief else ())


def _balloon_failed(state: State, event: ev.BalloonFailed) -> Result:
    balloon = state.balloon
    if event.limit != balloon.limit:
        return replace(state, balloon=replace(balloon, size=event.size)), ()
    failures = balloon.failures + 1
    wait = min(state.config.retry_first_s * 2 ** min(failures - 1, 16), state.config.retry_most_s)
    failed = replace(
        balloon,
        state=BALLOON_AFTER[balloon.state][BalloonSignal.FAILED],
        size=event.size,
        pending=False,
        asked=False,
        failures=failures,
        reason=event.reason,
        retry_at=event.at + wait,
        guard_at=event.at + state.config.guard_every_s if event.size else None,
    )
    effects: list[ev.Effect] = [ev.AnswerReport(event.reason)] if balloon.asked else []
    if failures == 1 or event.reason != balloon.reason:
        effects.append(ev.Note(f"the balloon is not at its target: {event.reason}", warning=True))
    return replace(state, balloon=failed), tuple(effects)


def _retry(state: State) -> Result:
    """Bring the balloon to its limit once more, if it has one."""
    balloon = state.balloon
    if balloon.pending or (balloon.limit is None and not balloon.failures):
        return state, ()
    again = replace(balloon, pending=True, retry_at=None)
    return replace(state, balloon=again), (ev.HoldAvailable(balloon.limit),)


def _release_requested(state: State, event: ev.ReleaseRequested) -> Result:
    balloon = replace(
        state.balloon,
        state=BALLOON_AFTER[state.balloon.state][BalloonSignal.LOOSEN],
        limit=None,
        pending=True,
        retry_at=None,
        guard_at=None,
    )
    state, restoring = _act(
        replace(state, balloon=balloon, pressure=pr.Pressure(), report=None), Level.NORMAL, event.at
    )
    return state, (ev.HoldAvailable(None), *restoring, ev.Save())


def _dirty_limits_found(state: State, event: ev.DirtyLimitsFound) -> Result:
    if state.dirty_found is not None:
        return state, ()
    return replace(state, dirty_found=event.limits), (ev.Save(),)


def _dirty_limits_restored(state: State, event: ev.DirtyLimitsRestored) -> Result:
    if state.pressure.level is not Level.NORMAL:
        return state, ()
    return replace(state, dirty_found=None, restore_at=None), (ev.Save(),)


def _trimmed(state: State, event: ev.Trimmed) -> Result:
    if event.error:
        return state, (ev.Note(f"could not hand blocks back to the host: {event.error}", warning=True),)
    return replace(state, reclaimed=state.reclaimed + event.size), ()


# --- resize ---------------------------------------------------------------------------------------------------


def refusal(size: int, facts: ev.Facts, state: State, *, best_effort: bool = False) -> ev.RefuseResize | None:
    """Why a resize to `size` must not start, or None."""
    config = state.config
    if size == 0 or size < config.minimum_filesystem:
        return ev.RefuseResize(
            Kind.INVALID,
            f"size {size} is below the smallest filesystem the kernel resizes, {config.minimum_filesystem} bytes",
        )
    if size > MAX_SIZE:
        return ev.RefuseResize(Kind.INVALID, f"size {size} is above the largest possible size, {MAX_SIZE} bytes")
    if facts.read_only:
        return ev.RefuseResize(Kind.PRECONDITION, "the filesystem is read-only; nothing can be resized")
    shrinks = sector_floor(size) < facts.size
    if shrinks and facts.minimum == 0:
        return ev.RefuseResize(Kind.PRECONDITION, f"how small the filesystem may get is not known: {facts.why}")
    if best_effort and not shrinks:
        return ev.RefuseResize(
            Kind.OUT_OF_RANGE, f"size {size} is no shrink (now {facts.size}): only a shrink can be a best effort"
        )
    if shrinks and size < facts.minimum and not best_effort:
        return ev.RefuseResize(
            Kind.OUT_OF_RANGE,
            f"size {size} is below the minimum of {facts.minimum} bytes (now {facts.size}): {facts.why}",
        )
    if sector_floor(size) > facts.size and state.pressure.level is Level.CRITICAL:
        return ev.RefuseResize(
            Kind.PRECONDITION,
            f"size {size} would grow the filesystem (now {facts.size} bytes) while the host's disk is critically"
            " full; free space on the host first",
        )
    return None


def _resize_requested(state: State, event: ev.ResizeRequested) -> Result:
    refused = refusal(event.size, event.facts, state, best_effort=event.best_effort)
    if refused is not None and refused.kind is Kind.INVALID:
        return state, (refused,)
    if state.active_job is not None or event.facts.job_ran:
        # Also when it has ended since: what was known under it says nothing of what is there now.
        return state, (ev.AcceptResize(already=True),)
    if refused is not None:
        return state, (refused,)
    job = jb.Job(
        id=event.id,
        requested=event.size,
        start_size=event.facts.size,
        current_size=event.facts.size,
        started=event.wall,
        deadline=event.at + state.config.capacity_wait_s,
        best_effort=event.best_effort,
    )
    verb = "shrink" if job.shrinks else "grow"
    to = "as far as possible towards" if job.best_effort else "to"
    note = ev.Note(f"{verb} from {format_size(job.start_size)} {to} {format_size(job.requested)} begins")
    state, effects = _capacity(replace(state, job=job), event.facts.device, event.at, event.wall)
    return state, (note, *effects, ev.AcceptResize())


def _capacity(state: State, device: int, at: float, wall: float) -> Result:
    """The job goes on if the device is large enough, waits if not, and fails once it has waited too long."""
    job = state.active_job
    if job is None or job.state not in (jb.JobState.REQUESTED, jb.JobState.WAITING):
        return state, ()
    if device >= sector_floor(job.requested):
        job = jb.signalled(job, jb.Signal.CAPACITY_THERE)
        # From here on the balloon is the job's.
        # Begun before it is written down: a crash in between is judged by the size alone, and nobody was answered.
        return replace(state, job=job, poll_at=None), (ev.StartResize(job), ev.Save())
    if job.state is jb.JobState.WAITING and at >= job.deadline:
        reason = (
            f"the device has {device} bytes, {job.requested} were asked for,"
            f" and it did not grow within {state.config.capacity_wait_s:g} s"
        )
        return _end(state, job, jb.Signal.FAILED, job.current_size, reason, wall)
    job = jb.signalled(job, jb.Signal.CAPACITY_SHORT)
    return replace(state, job=job, poll_at=min(at + state.config.capacity_poll_s, job.deadline)), (ev.Save(),)


def _end(state: State, job: jb.Job, signal: jb.Signal, size: int, reason: str, wall: float) -> Result:
    last = jb.ended(job, signal, current_size=size, reason=reason, now=wall)
    text = f"resize to {format_size(last.requested)} {last.state.value}"
    if job.best_effort:
        text = f"shrink towards {format_size(last.requested)} {last.state.value} at {format_size(last.current_size)}"
    note = ev.Note(f"{text}: {last.reason}" if last.reason else text, warning=last.state is jb.JobState.FAILED)
    state, retry = _retry(replace(state, job=last, poll_at=None))
    return state, (ev.Save(), note, *retry)


def _cancel_requested(state: State, event: ev.CancelRequested) -> Result:
    job = state.active_job
    if job is None:
        return state, (ev.AnswerCancel(None),)
    after = jb.signalled(job, jb.Signal.CANCEL)
    if not after.active:
        state, effects = _end(state, job, jb.Signal.CANCEL, job.current_size, event.reason, event.wall)
        return state, (ev.AnswerCancel(job.id), *effects)
    state = replace(state, job=replace(after, reason=event.reason))
    again = job.state is jb.JobState.CANCELLING
    return state, (ev.AnswerCancel(job.id), *(() if again else (ev.CancelResize(job.id),)))


def _job_prepared(state: State, event: ev.JobPrepared) -> Result:
    job = state.active_job
    if job is None or job.id != event.id:
        return state, ()
    return replace(state, job=jb.signalled(job, jb.Signal.PREPARED)), ()


def _job_progressed(state: State, event: ev.JobProgressed) -> Result:
    job = state.active_job
    if job is None or job.id != event.id:
        return state, ()
    after = jb.progressed(
        job, current_size=event.current_size, moved=event.moved, to_move=event.to_move, now=event.wall
    )
    return replace(state, job=after), ()


_SIGNAL = {
    ev.Outcome.SUCCEEDED: jb.Signal.SUCCEEDED,
    ev.Outcome.FAILED: jb.Signal.FAILED,
    ev.Outcome.STOPPED: jb.Signal.STOPPED,
}


def _job_ended(state: State, event: ev.JobEnded) -> Result:
    job = state.active_job
    if job is None or job.id != event.id:
        return state, ()
    job = replace(job, moved=max(job.moved, event.moved))
    cancelled = job.state is jb.JobState.CANCELLING and event.outcome is ev.Outcome.STOPPED
    return _end(
        state,
        job,
        _SIGNAL[event.outcome],
        event.current_size,
        (job.reason or event.reason) if cancelled else event.reason,
        event.wall,
    )


def _capacity_changed(state: State, event: ev.CapacityChanged) -> Result:
    return _capacity(state, event.device, event.at, event.wall)


# --- time, sleep, start ---------------------------------------------------------------------------------------


def _tick(state: State, event: ev.Tick) -> Result:
    before = state.pressure.level
    state = replace(state, pressure=pr.settled(state.pressure, event.at, state.config))
    state, effects = _entered(state, before, event.at)
    if effects and state.report is not None and state.pressure.level is not before:
        # It settled for the worst of the wait; what the host said last may ask for better still.
        last = replace(state.report, at=event.at)
        state = replace(state, pressure=pr.reported(state.pressure, last, state.config))
    if state.restore_at is not None and event.at >= state.restore_at:
        state, restoring = _act(state, Level.NORMAL, event.at)
        effects = (*effects, *restoring)
    balloon = state.balloon
    if balloon.retry_at is not None and event.at >= balloon.retry_at:
        state, retry = _retry(state)
        return state, (*effects, *retry)
    if balloon.guard_at is not None and event.at >= balloon.guard_at and not balloon.pending:
        guarded = replace(balloon, guard_at=None)  # set again when the answer is there
        return replace(state, balloon=guarded), (*effects, ev.GuardMetadata(balloon.relief))
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
    state, acting = _act(state, level, event.at)
    effects += [effect for effect in acting if not isinstance(effect, ev.Trim | ev.Sync)]
    effects.append(ev.Save())
    state, retry = _retry(state)
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
    ev.HostReported: _host_reported,
    ev.BalloonSettled: _balloon_settled,
    ev.BalloonGuarded: _balloon_guarded,
    ev.BalloonFailed: _balloon_failed,
    ev.ReleaseRequested: _release_requested,
    ev.DirtyLimitsFound: _dirty_limits_found,
    ev.DirtyLimitsRestored: _dirty_limits_restored,
    ev.Trimmed: _trimmed,
    ev.ResizeRequested: _resize_requested,
    ev.CancelRequested: _cancel_requested,
    ev.JobPrepared: _job_prepared,
    ev.JobProgressed: _job_progressed,
    ev.JobEnded: _job_ended,
    ev.CapacityChanged: _capacity_changed,
    ev.Tick: _tick,
    ev.SuspendRequested: _suspend_requested,
    ev.Recovered: _recovered,
}
