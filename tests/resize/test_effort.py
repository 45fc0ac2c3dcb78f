"""What a shrink does when the guest takes its room, when a cut is refused, and when it is cancelled in the middle."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from storaged.core import events as ev
from storaged.errors import FilesystemError, Kind
from storaged.resize import effort, pivot
from storaged.resize.bounds import Bounds, compute
from storaged.resize.layout import Layout, Longest
from storaged.sim.disk import SimChunk
from storaged.units import GIB, KIB, MIB, SECTOR
from tests.resize.guest import Guest

SOON_S = 1.0
"""Within this a cancel has ended a job that would go on for much longer."""


@pytest.fixture
def packed(guest: Guest) -> Guest:
    """Chunk beside chunk without a hole, metadata on top; the data would fit into half of its chunks."""
    disk = guest.disk
    metadata = disk.of("metadata")[0]
    disk.write(4 * disk.data_chunk)
    at = metadata.start
    for chunk in disk.of("data"):
        chunk.start, chunk.used = at, 300 * MIB
        at += chunk.length
    metadata.start = at
    disk.size = disk.device = at + metadata.length
    return guest


def test_a_hole_that_is_taken_while_the_kernel_is_busy_is_no_hole(guest: Guest) -> None:
    disk = guest.disk
    metadata = disk.of("metadata")[0]
    metadata.start = disk.size - metadata.length
    resize = guest.world.resizer.resize
    asked: list[int] = []

    def busy_at_first(size: int) -> None:
        asked.append(size)
        if len(asked) == 1:
            while disk.write(disk.unallocated()):
                pass
            raise FilesystemError("balance", errno.EINPROGRESS, Kind.BUSY)
        resize(size)

    guest.world.resizer.resize = busy_at_first  # type: ignore[method-assign]
    ended = guest.run(4 * GIB)
    assert asked == [4 * GIB], "what was certain before is not asked for again"
    assert (ended.outcome, disk.size) == (ev.Outcome.FAILED, 8 * GIB)
    assert ended.reason.startswith(f"metadata chunk at {metadata.start} cannot move: no hole of ")
    assert not disk.read_only, "as it is when metadata is moved to nowhere"


def test_a_cut_that_is_still_certain_after_a_wait_is_made(guest: Guest) -> None:
    disk = guest.disk
    metadata = disk.of("metadata")[0]
    metadata.start = disk.size - metadata.length
    disk.faults.fail("resize", FilesystemError("balance", errno.EINPROGRESS, Kind.BUSY), times=2)
    ended = guest.run(4 * GIB)
    assert (ended.outcome, ended.reason, disk.size) == (ev.Outcome.SUCCEEDED, "", 4 * GIB)


def test_where_there_is_no_hole_only_rewriting_helps(packed: Guest) -> None:
    minimum = packed.minimum()
    assert minimum == packed.disk.size, "nothing can be cut away, and nothing taken back"
    ended = packed.run(0, best_effort=True)
    assert ended.outcome is ev.Outcome.SUCCEEDED
    assert packed.disk.size < minimum
    assert packed.disk.faults.calls["move_out"]
    assert sum(chunk.used for chunk in packed.disk.of("data")) == 1200 * MIB
    assert not packed.disk.read_only


def test_what_the_balloon_gave_for_a_refused_cut_is_taken_back_before_anything_else(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, engine = guest.disk, guest.engine
    engine.hold(GIB)
    resize, given = guest.world.resizer.resize, engine.deflated_total
    refusals: list[int] = []
    afterwards: list[tuple[int, int]] = []

    def refused(size: int) -> None:
        if size < disk.size - SECTOR and engine.deflated_total > given:
            refusals.append(size)
            raise FilesystemError("no room", errno.ENOSPC)
        resize(size)

    def settle() -> None:
        engine.hold(GIB)

    def next_pivot(*_: object) -> None:
        held = engine.size()
        afterwards.append((held, engine.hold(GIB).size))

    guest.world.resizer.resize = refused  # type: ignore[method-assign]
    guest.settle = settle  # type: ignore[method-assign]
    monkeypatch.setattr(effort, "next_pivot", next_pivot)
    assert guest.run(0, best_effort=True).outcome is ev.Outcome.SUCCEEDED
    assert refusals, "it gave something for a cut"
    assert afterwards
    assert all(held == owed for held, owed in afterwards)


def _cancelled_in(guest: Guest, operation: str, *, speed: float) -> tuple[ev.JobEnded, float]:
    """A best effort that is cancelled while `operation` moves at `speed`; its end, and the seconds until then."""
    resizer, began = guest.world.resizer, []
    slow = getattr(resizer, operation)

    def cancel() -> None:
        began.append(time.monotonic())
        guest.runner.cancel("a")

    timer = threading.Timer(0.1, cancel)

    def slowly(*args: object, **options: object) -> None:
        if timer.ident is None:
            guest.disk.speed = speed
            timer.start()
        slow(*args, **options)

    setattr(resizer, operation, slowly)
    ended = guest.run(0, best_effort=True)
    took = time.monotonic() - began[0]
    timer.join()
    return ended, took


def test_a_cancel_while_a_chunk_is_rewritten_ends_it_soon(packed: Guest) -> None:
    size = packed.disk.size
    ended, took = _cancelled_in(packed, "move_out", speed=10 * MIB)
    assert (ended.outcome, packed.disk.size) == (ev.Outcome.STOPPED, size)
    assert took < SOON_S
    assert packed.disk.exclusive_operation == "none"


def test_a_cancel_while_a_chunk_goes_up_ends_it_soon_and_takes_the_room_away_again(topped: Guest) -> None:
    minimum = topped.minimum()
    ended, took = _cancelled_in(topped, "move_out", speed=10 * KIB)
    assert (ended.outcome, topped.disk.size) == (ev.Outcome.STOPPED, minimum)
    assert took < SOON_S
    assert topped.disk.exclusive_operation == "none"


def test_a_cancel_while_pivots_are_looked_for_ends_it_soon(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = guest.disk
    at = 9 * MIB + disk.of("metadata")[0].length
    for _ in range(20):
        disk.chunks.append(SimChunk(at, 64 * MIB, "data", used=40 * MIB))
        at += 64 * MIB
    disk.size = at
    judged: list[float] = []
    timer = threading.Timer(0.1, guest.runner.cancel, ["a"])

    def judge(layout: Layout, longest: Longest) -> Bounds:
        judged.append(time.monotonic())
        if len(judged) == 1:
            timer.start()
        time.sleep(0.2)
        return compute(layout, longest)

    monkeypatch.setattr(pivot, "compute", judge)
    guest.run(0, best_effort=True)
    timer.join()
    assert time.monotonic() - judged[0] < SOON_S
    assert not disk.faults.calls["move_out"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_cut_that_a_writer_was_faster_than_is_judged_anew(guest: Guest, times: int) -> None:
    # Between the picture and the cut a guest may write; what the kernel refuses then changes nothing.
    guest.disk.write(2 * GIB)
    resize = guest.world.resizer.resize
    refused: list[int] = []

    def racing(size: int) -> None:
        if size < guest.disk.size - SECTOR and len(refused) < times:
            refused.append(size)
            raise FilesystemError("no room to move what lies above the new end", errno.ENOSPC)
        resize(size)

    guest.world.resizer.resize = racing  # type: ignore[method-assign]
    ended = guest.run(4 * GIB)
    assert len(refused) == times
    if times < 3:
        assert (ended.outcome, guest.disk.size) == (ev.Outcome.SUCCEEDED, 4 * GIB)
    else:
        assert ended.outcome is ev.Outcome.FAILED
        assert "no room to move" in ended.reason
