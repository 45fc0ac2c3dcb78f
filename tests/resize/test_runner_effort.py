"""The runner with a best effort: further than was promised, never less far, and back from wherever it went."""

from __future__ import annotations

import errno
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.core import events as ev
from storaged.errors import FilesystemError
from storaged.resize.layout import KERNEL_MINIMUM, Layout
from storaged.units import GIB, MIB
from tests.resize.guest import TURNS, Guest, Turns, aged


@given(
    size=st.integers(512, 16 * 1024).map(lambda n: n * MIB),
    target=st.integers(0, 8 * 1024).map(lambda n: n * MIB),
    turns=TURNS,
)
def test_with_best_effort_it_goes_at_least_as_far_as_was_promised(size: int, target: int, turns: Turns) -> None:
    guest = aged(size, turns)
    used = sum(chunk.used for chunk in guest.disk.chunks)
    minimum = guest.minimum()
    if target >= size:
        return
    ended = guest.run(target, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert max(target, KERNEL_MINIMUM) <= guest.disk.size <= max(minimum, target, KERNEL_MINIMUM)
    assert bool(ended.reason) == (guest.disk.size > max(target, KERNEL_MINIMUM)), "why it is no smaller"
    assert sum(chunk.used for chunk in guest.disk.chunks) == used, "nobody's data is lost"
    assert not guest.disk.read_only, "metadata went nowhere without a hole for it"


@settings(max_examples=40)
@given(turns=TURNS, dice=st.randoms(use_true_random=False))
def test_a_best_effort_ends_however_the_guest_writes_on(turns: Turns, dice: random.Random) -> None:
    guest = aged(2 * GIB, turns)
    looks = 0
    look = guest.world.filesystem.layout

    def layout() -> Layout:
        nonlocal looks
        looks += 1
        assert looks < 1000
        (guest.disk.write if dice.random() < 0.5 else guest.disk.delete)(dice.randrange(1, 64) * MIB)
        return look()

    guest.world.filesystem.layout = layout  # type: ignore[method-assign]
    ended = guest.run(0, best_effort=True)
    assert ended.current_size <= 2 * GIB
    assert not guest.disk.read_only


def test_a_best_effort_that_gains_nothing_says_why_and_changes_nothing(guest: Guest) -> None:
    guest.disk.write(8 * GIB)
    ended = guest.run(GIB, best_effort=True)
    assert (ended.outcome, guest.disk.size) == (ev.Outcome.SUCCEEDED, 8 * GIB)
    assert "cannot move" in ended.reason or "unallocated" in ended.reason


@pytest.fixture
def scattered(guest: Guest) -> Guest:
    """Metadata at the top, no hole below it, and data that would fit into half of its chunks."""
    metadata = guest.disk.of("metadata")[0]
    guest.disk.write(4 * guest.disk.data_chunk)
    for chunk in guest.disk.of("data"):
        chunk.used = 300 * MIB
    metadata.start = max(chunk.start + chunk.length for chunk in guest.disk.chunks)
    guest.disk.of("data")[0].start -= metadata.length
    guest.disk.of("data")[0].length += metadata.length
    return guest


def test_what_is_rewritten_lets_a_shrink_go_further_than_was_promised(scattered: Guest) -> None:
    minimum = scattered.minimum()
    ended = scattered.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert scattered.disk.faults.calls["move_out"]
    assert scattered.disk.size < minimum - 200 * MIB
    assert sum(chunk.used for chunk in scattered.disk.of("data")) == 1200 * MIB


def test_a_chunk_that_is_too_long_goes_up_and_comes_back_shorter(topped: Guest) -> None:
    minimum = topped.minimum()
    sizes: list[int] = []
    resize = topped.world.resizer.resize

    def watched(size: int) -> None:
        resize(size)
        sizes.append(size)

    topped.world.resizer.resize = watched  # type: ignore[method-assign]
    ended = topped.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert topped.disk.size < minimum - 16 * MIB
    assert any(after > before for before, after in itertools.pairwise(sizes)), "room was taken back for a moment"
    assert not topped.disk.read_only


def test_metadata_whose_hole_somebody_took_stays(topped: Guest) -> None:
    minimum = topped.minimum()
    resize = topped.world.resizer.resize

    def watched(size: int) -> None:
        grows = topped.disk.size < size
        resize(size)
        if grows:
            topped.disk.write(topped.disk.unallocated())

    topped.world.resizer.resize = watched  # type: ignore[method-assign]
    ended = topped.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert topped.disk.size >= minimum
    assert not topped.disk.read_only
    assert not topped.disk.faults.calls["move_out"]


def test_under_a_balloon_applications_get_no_more_than_a_chunk_for_it(topped: Guest) -> None:
    topped.engine.hold(64 * MIB)
    space = topped.world.filesystem.space
    before, chunk = space().available, topped.disk.data_chunk
    seen: list[int] = []
    grown: list[int] = []
    resize = topped.world.resizer.resize

    def watched(size: int) -> None:
        seen.append(space().available)
        grown.append(size - topped.disk.size)
        resize(size)
        seen.append(space().available)

    topped.world.resizer.resize = watched  # type: ignore[method-assign]
    assert topped.run(0, best_effort=True).outcome is ev.Outcome.SUCCEEDED
    assert max(grown) > 0, "it was taken back"
    assert max(seen) <= before + chunk


def test_room_is_taken_back_only_where_the_device_has_it(topped: Guest) -> None:
    minimum = topped.minimum()
    topped.world.resizer.resize(minimum)
    topped.disk.set_device(minimum)
    topped.run(0, best_effort=True)
    assert topped.disk.size == minimum


@pytest.mark.parametrize("number", [errno.ECANCELED, errno.EIO, errno.ENOSPC])
def test_what_ends_while_room_is_taken_back_gives_it_up_again(topped: Guest, number: int) -> None:
    minimum = topped.minimum()
    topped.disk.faults.fail("move_out", FilesystemError("no", number), times=9)
    ended = topped.run(0, best_effort=True)
    outcomes = {errno.ECANCELED: ev.Outcome.STOPPED, errno.EIO: ev.Outcome.FAILED, errno.ENOSPC: ev.Outcome.SUCCEEDED}
    assert ended.outcome is outcomes[number]
    assert topped.disk.faults.calls["move_out"]
    assert topped.disk.size == minimum


def test_what_was_promised_is_taken_before_anything_else_is_tried(guest: Guest) -> None:
    guest.disk.write(4 * GIB)
    for chunk in guest.disk.of("data")[:2]:
        chunk.used = 0
    minimum = guest.minimum()
    order: list[str] = []
    guest.world.filesystem.reclaim_empty_chunks = lambda: order.append(f"reclaim at {guest.disk.size}")  # type: ignore[method-assign]
    guest.run(0, best_effort=True)
    assert order == [f"reclaim at {minimum}"] or not order
    assert guest.disk.size <= minimum


def test_a_best_effort_is_cancelled_while_it_rewrites(scattered: Guest) -> None:
    minimum = scattered.minimum()
    scattered.disk.faults.fail("move_out", FilesystemError("cancelled", errno.ECANCELED), times=2)
    ended = scattered.run(0, best_effort=True)
    assert (ended.outcome, scattered.disk.size) == (ev.Outcome.STOPPED, minimum)


def test_a_cancel_before_a_balance_has_begun_is_a_cancel(scattered: Guest) -> None:
    minimum = scattered.minimum()

    def move_out(logical: int, *, metadata: bool = False) -> None:
        scattered.runner._stops["a"].set()  # as `cancel` does, without waiting
        raise FilesystemError("Invalid argument", errno.EINVAL)

    scattered.world.resizer.move_out = move_out  # type: ignore[method-assign]
    ended = scattered.run(0, best_effort=True)
    assert (ended.outcome, scattered.disk.size) == (ev.Outcome.STOPPED, minimum)


def test_what_finds_no_room_to_be_rewritten_ends_nothing(scattered: Guest) -> None:
    minimum = scattered.minimum()
    scattered.disk.faults.fail("move_out", FilesystemError("no room", errno.ENOSPC), times=99)
    ended = scattered.run(0, best_effort=True)
    assert (ended.outcome, scattered.disk.size) == (ev.Outcome.SUCCEEDED, minimum)
    assert ended.reason
    assert scattered.disk.faults.calls["resize"] > 2, "what the kernel remembers of it is healed"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ETXTBSY])
def test_a_best_effort_ends_well_where_the_kernel_refuses_a_cut(guest: Guest, number: int) -> None:
    guest.disk.write(5 * GIB)
    for chunk in guest.disk.of("data"):
        chunk.used = max(chunk.used - 300 * MIB, 8 * MIB)
    minimum = guest.minimum()
    top = max(chunk.start + chunk.length for chunk in guest.disk.of("data"))
    kernel = guest.world.resizer.resize

    def resize(size: int) -> None:
        if size < top:
            raise FilesystemError("an active swap file lies above the new end", number)
        kernel(size)

    guest.world.resizer.resize = resize  # type: ignore[method-assign]
    ended = guest.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert minimum < top <= guest.disk.size < 8 * GIB
    assert ended.reason


def test_a_refusal_is_healed_whatever_ends_a_best_effort(scattered: Guest) -> None:
    calls = []

    def move_out(logical: int, *, metadata: bool = False) -> None:
        calls.append((logical, metadata))
        raise FilesystemError("no", errno.ENOSPC if len(calls) == 1 else errno.EIO)

    scattered.world.resizer.move_out = move_out  # type: ignore[method-assign]
    minimum = scattered.minimum()
    before = scattered.disk.faults.calls["resize"]
    assert scattered.run(0, best_effort=True).outcome is ev.Outcome.FAILED
    assert scattered.disk.size == minimum
    assert scattered.disk.faults.calls["resize"] - before >= 3, "the cut, and two that heal"


@pytest.mark.parametrize("how", ["cancel", "no room"])
def test_the_balloon_stands_still_until_a_pivot_is_back(topped: Guest, how: str) -> None:
    # A host that allows nothing: whatever the balloon does not hold, it takes, also what the way back needs.
    topped.disk.of("data")[0].used -= 100 * MIB
    topped.engine.hold(0)
    minimum = topped.minimum()

    def settle() -> None:
        topped.engine.hold(0, fresh=False)

    topped.settle = settle  # type: ignore[method-assign]
    move_out, resize = topped.world.resizer.move_out, topped.world.resizer.resize
    moved: list[int] = []
    refused: list[int] = []

    def moving(logical: int, *, metadata: bool = False) -> None:
        move_out(logical, metadata=metadata)
        moved.append(logical)
        if how == "cancel":
            topped.runner._stops["a"].set()

    def resizing(size: int) -> None:
        if how == "no room" and moved and not refused and size < topped.disk.size:
            refused.append(size)
            raise FilesystemError("no room", errno.ENOSPC)
        resize(size)

    topped.world.resizer.move_out = moving  # type: ignore[method-assign]
    topped.world.resizer.resize = resizing  # type: ignore[method-assign]
    ended = topped.run(0, best_effort=True)
    assert moved, "there was a pivot"
    assert ended.outcome is (ev.Outcome.STOPPED if how == "cancel" else ev.Outcome.SUCCEEDED)
    assert topped.disk.size <= minimum
    assert topped.disk.written < 8 * MIB, "nothing of the balloon was copied to the host"


def test_a_best_efforts_progress_is_measured_to_what_was_asked_for(scattered: Guest) -> None:
    scattered.run(0, best_effort=True)
    told = [event for event in scattered.told if isinstance(event, ev.JobProgressed)]
    before = [event for event in told if event.moved and event.current_size > scattered.disk.size]
    assert before
    assert all(event.moved < event.to_move for event in before), "there is more to come"
