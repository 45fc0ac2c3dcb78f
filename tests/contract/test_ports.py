"""One contract, two worlds: what the simulation promises, the kernel keeps, and the other way round."""

from __future__ import annotations

import errno
from itertools import pairwise
from pathlib import Path

import pytest

from storaged.btrfs.system import ProcSysctl, SystemClock
from storaged.core.model import DirtyLimits
from storaged.core.ports import Clock, JournalStore, Sysctl
from storaged.errors import FilesystemError
from storaged.resize.journal import FileJournal
from storaged.sim import MemoryJournal, SimClock, SimSysctl
from storaged.units import GIB, MIB, SECTOR
from tests.contract.conftest import DEVICE, SIZE, Place

# --- Filesystem -----------------------------------------------------------------------------------------------


def test_space_adds_up(place: Place) -> None:
    place.write(100 * MIB)
    space = place.world.filesystem.space()
    assert (space.size, space.device) == (SIZE, DEVICE)
    assert place.world.filesystem.size() == SIZE
    assert place.world.filesystem.device_size() == DEVICE
    assert space.available == space.data_free + space.unallocated // space.data_copies
    assert 100 * MIB <= space.data_used <= 100 * MIB + place.slack
    assert space.data_used <= space.data_total
    assert space.metadata_used <= space.metadata_total
    # The kernel rounds a tenth up to 16 MiB.
    assert 0 < space.data_chunk < SIZE // 10 + 16 * MIB
    assert 0 < space.metadata_chunk < SIZE // 10 + 16 * MIB
    assert space.data_total + space.unallocated < SIZE
    assert not space.read_only
    assert space.exclusive_operation == "none"


def test_what_is_written_is_no_longer_available(place: Place) -> None:
    before = place.world.filesystem.space().available
    place.write(200 * MIB)
    after = place.world.filesystem.space().available
    assert 200 * MIB <= before - after <= 200 * MIB + place.slack
    place.delete()
    assert abs(place.world.filesystem.space().available - before) <= place.slack


def test_the_layout_covers_what_space_counts(place: Place) -> None:
    place.write(150 * MIB)
    place.world.filesystem.sync()
    layout, space = place.world.filesystem.layout(), place.world.filesystem.space()
    assert (layout.size, layout.device) == (SIZE, DEVICE)
    data = [chunk for chunk in layout.chunks if chunk.kind == "data"]
    assert sum(chunk.length for chunk in data) == space.data_total
    assert sum(chunk.used for chunk in data) == space.data_used
    assert all(chunk.used <= chunk.length and not chunk.balloon for chunk in layout.chunks)
    metadata = sum(chunk.length for chunk in layout.chunks if chunk.kind == "metadata")
    assert metadata == space.metadata_total
    stripes = sorted((start, start + c.stripe_length) for c in layout.chunks for start in c.stripes)
    assert stripes[0][0] >= MIB
    assert stripes[-1][1] <= SIZE
    assert all(end <= start for (_, end), (start, _) in pairwise(stripes))
    on_device = sum(end - start for start, end in stripes)
    assert abs(SIZE - MIB - on_device - space.unallocated) <= MIB


def test_free_room_in_chunks_is_told_in_pieces(place: Place) -> None:
    place.write(30 * MIB)
    place.world.filesystem.sync()
    for chunk in place.world.filesystem.layout().chunks:
        if chunk.kind == "data":
            assert sum(chunk.rooms) == chunk.length - chunk.used
        else:
            assert chunk.rooms == ()


def test_extents_of_a_chunk_lie_in_it(place: Place) -> None:
    place.write(30 * MIB)
    place.world.filesystem.sync()
    for chunk in place.world.filesystem.layout().chunks:
        if chunk.kind == "data":
            extents = place.world.filesystem.data_extents(chunk.logical, chunk.length)
            assert bool(extents) == bool(chunk.used)
            for start, length in extents:
                assert chunk.logical <= start
                assert start + length <= chunk.logical + chunk.length


def test_statvfs_agrees_after_a_commit(place: Place) -> None:
    place.world.balloon.extend(300 * MIB)
    place.world.filesystem.sync()
    told = place.world.filesystem.statvfs_available()
    assert told is not None
    assert abs(told - place.world.filesystem.space().available) <= 16 * MIB


def test_reclaim_makes_empty_chunks_unallocated(place: Place) -> None:
    fs, balloon = place.world.filesystem, place.world.balloon
    before = fs.space()
    balloon.extend(400 * MIB)
    balloon.shrink(400 * MIB)
    fs.sync()
    assert fs.space().unallocated <= before.unallocated - 300 * MIB
    fs.reclaim_empty_chunks()
    fs.sync()
    after = fs.space()
    assert after.unallocated >= before.unallocated - 2 * after.data_chunk, "but for a chunk to work with"
    assert after.exclusive_operation == "none"


def test_trim_hands_free_room_back(place: Place) -> None:
    fs = place.world.filesystem
    if not fs.discard_supported():
        pytest.skip("this machine's loop devices cannot discard")
    place.write(200 * MIB)
    place.delete()
    assert 0 < fs.trim() <= SIZE
    assert fs.untrimmed() in (None, 0)


def test_it_has_a_name(place: Place) -> None:
    assert place.world.filesystem.mountpoint.startswith("/")
    assert len(place.world.filesystem.uuid) == 36


# --- BalloonFile ----------------------------------------------------------------------------------------------


def test_what_the_balloon_takes_is_seen_at_once(place: Place) -> None:
    fs, balloon = place.world.filesystem, place.world.balloon
    assert balloon.size() == 0
    assert balloon.extents() == []
    before = fs.space().available
    for size in (SECTOR, 64 * MIB, 333 * MIB):
        balloon.extend(size)
    held = SECTOR + 64 * MIB + 333 * MIB
    assert balloon.size() == held, "without a commit"
    assert abs(before - held - fs.space().available) <= MIB


def test_extents_add_up_to_the_size_and_lie_in_data_chunks(place: Place) -> None:
    fs, balloon = place.world.filesystem, place.world.balloon
    place.write(20 * MIB)
    balloon.extend(350 * MIB)
    fs.sync()
    extents = balloon.extents()
    assert sum(length for _, length in extents) == balloon.size() == 350 * MIB
    ordered = sorted(extents)
    assert all(a + length <= b for (a, length), (b, _) in pairwise(ordered)), "none twice"
    chunks = [chunk for chunk in fs.layout().chunks if chunk.kind == "data"]
    for start, length in extents:
        assert any(c.logical <= start and start + length <= c.logical + c.length for c in chunks)


def test_too_much_is_refused_and_nothing_of_it_taken(place: Place) -> None:
    fs, balloon = place.world.filesystem, place.world.balloon
    balloon.extend(64 * MIB)
    before = fs.space().available
    with pytest.raises(FilesystemError) as caught:
        balloon.extend(SIZE)
    assert caught.value.errno == errno.ENOSPC
    fs.sync()
    assert balloon.size() == 64 * MIB
    assert abs(fs.space().available - before) <= MIB
    balloon.extend(64 * MIB)
    assert balloon.size() == 128 * MIB, "what fits is still taken"


def test_shrinking_gives_back_what_was_asked_or_an_extent_more(place: Place) -> None:
    fs, balloon = place.world.filesystem, place.world.balloon
    for _ in range(4):
        balloon.extend(50 * MIB)
    fs.sync()
    longest = max(length for _, length in balloon.extents())
    before = fs.space().available
    balloon.shrink(60 * MIB)
    fs.sync()
    given = 200 * MIB - balloon.size()
    assert 60 * MIB <= given < 60 * MIB + longest
    assert abs(fs.space().available - before - given) <= MIB
    assert sum(length for _, length in balloon.extents()) == balloon.size()
    balloon.shrink(SIZE)
    assert balloon.size() == 0
    assert balloon.extents() == []


def test_only_what_touches_a_range_is_vacated(place: Place) -> None:
    fs, balloon = place.world.filesystem, place.world.balloon
    balloon.extend(400 * MIB)
    fs.sync()
    extents = sorted(balloon.extents())
    assert balloon.vacate([]) == 0
    assert balloon.vacate([(1 << 60, GIB)]) == 0
    chunk = next(c for c in fs.layout().chunks if c.kind == "data" and c.used)
    inside = [(a, n) for a, n in extents if a < chunk.logical + chunk.length and chunk.logical < a + n]
    assert inside
    assert balloon.vacate([(chunk.logical, chunk.length)]) == sum(length for _, length in inside)
    fs.sync()
    assert sorted(balloon.extents()) == [extent for extent in extents if extent not in inside]
    start, length = max(balloon.extents(), key=lambda extent: extent[1])
    before = balloon.size()
    assert balloon.vacate([(start, SECTOR)]) == length, "whole extents"
    assert balloon.size() == before - length


def test_removed_nothing_is_left_and_it_can_begin_again(place: Place) -> None:
    fs, balloon = place.world.filesystem, place.world.balloon
    balloon.remove()
    before = fs.space().data_used
    balloon.extend(200 * MIB)
    balloon.remove()
    fs.sync()
    assert (balloon.size(), balloon.extents()) == (0, [])
    assert fs.space().data_used == before
    if Path(fs.mountpoint).is_dir():
        assert not list(Path(fs.mountpoint).iterdir())
    balloon.extend(SECTOR)
    assert balloon.size() == SECTOR


def test_the_balloon_is_found_again(place: Place) -> None:
    place.world.balloon.extend(123 * MIB)
    place.world.filesystem.sync()
    extents = sorted(place.world.balloon.extents())
    again = place.reopened().balloon
    assert again.size() == 123 * MIB
    assert sorted(again.extents()) == extents


# --- Resizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DEVICE, SIZE + 12345, SIZE, SIZE - SECTOR, 900 * MIB])
def test_the_size_is_the_one_asked_for_in_whole_sectors(place: Place, size: int) -> None:
    place.world.resizer.resize(size)
    assert place.world.filesystem.size() == size // SECTOR * SECTOR
    assert place.world.filesystem.space().size == size // SECTOR * SECTOR


@pytest.mark.parametrize(
    ("size", "number"), [(0, errno.EINVAL), (256 * MIB - SECTOR, errno.EINVAL), (DEVICE + SECTOR, errno.EFBIG)]
)
def test_a_size_that_cannot_be_is_refused(place: Place, size: int, number: int) -> None:
    with pytest.raises(FilesystemError) as caught:
        place.world.resizer.resize(size)
    assert caught.value.errno == number
    assert place.world.filesystem.size() == SIZE


def test_a_shrink_without_room_is_refused_and_the_size_stays(place: Place) -> None:
    place.write(700 * MIB)
    with pytest.raises(FilesystemError) as caught:
        place.world.resizer.resize(400 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert place.world.filesystem.size() == SIZE
    assert place.world.filesystem.space().exclusive_operation == "none"


def test_a_shrink_moves_what_lies_above(place: Place) -> None:
    place.world.balloon.extend(300 * MIB)
    place.write(64 * MIB)
    place.world.balloon.shrink(300 * MIB)
    place.world.filesystem.sync()
    used = place.world.filesystem.space().data_used
    place.world.resizer.resize(600 * MIB)
    assert place.world.filesystem.size() == 600 * MIB
    assert abs(place.world.filesystem.space().data_used - used) <= place.slack
    assert place.world.resizer.written() >= 0


def test_what_is_moved_out_of_a_chunk_lies_elsewhere(place: Place) -> None:
    fs = place.world.filesystem
    place.write(150 * MIB)
    before = fs.space().data_used
    chunk = max((c for c in fs.layout().chunks if c.kind == "data"), key=lambda c: c.used)
    place.world.resizer.move_out(chunk.logical)
    fs.sync()
    assert chunk.logical not in [c.logical for c in fs.layout().chunks] or chunk.stripes not in [
        c.stripes for c in fs.layout().chunks if c.used
    ]
    assert abs(fs.space().data_used - before) <= place.slack
    assert fs.size() == SIZE
    assert fs.space().exclusive_operation == "none"


def test_metadata_that_is_moved_out_of_its_chunk_lies_elsewhere(place: Place) -> None:
    fs = place.world.filesystem
    place.write(100 * MIB)
    fs.sync()
    before = fs.layout()
    chunk = max((c for c in before.chunks if c.kind == "metadata"), key=lambda c: c.used)
    place.world.resizer.move_out(chunk.logical, metadata=True)
    fs.sync()
    after = fs.layout()
    assert chunk.stripes not in [c.stripes for c in after.chunks]
    assert [c for c in after.chunks if c.kind == "data"] == [c for c in before.chunks if c.kind == "data"]
    assert fs.size() == SIZE
    assert not fs.space().read_only
    assert fs.space().exclusive_operation == "none"


def test_what_fits_nowhere_else_stays_where_it_is(place: Place) -> None:
    fs = place.world.filesystem
    place.write(700 * MIB)
    fs.sync()
    place.world.balloon.extend(fs.space().available - 40 * MIB)
    before = fs.space()
    fullest = max((c for c in fs.layout().chunks if c.kind == "data"), key=lambda c: c.used)
    assert fullest.used > 60 * MIB
    with pytest.raises(FilesystemError) as caught:
        place.world.resizer.move_out(fullest.logical)
    assert caught.value.errno == errno.ENOSPC
    after = fs.space()
    assert not after.read_only
    assert abs(after.data_used - before.data_used) <= place.slack
    assert after.exclusive_operation == "none"


def test_a_cancel_without_a_resize_does_nothing(place: Place) -> None:
    place.world.resizer.cancel()
    place.world.resizer.resize(DEVICE)
    place.world.resizer.cancel()
    assert place.world.filesystem.size() == DEVICE


# --- Sysctl, Clock, JournalStore: no filesystem needed --------------------------------------------------------

RATIOS = DirtyLimits(0, 0, 20, 10)
BYTES = DirtyLimits(64 * MIB, 32 * MIB, 0, 0)


class FakeVm(ProcSysctl):
    """Files that behave as /proc/sys/vm: of each pair the one written last is in force, the other reads 0."""

    def __init__(self, root: Path, limits: DirtyLimits) -> None:
        super().__init__(str(root))
        self._files = root
        for name in ("dirty_bytes", "dirty_background_bytes", "dirty_ratio", "dirty_background_ratio"):
            (root / name).write_text(f"{getattr(limits, name)}\n")

    def _write(self, name: str, value: int) -> None:
        (self._files / name).write_text("")  # a proc file takes the new value whole
        super()._write(name, value)
        other = name.replace("_bytes", "_ratio") if name.endswith("_bytes") else name.replace("_ratio", "_bytes")
        (self._files / other).write_text("0\n")


@pytest.fixture(params=["sim", "real"])
def sysctl(request: pytest.FixtureRequest, tmp_path: Path) -> Sysctl:
    """Write-back limits as the kernel has them by default."""
    return SimSysctl(RATIOS) if request.param == "sim" else FakeVm(tmp_path, RATIOS)


@pytest.mark.parametrize("limits", [BYTES, RATIOS, DirtyLimits(MIB, 0, 0, 5), DirtyLimits(0, MIB, 40, 0)])
def test_write_back_limits_are_what_was_set(sysctl: Sysctl, limits: DirtyLimits) -> None:
    assert sysctl.dirty_limits() == RATIOS
    sysctl.set_dirty_limits(limits)
    assert sysctl.dirty_limits() == limits
    sysctl.set_dirty_limits(RATIOS)
    assert sysctl.dirty_limits() == RATIOS


def test_limits_that_are_not_there_are_an_error_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(FilesystemError, match="write-back limits"):
        ProcSysctl(str(tmp_path)).dirty_limits()
    with pytest.raises(FilesystemError, match="write-back limits"):
        ProcSysctl(str(tmp_path)).set_dirty_limits(RATIOS)


@pytest.mark.parametrize("text", ["", "many", "1 2", "\x00"])
def test_limits_that_are_no_numbers_are_an_error_with_a_name(tmp_path: Path, text: str) -> None:
    FakeVm(tmp_path, RATIOS)
    (tmp_path / "dirty_bytes").write_text(text, encoding="ascii")
    with pytest.raises(FilesystemError, match="dirty_bytes holds"):
        ProcSysctl(str(tmp_path)).dirty_limits()


@pytest.fixture(params=["sim", "real"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> JournalStore:
    """An empty journal."""
    return MemoryJournal() if request.param == "sim" else FileJournal(str(tmp_path / "state"))


def test_a_journal_gives_back_what_was_saved_last(journal: JournalStore) -> None:
    assert journal.load() is None
    for record in ({}, {"a": 1, "b": None, "c": {"d": [1.5, "ä"]}}, {"a": 2}):
        saved: dict[str, object] = dict(record)
        journal.save(saved)
        saved["later"] = True
        assert journal.load() == record


def test_a_journal_takes_nothing_that_is_no_document(journal: JournalStore) -> None:
    journal.save({"a": 1})
    with pytest.raises(TypeError):
        journal.save({"a": object()})
    assert journal.load() == {"a": 1}


@pytest.mark.parametrize("clock", [SimClock(), SystemClock()], ids=["sim", "real"])
def test_a_clock_does_not_go_back(clock: Clock) -> None:
    first = clock.monotonic()
    assert clock.monotonic() >= first
    assert clock.wall() > 1_600_000_000
