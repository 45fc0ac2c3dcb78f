"""A job's table: every active state can reach an end, every end is final, progress is honest."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.resize.job import TRANSITIONS, Job, JobState, Signal, ended, progressed, signalled
from storaged.units import GIB

ENDS = {JobState.DONE, JobState.FAILED, JobState.CANCELLED}
WORKING = (JobState.PREPARING, JobState.RUNNING, JobState.CANCELLING)
SHRINK = Job("a", 4 * GIB, 8 * GIB, 8 * GIB)


def test_the_table_names_every_state() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert {state for state in JobState if not state.active} == ENDS


@pytest.mark.parametrize("state", [state for state in JobState if state not in ENDS])
def test_every_active_state_reaches_every_kind_of_end(state: JobState) -> None:
    reached, todo = {state}, [state]
    while todo:
        new = set(TRANSITIONS[todo.pop()].values()) - reached
        reached |= new
        todo.extend(new)
    assert reached >= ENDS


@pytest.mark.parametrize("state", sorted(ENDS, key=str))
@pytest.mark.parametrize("signal", Signal)
def test_an_end_is_final(state: JobState, signal: Signal) -> None:
    job = Job("a", GIB, 2 * GIB, GIB, state=state)
    assert signalled(job, signal) == job


def test_every_state_can_be_reached() -> None:
    reached = {JobState.REQUESTED} | {after for row in TRANSITIONS.values() for after in row.values()}
    assert reached == set(JobState)


@pytest.mark.parametrize("state", WORKING)
@pytest.mark.parametrize("signal", [Signal.SUCCEEDED, Signal.FAILED, Signal.STOPPED])
def test_the_runners_last_word_ends_the_job(state: JobState, signal: Signal) -> None:
    assert not signalled(Job("a", GIB, 2 * GIB, 2 * GIB, state=state), signal).active


def test_a_cancel_that_comes_too_late_does_not_undo_success() -> None:
    job = Job("a", GIB, 2 * GIB, GIB, state=JobState.CANCELLING, reason="cancelled on request")
    last = ended(job, Signal.SUCCEEDED, current_size=GIB, reason="", now=5.0)
    assert (last.state, last.reason, last.progress, last.ended) == (JobState.DONE, "", 1.0, 5.0)


def test_what_there_is_to_say_of_a_success_is_said() -> None:
    job = Job("a", GIB, 2 * GIB, GIB, state=JobState.RUNNING)
    last = ended(job, Signal.SUCCEEDED, current_size=GIB, reason="healing it failed: no", now=5.0)
    assert (last.state, last.reason) == (JobState.DONE, "healing it failed: no")


def test_done_echoes_the_size_that_was_asked_for() -> None:
    job = Job("a", GIB + 7, 2 * GIB, 2 * GIB, state=JobState.RUNNING)
    assert ended(job, Signal.SUCCEEDED, current_size=GIB, reason="", now=1).current_size == GIB + 7
    assert ended(job, Signal.FAILED, current_size=GIB, reason="no", now=1).current_size == GIB


@given(
    news=st.lists(
        st.tuples(st.integers(0, 8 * GIB), st.integers(0, 8 * GIB), st.integers(0, 8 * GIB), st.floats(0, 100)),
        max_size=20,
    )
)
def test_progress_never_goes_back_and_never_says_done(news: list[tuple[int, int, int, float]]) -> None:
    job, now = SHRINK, 0.0
    for current, moved, to_move, passed in news:
        now += passed
        after = progressed(job, current_size=current, moved=moved, to_move=to_move, now=now)
        assert job.progress <= after.progress < 1
        assert job.moved <= after.moved <= after.to_move
        assert after.eta is None or after.eta >= 0
        assert after.state is job.state
        job = after


def test_the_time_left_follows_the_mean_rate() -> None:
    job = progressed(replace(SHRINK, began=100.0), current_size=8 * GIB, moved=GIB, to_move=4 * GIB, now=110)
    assert job.rate == GIB / 10
    assert job.eta == 30
    assert job.progress == 0.25


def test_without_bytes_to_move_the_size_tells() -> None:
    job = progressed(SHRINK, current_size=6 * GIB, moved=0, to_move=0, now=10)
    assert (job.progress, job.rate, job.eta) == (0.5, None, None)
