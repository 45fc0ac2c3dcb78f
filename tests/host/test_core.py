"""The parts of the sharing core, each by itself: division, leases, levels, and what a step says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.host import events as ev
from storaged.host import leases, levels
from storaged.host.demand import divide, smoothed, water_fill
from storaged.host.leases import Answer
from storaged.host.levels import Level, Pressure
from storaged.host.model import Guest, Presence, books, established
from storaged.host.settings import Sharing
from storaged.host.shares import next_wakeup, step
from storaged.units import GIB, MIB, format_size
from tests.host.told import Told

SETTINGS = Sharing()
parts = st.lists(st.tuples(st.integers(0, 100 * GIB), st.sampled_from([0.5, 1.0, 2.0, 9.0])), min_size=1, max_size=8)


@given(parts, st.integers(0, 200 * GIB))
def test_water_filling_is_max_min_fair(asked: list[tuple[int, float]], room: int) -> None:
    wants, weights = [want for want, _ in asked], [weight for _, weight in asked]
    given_ = water_fill(wants, weights, room)
    assert all(0 <= gets <= want for gets, want in zip(given_, wants, strict=True))
    assert sum(given_) <= room
    assert sum(given_) >= min(room, sum(wants)) - len(wants)
    level = max(gets / weight for gets, weight in zip(given_, weights, strict=True))
    for gets, want, weight in zip(given_, wants, weights, strict=True):
        # Whoever gets less than it wants has as much per weight as anybody.
        assert gets == want or gets / weight >= level - 2 / weight - 1


@given(st.integers(0, 500 * GIB), st.lists(st.floats(0, 500 * MIB), min_size=1, max_size=8))
def test_a_division_never_gives_more_than_there_is(room: int, rates: list[float]) -> None:
    guests = [Guest(str(index), 999 * GIB, 0, 0.0, rate=rate) for index, rate in enumerate(rates)]
    division = divide(guests, room, 0.0, SETTINGS)
    assert 0 <= sum(division.targets) <= room * (1 - SETTINGS.kept_share)


def test_who_writes_gets_more_when_it_is_tight() -> None:
    guests = [Guest("busy", 999 * GIB, 0, 0.0, rate=200.0 * MIB), Guest("idle", 999 * GIB, 0, 0.0)]
    busy, idle = divide(guests, 4 * GIB, 0.0, SETTINGS).targets
    assert busy > 2 * idle > 0


def test_a_rate_rises_fast_and_falls_slowly() -> None:
    up = smoothed(0.0, 300 * MIB, 3.0, SETTINGS)
    assert 60 * MIB < up < 65 * MIB
    down = smoothed(100.0 * MIB, 0, 3.0, SETTINGS)
    assert 90 * MIB < down < 95 * MIB
    assert smoothed(5.0, -GIB, 1.0, SETTINGS) < 5.0


def test_until_it_is_acknowledged_a_smaller_grant_counts_on_top() -> None:
    lease = leases.sent(leases.kept(0, 10 * GIB), 0, 1, 2 * GIB, 0.0)
    assert lease.ceiling == 12 * GIB  # ten spent first, then two more
    acked = leases.acked(lease, 1, Answer(2 * GIB), 1.0)
    assert leases.seen(acked, 0, 0.5).ceiling == 12 * GIB, "an older look settles nothing"
    assert leases.seen(acked, 3 * GIB, 1.1).ceiling == 5 * GIB


def test_a_call_that_may_have_arrived_stays_counted() -> None:
    lease = leases.sent(leases.kept(0, GIB), 0, 1, 5 * GIB, 0.0)
    assert leases.failed(lease, 1, certain=False).ceiling == 6 * GIB
    assert leases.failed(lease, 1, certain=True).ceiling == GIB


def test_a_word_makes_careful_and_never_careless() -> None:
    lease = leases.sent(leases.kept(0, 4 * GIB), 0, 1, 2 * GIB, 0.0)
    assert leases.seen(leases.acked(lease, 1, Answer(0), 1.0), 0, 1.0).ceiling == 2 * GIB
    assert leases.seen(leases.acked(lease, 1, Answer(3 * GIB), 1.0), 0, 1.0).ceiling == 3 * GIB


def test_a_guest_that_discarded_under_a_smaller_grant_is_likely_to_have_less() -> None:
    lease = leases.sent(leases.kept(8 * GIB, GIB), 8 * GIB, 1, MIB, 0.0)
    seen = leases.seen(leases.acked(lease, 1, Answer(MIB), 1.0), GIB, 1.0)
    guest = Guest("a", 100 * GIB, GIB, 1.0, presence=Presence.UP, lease=seen)
    assert guest.left == 7 * GIB + MIB
    assert guest.likely == MIB


@pytest.mark.parametrize(
    ("level", "free", "after"),
    [
        (Level.NORMAL, 5 * GIB, Level.NORMAL),
        (Level.NORMAL, 3 * GIB, Level.NORMAL),
        (Level.NORMAL, 2 * GIB, Level.LOW),
        (Level.NORMAL, GIB, Level.CRITICAL),
        (Level.LOW, 3 * GIB, Level.LOW),
        (Level.CRITICAL, 3 * GIB // 2, Level.CRITICAL),
    ],
)
def test_levels_at_once(level: Level, free: int, after: Level) -> None:
    assert levels.sampled(Pressure(level), free, 0.0, SETTINGS).level is after


def test_a_better_level_must_last() -> None:
    pressure = levels.sampled(Pressure(Level.CRITICAL), 5 * GIB, 0.0, SETTINGS)
    assert pressure.level is Level.CRITICAL
    pressure = levels.sampled(pressure, 3 * GIB, 5.0, SETTINGS)
    assert levels.sampled(pressure, 9 * GIB, 9.9, SETTINGS).level is Level.CRITICAL
    assert levels.sampled(pressure, 9 * GIB, 10.0, SETTINGS).level is Level.LOW, "the worst seen while it waited"
    assert levels.sampled(pressure, GIB, 9.0, SETTINGS).pending is None


def test_looks_come_faster_as_free_runs_out() -> None:
    far, near = levels.interval(100 * GIB, 1.0 * GIB, SETTINGS), levels.interval(8 * GIB, 1.0 * GIB, SETTINGS)
    assert SETTINGS.poll_most_s == far > near > SETTINGS.poll_least_s
    assert levels.interval(MIB, 1.0 * GIB, SETTINGS) == SETTINGS.poll_least_s
    assert math.isclose(near, 8 / SETTINGS.looks)


def test_all_are_bound_at_the_first_look() -> None:
    told = Told("a", "b")
    assert set(told.sent) == {"a", "b"}
    assert sum(grant.size for grant in told.sent.values()) <= 39 * GIB
    told.answer(*told.sent.values())
    told.look(40 * GIB)
    assert established(told.state)


def test_growth_waits_until_a_shrink_is_acknowledged() -> None:
    told = Told("a", "b", free=6 * GIB)
    for _ in range(3):
        told.answer(*told.sent.values())
        told.look(6 * GIB)
    before = {name: guest.left for name, guest in told.state.guests.items()}
    assert min(before.values()) > GIB
    slack = books(told.state).slack
    told.step(ev.RoomAsked("a", 4 * GIB, told.now))
    assert told.sent["b"].size < before["b"]
    assert "a" not in told.sent or told.sent["a"].size <= slack, "paid from what nobody was promised"
    assert books(told.state).slack >= 0
    told.answer(*told.sent.values())
    assert told.look(6 * GIB)["a"].size > before["a"]


@given(st.lists(st.sampled_from("abcd"), max_size=6), st.booleans())
def test_answers_taken_together_are_answers_taken_one_by_one(answering: list[str], hung: bool) -> None:
    told = Told(*"abcd")
    sent = told.sent
    if hung:
        told.step(ev.GrantFailed("a", sent["a"].seq, "late", told.now))
    before = told.state
    acks = tuple(
        ev.GrantAcked(name, sent[name].seq + (place == 3), Answer(sent[name].size), told.now + place / 8)
        for place, name in enumerate(answering)
    )  # the fourth is of no grant that is under way
    together, _ = step(before, ev.GrantsAcked(acks))
    for ack in acks:
        told.step(ack)
    assert together == told.state
    assert {name for name, guest in together.guests.items() if guest.presence is Presence.UP} == {
        ack.guest for ack in acks if ack.seq == sent[ack.guest].seq
    } - ({"a"} if hung else set())


@pytest.mark.parametrize("missing", [5, 17, 40])
def test_a_promise_that_is_broken_by_a_little_is_mended_too(missing: int) -> None:
    told = Told("a", "b", free=GIB + 100 * MIB)
    for _ in range(4):
        told.answer(*told.sent.values())
        told.look(GIB + 100 * MIB)
    promised = books(told.state).promised
    assert promised < 128 * MIB, "nobody holds as much as the band is wide"
    free = told.state.pool.reserve + promised - missing * MIB
    for _ in range(4):  # an eighth of what is left is kept, so it takes no more than a few
        told.answer(*told.sent.values())
        told.look(max(free, told.state.pool.reserve))
    assert established(told.state)


def test_one_that_hangs_keeps_its_grant_and_is_tried_again() -> None:
    told = Told("a", "b")
    told.answer(told.sent["a"])
    wakes = next_wakeup(told.state)
    assert wakes == told.now + SETTINGS.answer_s
    told.step(ev.GrantFailed("b", told.state.guests["b"].lease.flight.seq, "late", told.now))  # type: ignore[union-attr]
    assert told.state.guests["b"].failures == 1
    assert next_wakeup(told.state) == told.now + SETTINGS.retry_first_s
    told.now += SETTINGS.retry_first_s
    assert "b" in told.step(ev.Tick(told.now))


def test_one_that_writes_more_than_it_may_is_found_out() -> None:
    told = Told("a")
    told.answer(*told.sent.values())
    told.look(40 * GIB)
    over = told.state.guests["a"].lease.ceiling + GIB
    told.images["a"] = over
    told.look(40 * GIB - over)
    assert [note.topic for note in told.notes if note.guest == "a"] == [ev.Topic.OVERRUN]
    assert told.state.guests["a"].overran == GIB


def test_an_image_that_cannot_be_read_stops_all_growth() -> None:
    told = Told("a", "b")
    told.answer(*told.sent.values())
    del told.images["b"]
    told.step(ev.RoomAsked("a", 9 * GIB, told.now))
    assert told.look(400 * GIB) == {}


def test_saying_that_one_is_new_makes_no_debt_forgotten() -> None:
    told = Told("a", "b")
    told.answer(*told.sent.values())
    told.look(40 * GIB)
    before = books(told.state)
    ceiling = told.state.guests["a"].lease.ceiling
    assert ceiling > 4 * GIB
    told.step(ev.GuestRestarted("a", told.now))
    account = books(told.state)
    assert account.promised + account.unbound >= before.promised
    assert "a" in told.sent, "it is told anew at once"
    told.answer(told.sent["a"])
    told.look(40 * GIB)
    assert established(told.state)


def test_a_guest_that_says_it_can_write_all_is_named_when_the_promise_breaks() -> None:
    told = Told("a", "b", free=40 * GIB)
    for sequence in range(1, 5):
        for grant in told.open.values():
            told.says(grant, Answer(grant.size, grant.size, sequence))
        told.open = {}
        told.look(40 * GIB)
    assert told.state.holds
    told.step(ev.PotentialReported("b", 400 * GIB, 9, told.now))
    (note,) = (note.text for note in told.notes if note.topic is ev.Topic.BROKEN)
    assert note.startswith("guests may write more than there is: promised ")
    beyond = 400 * GIB - told.state.guests["b"].lease.granted
    assert f"; most beyond its grant: b, {format_size(beyond)} (room for metadata" in note
