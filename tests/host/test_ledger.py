"""What the ledger counts against a guest beyond its grant, and what it must never take from others."""

from __future__ import annotations

import pytest

from storaged.host import events as ev
from storaged.host import leases
from storaged.host.demand import divide
from storaged.host.leases import Answer
from storaged.host.model import Guest, Presence, books, established
from storaged.host.settings import Sharing
from storaged.units import GIB, MIB
from tests.host.told import Told

SETTINGS = Sharing()


def guest(told: Told, name: str) -> Guest:
    return told.state.guests[name]


# --- a guest's word ---------------------------------------------------------------------------------------------


def test_what_is_preallocated_in_a_guest_is_counted_as_what_it_may_write() -> None:
    told = Told("a", "b", free=10 * GIB)
    unwritten = 1200 * MIB
    for grant in tuple(told.sent.values()):
        beyond = unwritten if grant.guest == "a" else 0
        told.says(grant, Answer(grant.size + beyond, grant.size + beyond, 1))
    told.look(10 * GIB)
    assert guest(told, "a").left >= unwritten + guest(told, "a").lease.granted
    account = books(told.state)
    assert account.slack >= 0
    told.settle(10 * GIB)
    told.images["a"] += unwritten  # written without taking anything of the grant
    told.look(10 * GIB - unwritten)
    assert not [note for note in told.notes if note.topic is ev.Topic.OVERRUN]
    assert established(told.state)


def test_an_image_made_sparse_again_may_grow_back() -> None:
    """The guest counts 3 GiB as used; the host took them back (fallocate --dig-holes, a copy with holes)."""
    lease = leases.sent(leases.kept(0, GIB), 0, 1, GIB, 0.0)
    answer = Answer(GIB, 4 * GIB, 1)
    assert leases.seen(leases.acked(lease, 1, answer, 1.0), 0, 1.0).ceiling == 4 * GIB


def test_a_report_raises_what_it_may_write_and_only_the_newest_counts() -> None:
    answered = leases.acked(leases.sent(leases.kept(0, GIB), 0, 1, GIB, 0.0), 1, Answer(GIB, GIB, 5), 1.0)
    lease = leases.seen(answered, 0, 1.0)
    more = GIB + 300 * MIB
    assert leases.reported(lease, more, 4) is lease, "an older report"
    raised = leases.reported(lease, more, 6)
    assert leases.outstanding(raised, 0, 9 * GIB) == more
    assert leases.reported(raised, GIB, 7).raised == 0
    flying = leases.sent(raised, 0, 2, GIB, 2.0)
    assert leases.reported(flying, 2 * GIB, 8) is flying, "it may be from before or after that was applied"


def test_what_a_report_explains_is_no_overrun() -> None:
    told = Told("a", free=10 * GIB)
    told.says(told.sent["a"], Answer(told.sent["a"].size, told.sent["a"].size, 1))
    told.look(10 * GIB)
    lease = guest(told, "a").lease
    told.images["a"] = lease.ceiling + 290 * MIB
    told.look(10 * GIB - told.images["a"])
    assert not guest(told, "a").overruns, "a report may be under way"
    told.step(ev.PotentialReported("a", (lease.potential or 0) + 300 * MIB, 2, told.now))
    told.look(10 * GIB - told.images["a"], after_s=10)
    assert not guest(told, "a").overruns


def test_a_report_never_lowers_what_was_promised() -> None:
    told = Told("a", free=10 * GIB)
    (grant,) = told.sent.values()
    told.says(grant, Answer(grant.size, grant.size, 1))
    told.look(10 * GIB)
    left = guest(told, "a").left
    told.step(ev.PotentialReported("a", 0, 2, told.now))
    assert guest(told, "a").left == left


def test_a_guest_that_cannot_get_there_is_counted_with_what_it_says_and_asked_again() -> None:
    told = Told("a", "b", free=6 * GIB)
    told.settle(6 * GIB)
    told.step(ev.RoomAsked("b", 4 * GIB, told.now))
    grant = told.sent["a"]
    told.says(grant, Answer(3 * GIB, 3 * GIB, 9), "more is preallocated than that")
    assert [note.text for note in told.notes] == ["a cannot keep to its grant: more is preallocated than that"]
    told.look(6 * GIB, after_s=0.5)
    assert guest(told, "a").left >= 3 * GIB
    assert guest(told, "a").presence is Presence.UP
    assert "a" not in told.sent
    told.look(6 * GIB, after_s=SETTINGS.retry_first_s)
    assert "a" in told.sent
    told.says(told.sent["a"], Answer(3 * GIB, 3 * GIB, 10), "more is preallocated than that")
    assert not told.notes, "said once"


def test_an_agent_that_tells_nothing_of_preallocated_files_proves_nothing() -> None:
    told = Told("a")
    (grant,) = told.sent.values()
    told.says(grant, Answer(grant.size, proven=False))
    assert "does not tell what is preallocated" in told.notes[0].text
    told.look(40 * GIB)
    assert not established(told.state)
    told.settle(40 * GIB)
    assert not [note for note in told.notes if "preallocated" in note.text], "said once"


# --- overruns and fences ----------------------------------------------------------------------------------------


def overrun(told: Told, by: int = GIB) -> None:
    told.images["a"] = guest(told, "a").lease.ceiling + by
    told.look(30 * GIB)
    told.look(30 * GIB, after_s=SETTINGS.overrun_s + 0.1)  # no report explained it
    assert guest(told, "a").overruns


def test_one_that_exceeds_its_grant_is_fenced_counted_and_logged_once() -> None:
    told = Told("a", "b")
    told.settle(40 * GIB)
    overrun(told)
    assert guest(told, "a").overruns == 1
    said = 0
    for _ in range(5):
        told.settle(30 * GIB, 1)
        said += sum(note.topic is ev.Topic.OVERRUN for note in told.notes)
    assert not said
    assert guest(told, "a").lease.granted == 0
    assert guest(told, "b").lease.granted > GIB
    told.step(ev.RoomAsked("a", GIB, told.now))
    assert "a" not in told.sent, "nor for a plea"


def test_one_that_behaves_for_a_time_gets_a_share_again() -> None:
    told = Told("a", "b")
    told.settle(40 * GIB)
    overrun(told)
    told.settle(30 * GIB)
    told.look(30 * GIB, after_s=SETTINGS.fence_s)
    assert [note.topic for note in told.notes if note.guest == "a"] == [ev.Topic.FENCE]
    told.settle(30 * GIB)
    assert guest(told, "a").lease.granted > GIB
    assert guest(told, "a").overruns == 1


def test_one_that_goes_on_stays_fenced_and_counts_again() -> None:
    told = Told("a", "b")
    told.settle(40 * GIB)
    overrun(told)
    told.settle(30 * GIB)
    until = guest(told, "a").fenced_until
    overrun(told)
    assert guest(told, "a").overruns == 2
    assert guest(told, "a").fenced_until > until


def test_an_operator_lifts_a_fence() -> None:
    told = Told("a", "b")
    told.settle(40 * GIB)
    overrun(told)
    told.settle(30 * GIB)
    told.step(ev.FenceLifted("a", told.now))
    assert not guest(told, "a").fenced_until
    told.settle(30 * GIB)
    assert guest(told, "a").lease.granted > GIB


# --- what a resize moves ----------------------------------------------------------------------------------------


def test_what_a_shrink_moves_is_neither_the_guests_writing_nor_anybodys_room() -> None:
    told = Told("a", "b", free=6 * GIB)
    told.settle(6 * GIB)
    had = guest(told, "b").lease.granted
    assert had > GIB
    told.step(ev.ClaimSet("a", GIB, told.now))
    told.settle(6 * GIB)
    assert established(told.state), "set aside before it begins"
    free = 6 * GIB
    for _ in range(8):  # 1 GiB is moved
        told.images["a"] += 128 * MIB
        free -= 128 * MIB
        told.settle(free, 1)
        assert guest(told, "b").lease.granted > had / 3
    assert not guest(told, "a").overruns
    assert guest(told, "a").rate < MIB
    told.step(ev.ClaimSet("a", 0, told.now))
    told.look(free, after_s=10)
    assert not guest(told, "a").overruns, "what is not discarded yet was not written by it either"


# --- the reserve ------------------------------------------------------------------------------------------------


def test_the_reserve_never_adapts_beyond_its_share_of_the_pool() -> None:
    told = Told("a", free=6 * GIB, total=8 * GIB)
    told.settle(6 * GIB)
    told.look(4 * GIB + 300 * MIB)  # one copy of 1.7 GiB by the host
    assert told.state.pool.reserve <= 2 * GIB
    told.settle(4 * GIB + 300 * MIB)
    assert guest(told, "a").lease.granted > GIB


def test_a_burst_is_forgotten_in_minutes() -> None:
    told = Told("a", free=60 * GIB, total=100 * GIB)
    told.settle(60 * GIB)
    told.look(50 * GIB)
    assert told.state.pool.reserve > 4 * GIB
    for _ in range(300):
        told.look(50 * GIB)
    assert told.state.pool.reserve == SETTINGS.reserve_least


# --- wants ------------------------------------------------------------------------------------------------------


def test_a_want_ends_at_what_a_guest_can_use() -> None:
    small = Guest("small", 2 * GIB, 2 * GIB - 100 * MIB, 0.0, rate=900.0 * MIB)
    large = Guest("large", 999 * GIB, 0, 0.0)
    tight, roomy = (divide([small, large], room, 0.0, SETTINGS) for room in (4 * GIB, 400 * GIB))
    for division in (tight, roomy):
        assert division.wants[0] <= 100 * MIB
        assert division.targets[0] <= 100 * MIB
    assert tight.targets[1] > 3 * GIB // 2
    assert roomy.targets[1] > 80 * GIB


@pytest.mark.parametrize("failing", ["never", "certain"])
def test_guests_that_never_answer_do_not_starve_the_others(failing: str) -> None:
    good = [f"good{index}" for index in range(20)]
    told = Told(*good, *(f"mute{index}" for index in range(200)), free=7 * GIB, size=100 * GIB)
    for _ in range(40):
        for grant in tuple(told.sent.values()):
            if grant.guest.startswith("good"):
                told.answer(grant)
            else:
                told.step(ev.GrantFailed(grant.guest, grant.seq, "late", told.now, certain=failing == "certain"))
        told.look(7 * GIB)
    shared = sum(guest(told, name).lease.granted for name in good)
    assert shared > 0.6 * (7 * GIB - told.state.pool.reserve)
    assert min(guest(told, name).lease.granted for name in good) > 0.8 * shared / 20


@pytest.mark.parametrize("answered", [True, False])
def test_a_guest_that_hangs_for_hours_takes_no_more_than_it_had(answered: bool) -> None:
    told = Told("a", "b", free=20 * GIB)
    if not answered:  # its machine was started with a balloon of known size
        told.step(ev.GuestLeft("a", told.now, forget=True))
        told.step(ev.GuestJoined("a", 500 * GIB, 0, told.now, keeps=4 * GIB))
        told.look(20 * GIB)
        told.open.pop("a", None)
    else:
        told.settle(20 * GIB)
    had = guest(told, "a").left
    for _ in range(300):
        for grant in tuple(told.open.values()):
            if grant.guest == "a":
                told.step(ev.GrantFailed("a", grant.seq, "late", told.now))
            else:
                told.answer(grant)
        told.open = {}
        told.look(20 * GIB, after_s=40)
    assert guest(told, "a").left <= 2 * had, "the first call after it may have arrived"
    assert guest(told, "b").lease.granted > 0.3 * guest(told, "a").left
    told.settle(20 * GIB)
    assert guest(told, "a").lease.granted > 0.5 * had, "it has its share again when it answers"


# --- starts, lost answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every_s", "writes"), [(0.5, 200 * MIB), (1.5, 30 * MIB), (20.0, 200 * MIB), (61.0, 200 * MIB)]
)
def test_a_guest_that_says_all_the_time_that_it_is_new_is_fenced_all_the_same(every_s: float, writes: int) -> None:
    told = Told("a", "b", free=6 * GIB)
    told.settle(6 * GIB)
    free, said_at = 6 * GIB, told.now
    for _ in range(400):  # it writes on when nothing is granted any more
        told.images["a"] += writes
        free = max(free - writes, GIB)
        told.settle(free, 1)
        if told.now - said_at >= every_s:
            said_at = told.now
            told.step(ev.GuestRestarted("a", told.now))
    assert guest(told, "a").overruns
    assert guest(told, "a").fenced_until > told.now


def test_one_honest_start_is_no_overrun() -> None:
    told = Told("a", "b", free=40 * GIB)
    told.settle(40 * GIB)
    told.step(ev.GuestRestarted("a", told.now))
    told.images["a"] += 300 * MIB
    told.settle(40 * GIB)
    assert not guest(told, "a").overruns
    assert guest(told, "a").lease.granted > GIB


def test_what_a_report_explains_after_a_lost_answer_is_no_overrun() -> None:
    answered = leases.acked(leases.sent(leases.kept(0, GIB), 0, 1, GIB, 0.0), 1, Answer(GIB, GIB, 5), 1.0)
    lease = leases.failed(leases.sent(leases.seen(answered, 0, 1.0), 0, 2, GIB, 2.0), 2, certain=False)
    assert lease.ceiling == 2 * GIB
    assert leases.reported(lease, 2 * GIB + 100 * MIB, 6).raised == 100 * MIB
    assert leases.reported(lease, GIB, 6) is lease


def test_a_storaged_whose_answer_was_lost_has_time_to_explain() -> None:
    told = Told("a", free=40 * GIB)
    for _ in range(4):
        for grant in tuple(told.open.values()):
            told.says(grant, Answer(grant.size, guest(told, "a").image + grant.size, told.state.seq))
        told.open = {}
        told.look(40 * GIB)
    told.step(ev.RoomAsked("a", 30 * GIB, told.now))
    (grant,) = told.open.values()
    told.step(ev.GrantFailed("a", grant.seq, "late", told.now))
    told.images["a"] = guest(told, "a").lease.ceiling + 80 * MIB
    told.look(30 * GIB, after_s=0.2)
    assert not guest(told, "a").overruns


def test_a_fence_and_a_claim_outlive_the_machine() -> None:
    told = Told("a", "b")
    told.settle(40 * GIB)
    overrun(told)
    told.step(ev.ClaimSet("b", 3 * GIB, told.now))
    told.settle(30 * GIB)
    until = guest(told, "a").fenced_until
    for name in "ab":
        told.step(ev.GuestLeft(name, told.now))
        told.step(ev.GuestJoined(name, 500 * GIB, told.images[name], told.now))
    assert guest(told, "a").fenced_until == until
    assert guest(told, "b").claim == 3 * GIB
    told.settle(30 * GIB)
    told.images["b"] += GIB
    told.settle(29 * GIB)
    assert not guest(told, "b").overruns


def test_a_claim_of_a_machine_that_does_not_run_counts_when_it_does() -> None:
    told = Told("a", "b", free=10 * GIB)
    told.step(ev.GuestLeft("a", told.now))
    told.step(ev.ClaimSet("a", GIB, told.now))
    assert guest(told, "a").claim + guest(told, "a").claim_asked == GIB
    told.step(ev.ClaimSet("a", 0, told.now))
    assert guest(told, "a").claim + guest(told, "a").claim_asked == 0
