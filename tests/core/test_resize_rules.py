"""The storage core by replaying events: resize jobs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storaged.core import events as ev
from storaged.core.machine import next_wakeup, step
from storaged.core.model import Config, Level, Told
from storaged.core.resize import refusal
from storaged.core.state import State
from storaged.errors import Kind
from storaged.resize.job import JobState
from storaged.units import GIB, MAX_SIZE, MIB
from tests.core.events import FACTS, ended, kinds, of, play, reported, requested

CONFIG = Config()


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


def test_a_growth_is_judged_by_what_the_host_said_last() -> None:
    # Not by the level, which stays CRITICAL until a better one has lasted.
    state, _ = step(State(), reported(0, Told.CRITICAL))
    state, _ = step(state, reported(4096 * GIB, Told.NORMAL, at=1))
    assert state.pressure.level is Level.CRITICAL
    assert refusal(9 * GIB, FACTS, state) is None
    # A share of nothing on a disk that is well: a host adds what every guest leaves alone.
    state, _ = step(State(), reported(CONFIG.reserve, Told.NORMAL))
    assert refusal(9 * GIB, FACTS, state) is None
    for free, told in ((CONFIG.critical_enter - 1, Told.LOW), (4096 * GIB, Told.CRITICAL)):
        refused = refusal(9 * GIB, FACTS, step(State(), reported(free, told))[0])
        assert refused is not None
        assert "critically full" in refused.message


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
