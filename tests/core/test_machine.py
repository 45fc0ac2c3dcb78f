"""The storage core, by replaying events: each rule of its docstring, then what holds whatever happens."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.core import events as ev
from storaged.core.balloon import ON_ENTER
from storaged.core.machine import HANDLERS, next_wakeup, step
from storaged.core.model import Config, DirtyLimits, HostReport, Level, Told
from storaged.core.pressure import Pressure
from storaged.core.resize import refusal
from storaged.core.state import BALLOON_AFTER, Balloon, BalloonSignal, BalloonState, State
from storaged.errors import Kind
from storaged.resize.job import Job, JobState
from storaged.units import GIB, MAX_SIZE, MIB
from tests.core.events import FACTS, FOUND, ended, events, moved, play, reported, requested, wake

CONFIG = Config()
E = TypeVar("E", bound=ev.Effect)


def kinds(effects: tuple[ev.Effect, ...]) -> list[type[ev.Effect]]:
    """The effects' types, notes left out."""
    return [type(effect) for effect in effects if not isinstance(effect, ev.Note)]


def of(effects: tuple[ev.Effect, ...], kind: type[E]) -> list[E]:
    """The effects of one type."""
    return [effect for effect in effects if isinstance(effect, kind)]


def test_the_tables_are_whole() -> None:
    assert set(ON_ENTER) == set(Level)
    assert set(BALLOON_AFTER) == set(BalloonState)
    assert all(set(row) == set(BalloonSignal) for row in BALLOON_AFTER.values())
    assert set(HANDLERS) == set(ev.Event.__args__)


# --- rule 1: reports and the limit ----------------------------------------------------------------------------


@pytest.mark.parametrize(("told", "free"), [(Told.NONE, 5 * GIB), (Told.NONE, -1), (Told.NORMAL, -1), (Told.LOW, -5)])
def test_a_report_without_news_changes_nothing_but_its_counter(told: Told, free: int) -> None:
    before, _ = play(State(), reported(3 * GIB))
    after, effects = step(before, reported(free, told))
    assert effects == (ev.IgnoreReport(),)
    assert after == replace(before, ignored_reports=1)


@pytest.mark.parametrize(
    ("free", "limit"),
    [(0, 0), (GIB - 1, 0), (GIB, 0), (GIB + 1, 1), (5 * GIB, 4 * GIB), ((1 << 63) - 1, (1 << 63) - 1 - GIB)],
)
def test_the_limit_is_what_is_free_less_the_reserve(free: int, limit: int) -> None:
    state, effects = step(State(), reported(free))
    assert effects[0] == ev.HoldAvailable(limit)
    assert state.balloon.limit == limit
    assert ev.Save() in effects


def test_the_answer_goes_out_when_the_balloon_is_there() -> None:
    state, effects = step(State(), reported(5 * GIB))
    assert not of(effects, ev.AnswerReport)
    state, effects = step(state, ev.BalloonSettled(4 * GIB, 3 * GIB, 1.0))
    assert effects == (ev.AnswerReport(),)
    assert state.balloon == Balloon(limit=4 * GIB, size=3 * GIB, guard_at=1.0 + CONFIG.guard_every_s)


def test_the_answer_says_why_it_is_not() -> None:
    state, effects = play(State(), reported(5 * GIB), ev.BalloonFailed(4 * GIB, MIB, "no room", 1.0))
    assert of(effects, ev.AnswerReport) == [ev.AnswerReport("no room")]
    assert (state.balloon.state, state.balloon.reason, state.balloon.size) == (BalloonState.FAILED, "no room", MIB)


def test_a_balloon_that_settled_while_chunks_moved_is_held_again() -> None:
    state, _ = play(State(), reported(5 * GIB))
    state, effects = step(state, ev.BalloonSettled(4 * GIB, 3 * GIB, 1.0, again=True))
    assert effects == (ev.AnswerReport(),)
    again = 1.0 + CONFIG.retry_first_s
    assert next_wakeup(state) == again
    state, effects = step(state, ev.Tick(again, 0.0))
    assert effects == (ev.HoldAvailable(4 * GIB, fresh=False),)
    state, _ = step(state, ev.BalloonSettled(4 * GIB, 3 * GIB, again))
    assert state.balloon.retry_at is None


def test_an_older_limit_that_settles_answers_nobody() -> None:
    state, _ = play(State(), reported(5 * GIB), reported(3 * GIB))
    state, effects = step(state, ev.BalloonSettled(4 * GIB, GIB, 1.0))
    assert effects == ()
    assert state.balloon.asked
    assert state.balloon.pending
    state, effects = step(state, ev.BalloonFailed(4 * GIB, GIB, "late", 1.0))
    assert effects == ()
    state, effects = step(state, ev.BalloonSettled(2 * GIB, 2 * GIB, 2.0))
    assert effects == (ev.AnswerReport(),)


def test_a_balloon_that_settles_unasked_answers_nobody() -> None:
    state, _ = play(State(), reported(5 * GIB), ev.BalloonSettled(4 * GIB, GIB, 1.0))
    assert step(state, ev.BalloonSettled(4 * GIB, GIB, 2.0))[1] == ()


# --- rule 2: levels and write-back limits ---------------------------------------------------------------------


def test_low_lowers_the_limits_and_trims() -> None:
    state, effects = step(State(), reported(2 * GIB))
    assert state.pressure.level is Level.LOW
    assert of(effects, ev.SetDirtyLimits) == [ev.SetDirtyLimits(CONFIG.low_dirty)]
    assert of(effects, ev.Trim) == [ev.Trim()]
    assert of(effects, ev.Sync) == []


def test_critical_flushes_before_it_trims() -> None:
    _, effects = step(State(), reported(0))
    assert kinds(effects) == [ev.HoldAvailable, ev.SetDirtyLimits, ev.Sync, ev.Trim, ev.Save]
    assert of(effects, ev.SetDirtyLimits) == [ev.SetDirtyLimits(CONFIG.critical_dirty)]


def test_staying_at_a_level_does_not_enter_it_again() -> None:
    state, _ = step(State(), reported(2 * GIB))
    _, effects = step(state, reported(2 * GIB, at=1.0))
    assert kinds(effects) == [ev.HoldAvailable], "nothing new to write down either"


def test_staying_long_above_normal_trims_again() -> None:
    state, _ = step(State(), reported(2 * GIB))
    state, effects = step(state, reported(2 * GIB, at=CONFIG.trim_again_s - 1))
    assert not of(effects, ev.Trim)
    state, effects = step(state, reported(2 * GIB, at=CONFIG.trim_again_s))
    assert of(effects, ev.Trim)
    assert state.trimmed_at == CONFIG.trim_again_s


def test_only_the_first_limits_found_are_kept() -> None:
    state, effects = play(State(), reported(2 * GIB), ev.DirtyLimitsFound(FOUND))
    assert state.dirty_found == FOUND
    assert effects[-1] == ev.Save()
    state, effects = play(state, reported(0, at=1.0), ev.DirtyLimitsFound(DirtyLimits(1, 1, 0, 0)))
    assert state.dirty_found == FOUND


def test_normal_puts_back_exactly_what_was_found_once() -> None:
    state, _ = play(State(), reported(0), ev.DirtyLimitsFound(FOUND), reported(9 * GIB, at=1.0))
    assert state.pressure.level is Level.CRITICAL
    state, effects = play(state, ev.Tick(1.0 + CONFIG.settle_s, 0.0))
    assert state.pressure.level is Level.NORMAL
    assert of(effects, ev.RestoreDirtyLimits) == [ev.RestoreDirtyLimits(FOUND)]
    assert state.dirty_found == FOUND, "not forgotten before it is done"
    state, effects = step(state, ev.DirtyLimitsRestored())
    assert effects == (ev.Save(),)
    assert (state.dirty_found, state.restore_at) == (None, None)
    _, effects = play(state, reported(9 * GIB, at=20.0), ev.Tick(30.0, 0.0))
    assert not of(effects, ev.RestoreDirtyLimits)


def test_write_back_limits_that_could_not_be_put_back_are_tried_again() -> None:
    lowered = (reported(2 * GIB), ev.DirtyLimitsFound(FOUND))
    state, _ = play(State(), *lowered, reported(9 * GIB, at=1.0), ev.Tick(11.0, 0.0))
    assert state.dirty_found == FOUND
    at = 0.0
    for _ in range(3):
        at = next_wakeup(state) or 0.0
        state, effects = step(state, ev.Tick(at, 0.0))
        assert effects == (ev.RestoreDirtyLimits(FOUND),)
    again, effects = step(state, reported(2 * GIB, at=at))
    assert of(effects, ev.SetDirtyLimits)
    assert next_wakeup(again) is None, "no longer wanted"
    assert step(again, ev.DirtyLimitsRestored())[0].dirty_found == FOUND, "too late: they were lowered again"
    state, _ = step(state, ev.DirtyLimitsRestored())
    assert next_wakeup(state) is None


def test_a_report_that_leads_to_normal_restores_before_it_forgets() -> None:
    state = replace(State(Config(settle_s=0)), pressure=Pressure(Level.LOW, known=True), dirty_found=FOUND)
    _, effects = step(state, reported(9 * GIB))
    assert effects.index(ev.RestoreDirtyLimits(FOUND)) < effects.index(ev.Save())


def test_a_host_that_says_no_more_is_believed_in_the_end() -> None:
    """Hosts report only what moved by 100 MiB: the last report may stay the last for long."""
    state, _ = play(State(), reported(0), reported(2 * GIB, at=1.0), reported(64 * GIB, at=2.0))
    for _ in range(10):
        event = wake(state)
        if event is None:
            break
        state, _ = step(state, event)
    assert state.pressure.level is Level.NORMAL


# --- rule 3: retries ------------------------------------------------------------------------------------------


def test_retries_come_at_growing_intervals_up_to_a_most() -> None:
    state, at = step(State(), reported(5 * GIB))[0], 0.0
    waits = []
    for _ in range(8):
        state, _ = step(state, ev.BalloonFailed(4 * GIB, 0, "no room", at))
        wakeup = next_wakeup(state)
        assert wakeup is not None
        assert step(state, ev.Tick(wakeup - 0.01, 0.0)) == (state, ())
        waits.append(wakeup - at)
        at = wakeup
        state, effects = step(state, ev.Tick(at, 0.0))
        assert effects == (ev.HoldAvailable(4 * GIB, fresh=False),)
        assert next_wakeup(state) is None
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_success_forgets_the_failures_and_says_so() -> None:
    state, _ = play(State(), reported(5 * GIB), ev.BalloonFailed(4 * GIB, 0, "no room", 0.0), ev.Tick(1.0, 0.0))
    state, effects = step(state, ev.BalloonSettled(4 * GIB, GIB, 1.0))
    assert (state.balloon.failures, state.balloon.reason, state.balloon.retry_at) == (0, "", None)
    assert effects == (ev.Note("the balloon is at its target again"),)


def test_the_same_failure_is_said_once() -> None:
    failed = ev.BalloonFailed(4 * GIB, 0, "no room", 0.0)
    state, effects = play(State(), reported(5 * GIB), failed)
    assert len([note for note in of(effects, ev.Note) if note.warning]) == 1
    state, effects = play(state, ev.Tick(1.0, 0.0), failed)
    assert not of(effects, ev.Note)
    _, effects = play(state, ev.Tick(9.0, 0.0), replace(failed, reason="busy"))
    assert len(of(effects, ev.Note)) == 1


def test_metadata_is_guarded_while_the_balloon_holds_anything() -> None:
    state, _ = play(State(), reported(5 * GIB), ev.BalloonSettled(4 * GIB, GIB, 0.0))
    assert next_wakeup(state) == CONFIG.guard_every_s
    state, effects = step(state, ev.Tick(CONFIG.guard_every_s, 0.0))
    assert effects == (ev.GuardMetadata(0),)
    assert next_wakeup(state) is None, "not before the answer"
    state, _ = step(state, ev.BalloonGuarded(GIB - 100 * MIB, 100 * MIB, 3.0, tight=True))
    assert (state.balloon.relief, state.balloon.size) == (100 * MIB, GIB - 100 * MIB)
    assert next_wakeup(state) == 3.0 + CONFIG.guard_soon_s
    state, effects = step(state, ev.Tick(4.0, 0.0))
    assert effects == (ev.GuardMetadata(100 * MIB),)
    state, _ = step(state, ev.BalloonGuarded(0, 0, 5.0))
    assert next_wakeup(state) is None
    state, _ = step(state, reported(5 * GIB, at=6.0))
    assert state.balloon.relief == 0, "each report starts anew"


@pytest.mark.parametrize(
    ("tight", "calm", "after"),
    [
        (False, False, CONFIG.guard_every_s),
        (False, True, CONFIG.guard_calm_s),
        (True, False, CONFIG.guard_soon_s),
        (True, True, CONFIG.guard_soon_s),
    ],
)
def test_the_less_headroom_the_sooner_it_is_looked_at(tight: bool, calm: bool, after: float) -> None:
    state, _ = play(State(), reported(5 * GIB), ev.BalloonSettled(4 * GIB, GIB, 0.0))
    state, _ = step(state, ev.BalloonGuarded(GIB, 0, 2.0, tight, calm))
    assert next_wakeup(state) == 2.0 + after


def test_a_balloon_that_failed_is_guarded_too() -> None:
    state, _ = play(State(), reported(5 * GIB), ev.BalloonFailed(4 * GIB, GIB, "no room", 0.0))
    assert state.balloon.guard_at == CONFIG.guard_every_s


def test_an_empty_balloon_guards_nothing() -> None:
    state, _ = play(State(), reported(5 * GIB), ev.BalloonSettled(4 * GIB, 0, 0.0))
    assert next_wakeup(state) is None


def test_a_release_that_failed_does_not_spin() -> None:
    state, _ = play(State(), reported(5 * GIB), ev.ReleaseRequested(0.0), ev.BalloonFailed(None, GIB, "busy", 0.0))
    at = next_wakeup(state)
    if at is not None:
        state, _ = step(state, ev.Tick(at, 0.0))
        after = next_wakeup(state)
        assert after is None or after > at


def test_a_release_gives_everything_back() -> None:
    state, _ = play(State(), reported(0), ev.DirtyLimitsFound(FOUND))
    state, effects = step(state, ev.ReleaseRequested(1.0))
    assert kinds(effects) == [ev.HoldAvailable, ev.RestoreDirtyLimits, ev.Save]
    assert effects[0] == ev.HoldAvailable(None)
    state, _ = step(state, ev.DirtyLimitsRestored())
    assert (state.balloon.limit, state.dirty_found, state.pressure, state.report) == (None, None, Pressure(), None)


# --- rule 4: resize jobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "facts", "kind"),
    [
        (0, FACTS, Kind.INVALID),
        (256 * MIB - 1, FACTS, Kind.INVALID),
        (MAX_SIZE + 1, FACTS, Kind.INVALID),
        ((1 << 64) - 1, FACTS, Kind.INVALID),
        (GIB - 1, FACTS, Kind.OUT_OF_RANGE),
        (4 * GIB, replace(FACTS, minimum=0), Kind.PRECONDITION),
        (4 * GIB, replace(FACTS, read_only=True), Kind.PRECONDITION),
        (12 * GIB, replace(FACTS, read_only=True), Kind.PRECONDITION),
    ],
)
def test_a_request_that_cannot_be_is_refused_with_the_numbers(size: int, facts: ev.Facts, kind: Kind) -> None:
    state, effects = step(State(), requested(size, facts=facts))
    assert state == State()
    (refused,) = effects
    assert isinstance(refused, ev.RefuseResize)
    assert refused.kind is kind
    assert str(size) in refused.message or facts.read_only or not facts.minimum


def test_the_bound_itself_and_the_same_size_are_accepted() -> None:
    for size in (GIB, 8 * GIB, 8 * GIB + 4095, 256 * MIB):
        facts = replace(FACTS, minimum=256 * MIB) if size < GIB else FACTS
        assert refusal(size, facts, State()) is None


def test_nothing_grows_while_the_host_is_critically_full() -> None:
    state, _ = step(State(), reported(0))
    refused = refusal(9 * GIB, FACTS, state)
    assert refused is not None
    assert refused.kind is Kind.PRECONDITION
    assert refusal(4 * GIB, FACTS, state) is None, "shrinking helps"
    assert refusal(9 * GIB, FACTS, step(State(), reported(2 * GIB))[0]) is None


def test_a_job_from_start_to_end() -> None:
    state, effects = step(State(), requested(4 * GIB))
    assert kinds(effects) == [ev.StartResize, ev.Save, ev.AcceptResize]
    assert state.job is not None
    assert state.job.state is JobState.PREPARING
    state, _ = step(state, ev.JobPrepared("a"))
    assert state.job is not None
    assert state.job.state is JobState.RUNNING
    state, _ = step(state, ev.JobProgressed("a", 6 * GIB, 0, 0, 1.0))
    assert state.job is not None
    assert state.job.current_size == 6 * GIB
    state, effects = step(state, ended())
    assert state.job is not None
    assert (state.job.state, state.job.current_size) == (JobState.DONE, 4 * GIB)
    assert kinds(effects) == [ev.Save]
    assert state.active_job is None


def test_a_resize_is_on_record_before_it_is_answered() -> None:
    _, effects = step(State(), requested(4 * GIB))
    assert effects.index(ev.Save()) < effects.index(ev.AcceptResize())


def test_a_second_request_is_told_so_whatever_it_asks() -> None:
    state, _ = step(State(), requested(4 * GIB))
    for size in (4 * GIB, 6 * GIB, 300 * MIB):
        assert step(state, requested(size, "b")) == (state, (ev.AcceptResize(already=True),))
    assert isinstance(step(state, requested(0, "b"))[1][0], ev.RefuseResize), "nonsense stays nonsense"


def test_after_a_job_the_balloon_is_brought_back_to_the_limit() -> None:
    state, _ = play(State(), reported(5 * GIB), ev.BalloonSettled(4 * GIB, GIB, 0.0), requested(4 * GIB))
    for outcome in ev.Outcome:
        running, _ = step(state, ev.JobPrepared("a"))
        after, effects = step(running, ended(outcome=outcome, size=8 * GIB, reason="why"))
        assert of(effects, ev.HoldAvailable) == [ev.HoldAvailable(4 * GIB, fresh=False)]
        assert after.balloon.pending


def test_a_failed_job_has_its_reason_and_the_true_size() -> None:
    state, _ = play(State(), requested(4 * GIB), ev.JobPrepared("a"))
    state, effects = step(state, ended(outcome=ev.Outcome.FAILED, size=5 * GIB, reason="no room"))
    assert state.job is not None
    assert (state.job.state, state.job.reason, state.job.current_size) == (JobState.FAILED, "no room", 5 * GIB)
    assert any(note.warning and "no room" in note.text for note in of(effects, ev.Note))


def test_news_of_another_job_is_ignored() -> None:
    state, _ = step(State(), requested(4 * GIB))
    for event in (ev.JobPrepared("z"), ev.JobProgressed("z", 1, 2, 3, 4.0), ended("z")):
        assert step(state, event) == (state, ())
        assert step(State(), event) == (State(), ())


def waiting() -> State:
    """A job that waits for a device of 20 GiB."""
    state, effects = step(State(), requested(20 * GIB))
    assert kinds(effects) == [ev.Save, ev.AcceptResize]
    assert state.job is not None
    assert state.job.state is JobState.WAITING
    return state


def test_a_job_waits_for_its_device_and_goes_on() -> None:
    state = waiting()
    assert next_wakeup(state) == CONFIG.capacity_poll_s
    state, effects = step(state, ev.CapacityChanged(18 * GIB, 1.0, 1.0))
    assert not of(effects, ev.StartResize)
    assert next_wakeup(state) == 1.0 + CONFIG.capacity_poll_s
    state, effects = step(state, ev.CapacityChanged(20 * GIB, 2.0, 2.0))
    assert kinds(effects) == [ev.StartResize, ev.Save]
    assert next_wakeup(state) is None
    assert step(state, ev.CapacityChanged(20 * GIB, 3.0, 3.0)) == (state, ()), "started once"


def test_a_size_that_is_no_multiple_needs_only_its_whole_sectors() -> None:
    _, effects = step(State(), requested(16 * GIB + 4095))
    assert of(effects, ev.StartResize)


def test_a_job_waits_no_longer_than_it_may() -> None:
    state, _ = step(waiting(), ev.CapacityChanged(16 * GIB, CONFIG.capacity_wait_s - 0.1, 1.0))
    assert next_wakeup(state) == CONFIG.capacity_wait_s
    state, effects = step(state, ev.CapacityChanged(16 * GIB, CONFIG.capacity_wait_s, 9.0))
    assert state.job is not None
    assert state.job.state is JobState.FAILED
    assert str(16 * GIB) in state.job.reason
    assert str(20 * GIB) in state.job.reason
    assert next_wakeup(state) is None
    assert kinds(effects) == [ev.Save]


def test_capacity_without_a_job_means_nothing() -> None:
    assert step(State(), ev.CapacityChanged(GIB, 0.0, 0.0)) == (State(), ())


def test_cancel_without_a_job() -> None:
    assert step(State(), ev.CancelRequested(0.0, 0.0)) == (State(), (ev.AnswerCancel(None),))


def test_cancel_while_waiting_ends_at_once() -> None:
    state, effects = step(waiting(), ev.CancelRequested(1.0, 2.0, "enough"))
    assert state.job is not None
    assert (state.job.state, state.job.reason, state.job.ended) == (JobState.CANCELLED, "enough", 2.0)
    assert effects[0] == ev.AnswerCancel("a")
    assert not of(effects, ev.CancelResize)
    assert next_wakeup(state) is None


@pytest.mark.parametrize("prepared", [False, True])
def test_cancel_while_the_kernel_works_stops_it_once(prepared: bool) -> None:
    state, _ = play(State(), requested(4 * GIB), *([ev.JobPrepared("a")] if prepared else []))
    state, effects = step(state, ev.CancelRequested(1.0, 1.0, "enough"))
    assert effects == (ev.AnswerCancel("a"), ev.CancelResize("a"))
    state, effects = step(state, ev.CancelRequested(1.0, 1.0))
    assert effects == (ev.AnswerCancel("a"),)
    state, _ = step(state, ev.JobPrepared("a"))
    assert state.job is not None
    assert state.job.state is JobState.CANCELLING
    state, _ = step(state, ended(outcome=ev.Outcome.STOPPED, size=6 * GIB, reason="kernel said"))
    assert state.job is not None
    assert (state.job.state, state.job.current_size) == (JobState.CANCELLED, 6 * GIB)
    assert state.job.reason == "cancelled on request", "the newest asker's words"


def test_a_stop_that_nobody_here_asked_for_is_a_failure() -> None:
    state, _ = play(
        State(), requested(4 * GIB), ev.JobPrepared("a"), ended(outcome=ev.Outcome.STOPPED, reason="killed")
    )
    assert state.job is not None
    assert (state.job.state, state.job.reason) == (JobState.FAILED, "killed")


# --- rule 5 and the rest: sleep, start ------------------------------------------------------------------------


def test_before_sleep_everything_is_durable() -> None:
    assert step(State(), ev.SuspendRequested(0.0)) == (State(), (ev.Save(), ev.Sync()))


def recovered(**known: object) -> ev.Recovered:
    """A start on an 8 GiB filesystem."""
    found = ev.Recovered(size=8 * GIB, device=8 * GIB, available=5 * GIB, balloon=0, at=100.0, wall=200.0)
    return replace(found, **known)  # type: ignore[arg-type]  # fields of Recovered, by name


def test_the_first_start_holds_nothing() -> None:
    state, effects = step(State(), recovered())
    assert effects == (ev.Save(),)
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
    assert kinds(effects) == [ev.RestoreDirtyLimits, ev.Save]
    assert step(state, ev.DirtyLimitsRestored())[0].dirty_found is None


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
    assert kinds(effects) == [ev.SetDirtyLimits, ev.Save]
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
        for guard in of(effects, ev.GuardMetadata):
            assert guard.spent == state.balloon.relief >= 0
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
