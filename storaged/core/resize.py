"""The storage core's handlers of resize jobs (rule 4 of `core.machine`)."""

from __future__ import annotations

from dataclasses import replace

from storaged.core import balloon as bl
from storaged.core import events as ev
from storaged.core.pressure import says_critical
from storaged.core.state import Result, State
from storaged.errors import Kind
from storaged.resize import job as jb
from storaged.units import MAX_SIZE, format_size, sector_floor


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
    # The level waits before it gets better; what the host said last does not.
    if sector_floor(size) > facts.size and says_critical(state.report, state.config):
        return ev.RefuseResize(
            Kind.PRECONDITION,
            f"size {size} would grow the filesystem (now {facts.size} bytes) while the host's disk is critically"
            " full; free space on the host first",
        )
    return None


def resize_requested(state: State, event: ev.ResizeRequested) -> Result:
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
        began=event.at,
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
    state, retry = bl.retry(replace(state, job=last, poll_at=None))
    return state, (ev.Save(), note, *retry)


def cancel_requested(state: State, event: ev.CancelRequested) -> Result:
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


def job_prepared(state: State, event: ev.JobPrepared) -> Result:
    job = state.active_job
    if job is None or job.id != event.id:
        return state, ()
    return replace(state, job=jb.signalled(job, jb.Signal.PREPARED)), ()


def job_progressed(state: State, event: ev.JobProgressed) -> Result:
    job = state.active_job
    if job is None or job.id != event.id:
        return state, ()
    after = jb.progressed(job, current_size=event.current_size, moved=event.moved, to_move=event.to_move, now=event.at)
    return replace(state, job=after), ()


_SIGNAL = {
    ev.Outcome.SUCCEEDED: jb.Signal.SUCCEEDED,
    ev.Outcome.FAILED: jb.Signal.FAILED,
    ev.Outcome.STOPPED: jb.Signal.STOPPED,
}


def job_ended(state: State, event: ev.JobEnded) -> Result:
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


def capacity_changed(state: State, event: ev.CapacityChanged) -> Result:
    return _capacity(state, event.device, event.at, event.wall)
