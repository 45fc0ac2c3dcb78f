"""The balloon engine on the simulation: true when it says so, honest when it cannot, and it gives metadata its room."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.balloon import target
from storaged.balloon.engine import BalloonEngine
from storaged.errors import FilesystemError, Kind
from storaged.sim import SimBalloonFile, SimDisk, SimFilesystem, SimPreallocated
from storaged.sim.disk import SimChunk
from storaged.units import GIB, MIB, SECTOR


class Guest:
    """A simulated filesystem and the engine that keeps its balloon."""

    def __init__(self, size: int = 8 * GIB) -> None:
        self.disk = SimDisk(size)
        self.filesystem = SimFilesystem(self.disk)
        self.balloon = SimBalloonFile(self.disk)
        self.preallocated = SimPreallocated(self.disk)
        self.engine = BalloonEngine(self.filesystem, self.balloon, self.preallocated)

    @property
    def available(self) -> int:
        """What applications could write."""
        return self.filesystem.space().available


@pytest.fixture
def guest() -> Guest:
    return Guest()


@given(
    size=st.integers(256 * MIB, 64 * GIB),
    turns=st.lists(
        st.tuples(st.integers(0, 16 * GIB), st.sampled_from(["write", "delete", "hold"]), st.integers(0, 16 * GIB)),
        max_size=8,
    ),
)
def test_after_every_hold_applications_have_what_they_may(size: int, turns: list[tuple[int, str, int]]) -> None:
    guest = Guest(size // SECTOR * SECTOR)
    for amount, what, limit in turns:
        if what == "write":
            guest.disk.write(amount)
        elif what == "delete":
            guest.disk.delete(amount)
        used = sum(chunk.used for chunk in guest.disk.chunks)
        held = guest.engine.hold(limit)
        assert held.size == guest.balloon.size() >= 0
        assert held.space.available == guest.available <= target.ceiling(held.space, limit)
        assert held.size == 0 or guest.available >= limit - target.TOLERANCE
        assert sum(chunk.used for chunk in guest.disk.chunks) == used, "nobody's data is touched"
    taken = guest.engine.inflated_total - guest.engine.deflated_total
    assert taken == guest.balloon.size()
    assert guest.engine.hold(None).size == guest.balloon.size() == 0
    assert guest.engine.inflated_total == guest.engine.deflated_total


def test_what_was_written_since_the_host_spoke_is_not_given_again(guest: Guest) -> None:
    guest.engine.hold(2 * GIB)
    before = guest.balloon.size()
    guest.disk.write(GIB)
    assert guest.engine.hold(2 * GIB, fresh=False).size == before
    guest.disk.delete(GIB // 2)
    guest.engine.hold(2 * GIB, fresh=False)
    assert guest.available == pytest.approx(3 * GIB // 2, abs=target.TOLERANCE), "what they delete is theirs again"
    guest.engine.hold(2 * GIB)
    assert guest.available == pytest.approx(2 * GIB, abs=target.TOLERANCE), "the host has spoken again"


def test_what_is_written_while_it_works_is_not_given_again(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.engine.hold(2 * GIB)
    sync, written = guest.filesystem.sync, 0

    def busy() -> None:
        nonlocal written
        guest.disk.write(100 * MIB)
        written += 100 * MIB
        sync()

    monkeypatch.setattr(guest.filesystem, "sync", busy)
    for _ in range(3):
        assert guest.engine.hold(2 * GIB, fresh=False).deflated <= target.TOLERANCE
    assert written
    assert guest.available + written == pytest.approx(2 * GIB, abs=target.TOLERANCE)


def test_a_promise_that_could_not_be_kept_is_owed(guest: Guest) -> None:
    guest.engine.hold(GIB)
    guest.disk.faults.fail("shrink", FilesystemError("no", errno.EIO))
    with pytest.raises(FilesystemError):
        guest.engine.hold(3 * GIB)
    guest.disk.write(GIB // 2)
    guest.engine.hold(3 * GIB, fresh=False)
    assert guest.available == pytest.approx(5 * GIB // 2, abs=target.TOLERANCE)


def test_after_a_restart_nobody_knows_what_was_written(guest: Guest) -> None:
    guest.engine.hold(2 * GIB)
    guest.disk.write(GIB)
    restarted = BalloonEngine(guest.filesystem, guest.balloon, guest.preallocated)
    assert restarted.hold(2 * GIB, fresh=False).deflated == 0
    assert guest.available <= GIB
    assert restarted.hold(GIB // 2, fresh=False).inflated > 0, "tighter it may always get"
    assert restarted.hold(2 * GIB).deflated > 0


def test_held_again_nothing_moves(guest: Guest) -> None:
    guest.engine.hold(2 * GIB)
    calls = dict(guest.disk.faults.calls)
    again = guest.engine.hold(2 * GIB)
    assert (again.inflated, again.deflated) == (0, 0)
    assert guest.disk.faults.calls["extend"] == calls["extend"]
    assert guest.disk.faults.calls["shrink"] == calls.get("shrink", 0)


def test_what_was_taken_is_committed(guest: Guest) -> None:
    guest.engine.hold(2 * GIB)
    syncs = guest.disk.faults.calls["sync"]
    assert syncs >= 1
    guest.engine.hold(3 * GIB)
    assert guest.disk.faults.calls["sync"] > syncs


def test_no_room_at_once_is_tried_with_less(guest: Guest) -> None:
    guest.disk.faults.fail("extend", FilesystemError("no room", errno.ENOSPC), times=3)
    held = guest.engine.hold(2 * GIB)
    assert held.space.available <= target.ceiling(held.space, 2 * GIB)


def test_never_any_room_is_said(guest: Guest) -> None:
    guest.disk.faults.fail("extend", FilesystemError("no room", errno.ENOSPC), times=1000)
    with pytest.raises(FilesystemError, match="2147483648 are allowed") as caught:
        guest.engine.hold(2 * GIB)
    assert caught.value.errno == errno.ENOSPC
    assert guest.disk.faults.calls["extend"] <= 64


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.EROFS])
def test_another_reason_is_passed_on_at_once(guest: Guest, number: int) -> None:
    guest.disk.faults.fail("extend", FilesystemError("the kernel said no", number))
    with pytest.raises(FilesystemError, match="the kernel said no") as caught:
        guest.engine.hold(2 * GIB)
    assert caught.value.errno == number
    assert guest.disk.faults.calls["extend"] == 1


def test_a_read_only_filesystem_is_left_alone(guest: Guest) -> None:
    guest.disk.read_only = True
    with pytest.raises(FilesystemError, match="read-only") as caught:
        guest.engine.hold(2 * GIB)
    assert (caught.value.errno, caught.value.kind) == (errno.EROFS, Kind.PRECONDITION)


@pytest.mark.parametrize("what", ["resize", "balance", "balance paused"])
def test_nothing_is_taken_while_chunks_move(guest: Guest, what: str) -> None:
    guest.engine.hold(3 * GIB)
    guest.disk.exclusive_operation = what
    with pytest.raises(FilesystemError, match=what) as caught:
        guest.engine.hold(2 * GIB)
    assert (caught.value.errno, caught.value.kind) == (errno.EBUSY, Kind.BUSY)
    assert guest.engine.hold(4 * GIB).deflated > 0, "giving back is always allowed"


def test_what_a_balance_hides_is_looked_at_again(guest: Guest) -> None:
    limit = guest.engine.hold(2 * GIB).space.available - 50 * MIB
    guest.disk.exclusive_operation = "balance"
    held = guest.engine.hold(limit)
    assert held.again, "within the slack, but the balance will give a chunk back"
    guest.disk.exclusive_operation = "balance paused"
    with pytest.raises(FilesystemError, match="paused"):
        guest.engine.hold(limit - GIB)
    assert not guest.engine.hold(limit).again, "it gives nothing back by itself"
    guest.disk.exclusive_operation = "none"
    assert guest.engine.hold(limit).inflated > 0
    held = guest.engine.hold(limit)
    assert (held.again, held.inflated) == (False, 0)


def test_after_an_inflation_it_looks_once_more(guest: Guest) -> None:
    # What our commit lets the kernel delete is gone, and free, only after it.
    assert guest.engine.hold(2 * GIB).again
    assert not guest.engine.hold(2 * GIB, fresh=False).again
    assert not guest.engine.hold(3 * GIB).again


def test_freed_blocks_are_handed_back_before_the_balloon_takes_their_place(guest: Guest) -> None:
    guest.disk.write(2 * GIB)
    guest.disk.delete(GIB)
    guest.filesystem.sync()
    guest.engine.hold(GIB)
    assert guest.disk.untrimmed == 0
    assert guest.disk.faults.calls["trim"] == 1


def test_what_a_trim_leaves_out_is_not_tried_again_in_the_same_call(guest: Guest) -> None:
    guest.disk.write(2 * GIB)
    guest.disk.delete(GIB)
    guest.filesystem.sync()
    guest.disk.untrimmable = 300 * MIB
    guest.engine.hold(GIB)
    assert guest.disk.faults.calls["trim"] == 1
    guest.disk.untrimmable = 0
    guest.engine.hold(GIB // 2)
    assert guest.disk.untrimmed == 0, "by now there may be room"


def short_of_metadata() -> Guest:
    """A guest whose balloon holds all the room there is, with metadata about to run out."""
    guest = Guest()
    guest.engine.hold(0)
    (metadata,) = guest.disk.of("metadata")
    guest.disk.write(guest.available)
    metadata.used = metadata.length - 10 * MIB
    return guest


def test_metadata_gets_a_chunk_of_the_balloon_before_it_starves() -> None:
    guest = short_of_metadata()
    before = guest.balloon.size()
    done = guest.engine.sample(2 * GIB, adjust=False)
    assert 0 < done.relief <= guest.disk.data_chunk
    assert done.tight
    assert guest.balloon.size() == before - done.relief
    assert guest.filesystem.space().unallocated >= done.relief, "room for a metadata chunk, now"
    assert guest.engine.sample(2 * GIB, adjust=False).relief == 0, "once"


def test_what_metadata_is_given_beyond_the_grant_is_bounded_and_not_renewed_by_a_report() -> None:
    guest = short_of_metadata()
    (metadata,) = guest.disk.of("metadata")
    given = 0
    for _ in range(20):
        given += guest.engine.sample(GIB, adjust=False).relief and metadata.length  # what metadata may grow by
        guest.disk.write(guest.available)  # data is as fast as ever
        guest.engine.hold(0)
    assert 0 < given <= GIB // 2
    assert "used up" in guest.engine.sample(GIB, adjust=False).warning or not guest.balloon.size()


def test_within_the_grant_metadata_has_its_room_as_often_as_it_needs() -> None:
    guest = short_of_metadata()
    (metadata,) = guest.disk.of("metadata")
    guest.engine.hold(GIB)
    for _ in range(3):
        done = guest.engine.sample(0, adjust=False)
        assert guest.filesystem.space().unallocated >= 256 * MIB, done.warning
        metadata.length += metadata.length  # the kernel's next chunk, of what was given
        metadata.used = metadata.length - 10 * MIB
        guest.engine.hold(GIB)
    metadata.used += 10 * MIB
    guest.engine.hold(100 * MIB)
    assert guest.engine.sample(0, adjust=True).relief == 0, "a chunk is more than is left"


def test_nothing_is_given_while_chunks_move() -> None:
    guest = short_of_metadata()
    guest.disk.exclusive_operation = "balance"
    assert guest.engine.sample(GIB, adjust=False).relief == 0


def test_empty_chunks_go_to_metadata_before_the_balloon_does() -> None:
    guest = short_of_metadata()
    guest.disk.delete(guest.disk.data_chunk)
    before = guest.balloon.size()
    while guest.filesystem.space().data_free < guest.disk.data_chunk or not any(
        not chunk.used and not chunk.held for chunk in guest.disk.of("data")
    ):
        guest.balloon.shrink(guest.disk.data_chunk)
        before = guest.balloon.size()
    assert guest.engine.sample(GIB, adjust=False).relief == 0
    assert guest.balloon.size() == before
    assert guest.filesystem.space().unallocated > 0


def test_with_headroom_nobody_looks_soon(guest: Guest) -> None:
    guest.engine.hold(GIB)
    (metadata,) = guest.disk.of("metadata")
    metadata.length, metadata.used = 10 * GIB, 0
    done = guest.engine.sample(GIB, adjust=False)
    assert (done.relief, done.tight) == (0, False)


def test_what_was_given_counts_even_if_the_chunk_cannot_be_handed_back() -> None:
    guest = short_of_metadata()
    guest.disk.faults.fail("reclaim_empty_chunks", FilesystemError("no room", errno.ENOSPC))
    assert guest.engine.sample(GIB, adjust=False).relief > 0


def test_the_layout_counts_the_balloon_into_its_chunks(guest: Guest) -> None:
    guest.disk.write(300 * MIB)
    guest.engine.hold(GIB)
    layout = guest.engine.layout()
    assert sum(chunk.balloon for chunk in layout.chunks) == guest.balloon.size()
    assert all(0 <= chunk.balloon <= chunk.used <= chunk.length for chunk in layout.chunks)


def test_vacated_chunks_are_given_back_and_counted(guest: Guest) -> None:
    guest.engine.hold(GIB)
    chunk = max((c for c in guest.engine.layout().chunks if c.vacant), key=lambda c: c.balloon)
    before = guest.balloon.size()
    assert guest.engine.vacate((chunk,)) == chunk.balloon
    assert guest.balloon.size() == before - chunk.balloon
    assert guest.engine.deflated_total == chunk.balloon


def test_prepare_touches_nothing_where_metadata_has_room(guest: Guest) -> None:
    assert guest.engine.prepare() == ""
    (metadata,) = guest.disk.of("metadata")
    metadata.length = 8 * MIB
    assert "metadata chunks grown" in guest.engine.prepare()
    assert guest.engine.prepare() == ""
    (metadata,) = guest.disk.of("metadata")
    metadata.length = 8 * MIB
    guest.disk.read_only = True
    assert guest.engine.prepare() == ""


def cramped() -> Guest:
    """Data that came and went holds all chunks, and metadata is as small as mkfs made it."""
    guest = Guest()
    (metadata,) = guest.disk.of("metadata")
    metadata.length = 8 * MIB
    guest.disk.write(guest.available)
    guest.disk.delete(6 * GIB)
    assert guest.filesystem.space().unallocated < MIB
    return guest


def test_cramped_metadata_gets_room_before_the_balloon_takes_the_rest() -> None:
    guest = cramped()
    held = guest.engine.hold(GIB)
    assert not target.cramped(held.space)
    assert held.space.available <= target.ceiling(held.space, GIB)
    guest.disk.write(guest.available)
    assert guest.engine.sample(GIB, adjust=False).relief == 0, "nothing of the balloon has to go to metadata afterwards"


def test_cramped_metadata_is_widened_as_soon_as_there_is_room_for_it() -> None:
    guest = cramped()
    guest.disk.faults.fail("grow_metadata", FilesystemError("no room", errno.ENOSPC))
    assert target.cramped(guest.engine.hold(GIB).space)
    guest.filesystem.reclaim_empty_chunks()
    assert guest.engine.sample(GIB, adjust=False).relief == 0
    assert not target.cramped(guest.filesystem.space())


def test_metadata_stays_where_what_is_unallocated_lies_in_pieces() -> None:
    guest = Guest()
    metadata = guest.disk.of("metadata")[0]
    metadata.length, metadata.used = 8 * MIB, 6 * MIB
    for start in range(17, 8 * 1024, 125):
        length = min(113, 8 * 1024 - start)
        guest.disk.chunks.append(SimChunk(start * MIB, length * MIB, "data", used=MIB))
    space = guest.filesystem.space()
    assert target.cramped(space)
    assert space.unallocated >= 2 * space.metadata_chunk
    assert guest.engine.prepare() == ""
    assert guest.disk.faults.calls.get("grow_metadata", 0) == 0, "a balance of metadata that finds no room is dangerous"
    guest.disk.chunks.pop()
    assert "metadata chunks grown" in guest.engine.prepare()


def test_nothing_is_moved_where_the_balloon_takes_nothing() -> None:
    guest = cramped()
    guest.disk.faults.fail("grow_metadata", FilesystemError("not to be called", errno.EIO))
    guest.engine.hold(7 * GIB)
    assert guest.disk.faults.calls.get("grow_metadata", 0) == 0


SHRINK_TO = 4 * GIB


@pytest.fixture
def shrinking() -> Guest:
    """In the middle of a shrink to 4 GiB: the balloon beside files and alone, below and above where data lies."""
    guest = Guest(8 * GIB)
    guest.engine.hold(guest.available)
    rows = (
        ("data", 300, 400),  # file and balloon share it
        ("data", 0, 700),  # the balloon alone
        ("data", 0, 0),
        ("data", 0, 0),
        ("data", 0, 500),  # above the target, below what has to move
        ("data", 600, 0),  # what has to move
        ("data", 0, 600),  # cut away next
    )
    guest.disk.chunks = [
        *(chunk for chunk in guest.disk.chunks if chunk.kind != "data"),
        *(
            SimChunk(GIB + number * 850 * MIB, 819 * MIB, kind, used * MIB, held * MIB)
            for number, (kind, used, held) in enumerate(rows)
        ),
    ]
    return guest


def held_by_row(guest: Guest) -> list[int]:
    """Mebibytes of balloon in each data chunk, lowest first."""
    return [chunk.held // MIB for chunk in sorted(guest.disk.of("data"), key=lambda chunk: chunk.start)]


@pytest.mark.parametrize(
    ("short", "keep", "left"),
    [
        (0, 0, [400, 700, 0, 0, 500, 0, 600]),
        (399, 0, [400, 700, 0, 0, 500, 0, 600]),  # whole extents, and never more than is lacking
        (400, 0, [0, 700, 0, 0, 500, 0, 600]),
        (900, 0, [0, 700, 0, 0, 500, 0, 600]),  # a chunk that would be empty stays
        (1000, 0, [0, 700, 0, 0, 500, 0, 0]),
        (5000, 0, [0, 700, 0, 0, 500, 0, 0]),  # what lies between would attract what has yet to move
        (5000, 600, [0, 700, 0, 0, 500, 0, 0]),
        (5000, 700, [400, 700, 0, 0, 500, 0, 0]),  # room for what has to move, and a little more
        (1000, 100, [400, 700, 0, 0, 500, 0, 600]),  # the next step gives as much for a moment
    ],
)
def test_what_a_shrink_cuts_away_is_given_back_from_where_it_does_no_harm(
    shrinking: Guest, monkeypatch: pytest.MonkeyPatch, short: int, keep: int, left: list[int]
) -> None:
    before = sum(held_by_row(shrinking))
    monkeypatch.setattr(shrinking.engine, "_short", lambda: short * MIB)
    given = shrinking.engine.ease(SHRINK_TO, keep * MIB)
    assert held_by_row(shrinking) == left
    assert given == (before - sum(left)) * MIB


def test_what_applications_have_written_since_is_not_given_back(guest: Guest) -> None:
    guest.engine.hold(3 * GIB)
    guest.disk.write(GIB)
    assert guest.engine._short() <= target.TOLERANCE
    held = guest.balloon.size()
    assert guest.engine.ease(4 * GIB, 0) == 0
    assert guest.balloon.size() == held


def test_before_the_host_has_said_anything_nothing_is_given_back(guest: Guest) -> None:
    guest.engine.hold(GIB)
    again = BalloonEngine(guest.filesystem, guest.balloon, guest.preallocated)  # after a restart
    guest.disk.size -= 2 * GIB
    assert again.ease(2 * GIB, 0) == 0
