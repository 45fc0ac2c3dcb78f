"""The storage core by replaying events: reports and the limit, levels and write-back limits, retries."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storaged.core import events as ev
from storaged.core.machine import next_wakeup, step
from storaged.core.model import Config, DirtyLimits, Level, Told
from storaged.core.pressure import Pressure
from storaged.core.state import Balloon, BalloonState, State
from storaged.units import GIB, MIB
from tests.core.events import FOUND, kinds, of, play, reported, wake

CONFIG = Config()


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
    assert effects == (ev.Sample(adjust=True),)
    assert next_wakeup(state) is None, "not before the answer"
    state, _ = step(state, ev.BalloonSampled(GIB - 100 * MIB, 100 * MIB, 3.0, tight=True))
    assert (state.balloon.relief, state.balloon.size) == (100 * MIB, GIB - 100 * MIB)
    assert next_wakeup(state) == 3.0 + CONFIG.guard_soon_s
    state, effects = step(state, ev.Tick(4.0, 0.0))
    assert effects == (ev.Sample(adjust=True),)
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
    state, _ = step(state, ev.BalloonSampled(GIB, 0, 2.0, tight, calm))
    assert next_wakeup(state) == 2.0 + after


def test_a_balloon_that_failed_is_guarded_too() -> None:
    state, _ = play(State(), reported(5 * GIB), ev.BalloonFailed(4 * GIB, GIB, "no room", 0.0))
    assert state.balloon.guard_at == CONFIG.guard_every_s


def test_with_a_limit_the_space_is_sampled_though_the_balloon_is_empty() -> None:
    # The filesystem may be grown, or the balloon deleted.
    state, _ = play(State(), reported(5 * GIB), ev.BalloonSettled(4 * GIB, 0, 0.0))
    assert next_wakeup(state) == CONFIG.guard_every_s
    state, _ = play(state, ev.ReleaseRequested(1.0), ev.BalloonSettled(None, 0, 1.0))
    assert next_wakeup(state) is None


def test_a_warning_is_noted_once() -> None:
    settled = ev.BalloonSettled(4 * GIB, GIB, 0.0, warning="a snapshot holds it")
    state, effects = play(State(), reported(5 * GIB), settled)
    assert ev.Note("a snapshot holds it", warning=True) in effects
    state, effects = play(state, ev.Tick(1.0, 0.0), ev.BalloonSampled(GIB, 0, 1.0, warning="a snapshot holds it"))
    assert not of(effects, ev.Note)
    state, effects = play(state, ev.BalloonSettled(4 * GIB, GIB, 2.0), replace(settled, at=3.0))
    assert of(effects, ev.Note), "it came up again"


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
    assert kinds(effects) == [ev.AnswerReport, ev.HoldAvailable, ev.RestoreDirtyLimits, ev.Save]
    assert effects[0] != ev.AnswerReport(), "a report that waits is not told that anything is held"
    assert effects[1] == ev.HoldAvailable(None)
    state, _ = step(state, ev.DirtyLimitsRestored())
    assert (state.balloon.limit, state.dirty_found, state.pressure, state.report) == (None, None, Pressure(), None)
