"""The storage core by replaying events: sleep and start, then what holds whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.core import events as ev
from storaged.core.balloon import ON_ENTER
from storaged.core.machine import HANDLERS, next_wakeup, step
from storaged.core.model import Config, DirtyLimits, HostReport, KernelReclaim, Level, Told
from storaged.core.state import BALLOON_AFTER, Balloon, BalloonSignal, BalloonState, State
from storaged.resize.job import Job, JobState
from storaged.units import GIB
from tests.core.events import FOUND, ended, events, kinds, moved, of, wake

CONFIG = Config()


def test_the_tables_are_whole() -> None:
    assert set(ON_ENTER) == set(Level)
    assert set(BALLOON_AFTER) == set(BalloonState)
    assert all(set(row) == set(BalloonSignal) for row in BALLOON_AFTER.values())
    assert set(HANDLERS) == set(ev.Event.__args__)


def test_before_sleep_everything_is_durable() -> None:
    assert step(State(), ev.SuspendRequested(0.0)) == (State(), (ev.Save(), ev.Sync()))


def recovered(**known: object) -> ev.Recovered:
    """A start on an 8 GiB filesystem."""
    found = ev.Recovered(size=8 * GIB, device=8 * GIB, available=5 * GIB, balloon=0, at=100.0, wall=200.0)
    return replace(found, **known)  # type: ignore[arg-type]  # fields of Recovered, by name


def test_the_first_start_holds_nothing() -> None:
    state, effects = step(State(), recovered())
    assert effects == (ev.RuleOutReclaim(), ev.Save())
    assert state.balloon == Balloon()
    assert not state.pressure.known


def test_a_remembered_limit_is_held_again_at_once() -> None:
    report = HostReport(Told.LOW, 2 * GIB, 100.0)
    state, effects = step(State(), recovered(limit=GIB, level=Level.LOW, report=report, balloon=GIB, dirty_found=FOUND))
    assert of(effects, ev.HoldAvailable) == [ev.HoldAvailable(GIB, fresh=False)]
    assert (state.pressure.level, state.pressure.known, state.dirty_found) == (Level.LOW, True, FOUND)
    assert not of(effects, ev.RestoreDirtyLimits)


def test_a_balloon_that_nobody_remembers_keeps_what_it_protects() -> None:
    state, effects = step(State(), recovered(balloon=GIB))
    assert state.balloon.limit == 5 * GIB
    assert of(effects, ev.HoldAvailable) == [ev.HoldAvailable(5 * GIB, fresh=False)]


def test_limits_of_a_pressure_that_is_over_are_put_back_at_the_start() -> None:
    state, effects = step(State(), recovered(level=Level.NORMAL, dirty_found=FOUND))
    assert kinds(effects) == [ev.RestoreDirtyLimits, ev.RuleOutReclaim, ev.Save]
    assert step(state, ev.DirtyLimitsRestored())[0].dirty_found is None


def test_what_the_kernel_was_found_to_reclaim_is_kept_until_the_release() -> None:
    found = KernelReclaim(threshold=75)
    state, effects = step(State(), ev.ReclaimFound(found))
    assert ev.Save() in effects
    state, _ = step(state, ev.ReclaimFound(KernelReclaim(dynamic=1)))
    assert state.reclaim_found == found, "what was found first"
    _, effects = step(state, ev.ReleaseRequested(0.0))
    assert ev.RestoreReclaim(found) in effects
    state, effects = step(state, ev.ReclaimRestored())
    assert (state.reclaim_found, effects) == (None, (ev.Save(),))


def test_limits_that_could_not_be_put_back_are_tried_again() -> None:
    state, _ = step(State(), recovered(level=Level.NORMAL, dirty_found=FOUND))
    at = next_wakeup(state)
    assert at is not None
    state, effects = step(state, ev.Tick(at, 0.0))
    assert of(effects, ev.RestoreDirtyLimits) == [ev.RestoreDirtyLimits(FOUND)]
    assert next_wakeup(state) == at + CONFIG.retry_most_s


@pytest.mark.parametrize("level", [Level.LOW, Level.CRITICAL])
def test_limits_of_a_pressure_that_goes_on_are_lowered_at_the_start(level: Level) -> None:
    state, effects = step(State(), recovered(level=level, dirty_found=FOUND))
    assert kinds(effects) == [ev.SetDirtyLimits, ev.RuleOutReclaim, ev.Save]
    assert state.dirty_found == FOUND


@pytest.mark.parametrize("state", [state for state in JobState if state.active])
def test_a_job_that_was_running_ends_in_what_is_true(state: JobState) -> None:
    job = Job("a", 4 * GIB + 5, 8 * GIB, 8 * GIB, state=state)
    done, _ = step(State(), recovered(job=job, size=4 * GIB))
    assert done.job is not None
    assert (done.job.state, done.job.current_size, done.job.reason) == (JobState.DONE, 4 * GIB + 5, "")
    failed, _ = step(State(), recovered(job=job, size=6 * GIB))
    assert failed.job is not None
    assert (failed.job.state, failed.job.current_size, failed.job.ended) == (JobState.FAILED, 6 * GIB, 200.0)
    assert str(6 * GIB) in failed.job.reason


@pytest.mark.parametrize("state", [state for state in JobState if not state.active])
def test_a_job_that_had_ended_stays_as_it_ended(state: JobState) -> None:
    job = Job("a", 4 * GIB, 8 * GIB, 6 * GIB, state=state, reason="so")
    assert step(State(), recovered(job=job))[0].job == job


# --- whatever happens -----------------------------------------------------------------------------------------


class Witness:
    """Follows a state through events and checks what must hold after each."""

    def __init__(self, config: Config) -> None:
        self.state = State(config)
        self.original = self.dirty = FOUND
        self.accepted: list[str] = []
        self.ended: list[str] = []
        self.started: list[str] = []

    def step(self, event: ev.Event) -> None:
        before = self.state
        self.state, effects = step(before, event)
        self.jobs(before, effects)
        state = self.state
        assert state.balloon.limit is None or state.balloon.limit >= 0
        assert state.balloon.relief >= 0
        for hold in of(effects, ev.HoldAvailable):
            assert hold.limit == state.balloon.limit
            assert state.balloon.pending
        for sample in of(effects, ev.Sample):
            assert sample.adjust == (state.active_job is None), "a job's steps adjust the balloon themselves"
        if ev.IgnoreReport() in effects:
            assert replace(state, ignored_reports=0) == replace(before, ignored_reports=0)
            assert len(effects) == 1
        if of(effects, ev.AnswerReport):
            assert before.balloon.asked
            assert not state.balloon.asked
        assert state.balloon.retry_at is None or not state.balloon.pending
        for effect in effects:
            if isinstance(effect, ev.SetDirtyLimits):
                self.step(ev.DirtyLimitsFound(self.dirty))
                self.dirty = DirtyLimits(effect.dirty_bytes, effect.dirty_bytes // 2, 0, 0)
            elif isinstance(effect, ev.RestoreDirtyLimits):
                assert self.dirty != self.original, "put back once"
                self.dirty = effect.limits
                self.step(ev.DirtyLimitsRestored())
        if isinstance(event, ev.DirtyLimitsFound):
            return  # in the midst of another step
        if self.state.pressure.level is Level.NORMAL:
            assert self.dirty == self.original
            assert self.state.dirty_found is None
        else:
            assert self.dirty != self.original

    def jobs(self, before: State, effects: tuple[ev.Effect, ...]) -> None:
        after = self.state.job
        if of(effects, ev.AcceptResize) == [ev.AcceptResize()]:
            assert before.active_job is None
            assert after is not None
            self.accepted.append(after.id)
        for start in of(effects, ev.StartResize):
            assert start.job.id not in self.started
            self.started.append(start.job.id)
            assert start.job == after
        if before.active_job is not None and self.state.active_job is None:
            self.ended.append(before.active_job.id)
        if after is not None:
            assert after.active == (after.id not in self.ended)
            assert after.active or after.state is JobState.DONE or after.reason
        assert self.accepted[: len(self.ended)] == self.ended, "each ends once, in order"
        assert len(self.accepted) - len(self.ended) == (1 if self.state.active_job else 0)

    def sleep(self) -> None:
        """Let time come to the next wakeup, and to the next, until nothing waits or it is far away."""
        last = None
        for _ in range(3):
            at = next_wakeup(self.state)
            event = wake(self.state)
            if at is None or event is None:
                return
            assert last is None or at > last, "a wakeup that changes nothing: the daemon would spin"
            self.step(event)
            last = at


@given(data=st.data(), length=st.integers(1, 30), settle_s=st.sampled_from([0, 10]))
def test_what_holds_whatever_happens(data: st.DataObject, length: int, settle_s: int) -> None:
    witness = Witness(Config(settle_s=settle_s))
    at = 1000.0
    for number in range(length):
        at += data.draw(st.integers(0, 40))
        event = moved(data.draw(events), at)
        job = witness.state.active_job
        match event:
            case ev.ResizeRequested():
                event = replace(event, id=f"job {number}")
            case ev.JobPrepared() | ev.JobProgressed() if job is not None and data.draw(st.booleans()):
                event = replace(event, id=job.id)
            case _:
                pass
        witness.step(event)
        job = witness.state.active_job
        if job is not None and job.id in witness.started and data.draw(st.integers(0, 3)) == 0:
            outcome = data.draw(st.sampled_from(ev.Outcome))
            witness.step(ended(job.id, outcome, job.start_size, "why", at))
        if data.draw(st.booleans()):
            witness.sleep()
