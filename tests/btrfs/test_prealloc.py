"""Unwritten extents on a real btrfs: what counts, what does not, and that no look counts too little."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.loop import Guest, fill, run
from storaged.balloon.file import BtrfsBalloonFile
from storaged.balloon.place import NAME as SUBVOLUME
from storaged.btrfs import ioctl, prealloc_worker
from storaged.btrfs.prealloc import PreallocScanner
from storaged.btrfs.prealloc_worker import Scanner, Trees, union, unpack
from storaged.core.model import Unwritten
from storaged.units import GIB, KIB, MIB
from tests.btrfs.conftest import MakeGuest
from tests.btrfs.support import running, sync, until

pytestmark = pytest.mark.btrfs

FICLONE = 0x40049409
PUNCH = ioctl.FALLOC_FL_PUNCH_HOLE | ioctl.FALLOC_FL_KEEP_SIZE
ZERO_RANGE = 0x10
PATIENCE_S = 10.0


class Disk:
    """A filesystem and the scanner that watches it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.path = guest.mountpoint
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self.scanner = PreallocScanner(self.fd)

    def begin(self) -> Unwritten:
        """Start the scanner; what the first look that knows finds."""
        self.scanner.start()
        return self.known()

    def known(self) -> Unwritten:
        """The first look that knows."""
        until(lambda: self.scanner.look(0, PATIENCE_S).known, pause_s=0.005)
        return self.scanner.look(0, PATIENCE_S)

    def size(self, balloon: int = 0) -> int:
        """What one look finds; it must know."""
        found = self.scanner.look(balloon, PATIENCE_S)
        assert found.known
        return found.size

    def allocate(self, name: str, size: int, mode: int = 0, offset: int = 0) -> Path:
        """fallocate(2) on a file that may be there."""
        path = self.path / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            ioctl.fallocate(fd, mode, offset, size)
        finally:
            os.close(fd)
        return path

    def close(self) -> None:
        """Let go of it."""
        self.scanner.close()
        os.close(self.fd)


def write(path: Path, offset: int, size: int) -> None:
    """Write, and wait until it is on the disk."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())


def clone(source: Path, target: Path) -> None:
    """Reflink a whole file."""
    with source.open("rb") as one, target.open("wb") as other:
        fcntl.ioctl(other.fileno(), FICLONE, one.fileno())


def subvolume(*words: str | Path) -> None:
    """`btrfs subvolume ...`"""
    run("btrfs", "-q", "subvolume", *words)


def tree_of(path: Path) -> int:
    """The id of the subvolume at `path`."""
    return int(run("btrfs", "inspect-internal", "rootid", path))


@pytest.fixture
def disk(make_guest: MakeGuest) -> Iterator[Disk]:
    made = Disk(make_guest(2 * GIB))
    yield made
    made.close()


# --- what counts ----------------------------------------------------------------------------------------------


def test_every_way_to_use_one_file(disk: Disk) -> None:
    assert disk.begin().size == 0
    file = disk.allocate("file", 8 * MIB)
    found = disk.scanner.look(0, PATIENCE_S)
    assert (found.size, found.known, found.files) == (8 * MIB, True, 1)
    write(file, MIB, MIB)
    assert disk.size() == 7 * MIB
    disk.allocate("file", MIB, PUNCH, 4 * MIB)
    assert disk.size() == 7 * MIB, "btrfs frees the extent only as a whole"
    disk.allocate("file", 2 * MIB, ZERO_RANGE, 0)
    assert disk.size() == 9 * MIB, "two more, in a new extent"
    os.truncate(file, 6 * MIB)
    assert disk.size() == 9 * MIB
    write(file, 0, 6 * MIB)
    assert disk.size() == 4 * MIB, "replaced, punched or cut off, in extents of which the rest is used"
    disk.allocate("file", 3 * MIB, ioctl.FALLOC_FL_KEEP_SIZE, 6 * MIB)
    assert disk.size() == 7 * MIB
    file.unlink()
    found = disk.scanner.look(0, PATIENCE_S)
    assert (found.size, found.files) == (0, 0)


def test_the_first_look_finds_what_incremental_looks_do(disk: Disk) -> None:
    disk.allocate("plain", 8 * MIB)
    write(disk.allocate("partly", 8 * MIB), 2 * MIB, MIB)
    write(disk.allocate("fully", 2 * MIB), 0, 2 * MIB)
    disk.allocate("beyond the end", 4 * MIB, ioctl.FALLOC_FL_KEEP_SIZE)
    disk.allocate("punched", 4 * MIB)
    disk.allocate("punched", MIB, PUNCH, MIB)
    (disk.path / "inline").write_bytes(b"\x02" * 500)
    assert disk.begin().size == (8 + 7 + 4 + 4) * MIB


def test_nodatacow_counts_too(disk: Disk) -> None:
    disk.begin()
    (disk.path / "folder").mkdir()
    run("chattr", "+C", disk.path / "folder")
    file = disk.allocate("folder/image", 8 * MIB)
    assert disk.size() == 8 * MIB
    write(file, 0, MIB)
    assert disk.size() == 7 * MIB


def test_a_file_that_is_unlinked_but_open_counts(disk: Disk) -> None:
    disk.begin()
    file = disk.allocate("file", 8 * MIB)
    with file.open("r+b"):
        file.unlink()
        assert disk.size() == 8 * MIB
        sync(disk.guest)
        assert disk.size() == 8 * MIB
    assert disk.size() == 0


def test_what_files_share_counts_once(disk: Disk) -> None:
    disk.begin()
    file = disk.allocate("file", 8 * MIB)
    clone(file, disk.path / "clone")
    assert disk.size() == 8 * MIB
    write(disk.path / "clone", 0, MIB)
    assert disk.size() == 8 * MIB
    file.unlink()
    assert disk.size() == 8 * MIB, "the first MiB is used as long as the rest of its extent is"


def test_what_was_punched_counts_as_long_as_its_extent_is_used(disk: Disk) -> None:
    disk.begin()
    file = disk.allocate("file", 128 * MIB)
    disk.allocate("file", 128 * MIB - 4 * KIB, PUNCH, 4 * KIB)
    sync(disk.guest)
    assert disk.size() == 128 * MIB
    file.unlink()
    assert disk.size() == 0


@pytest.mark.parametrize("how", ["punched", "truncated"])
def test_where_only_written_parts_are_left_the_rest_of_the_extent_still_counts(disk: Disk, how: str) -> None:
    disk.begin()
    file = disk.allocate("file", 64 * MIB)
    assert disk.size() == 64 * MIB
    write(file, 0, MIB)
    if how == "punched":
        disk.allocate("file", 63 * MIB, PUNCH, MIB)
    else:
        os.truncate(file, MIB)
    sync(disk.guest)
    assert disk.size() == 63 * MIB
    fill(disk.path / "other", MIB)
    assert disk.size() == 63 * MIB, "also by the next look"
    file.unlink()
    assert disk.size() == 0


def test_a_file_of_many_extents_that_is_written_to_its_end(disk: Disk) -> None:
    # More extents than one lookup brings, and none of them is unwritten in any changed leaf.
    count, step = 1500, 8 * KIB
    disk.begin()
    file = disk.path / "file"
    for index in range(count):
        disk.allocate("file", 4 * KIB, 0, index * step)
    sync(disk.guest)
    assert disk.size() == count * 4 * KIB
    with file.open("r+b") as opened:
        for index in range(count):
            os.pwrite(opened.fileno(), b"x" * 4096, index * step)
        os.fsync(opened.fileno())
    assert disk.size() == 0


def test_many_small_files(disk: Disk) -> None:
    count = 20_000
    disk.begin()
    (disk.path / "many").mkdir()
    for index in range(count):
        disk.allocate(f"many/{index}", 4 * KIB)
    found = disk.scanner.look(0, PATIENCE_S)
    assert (found.size, found.known, found.files) == (count * 4 * KIB, True, count)
    os.kill(disk.scanner.pid or 0, signal.SIGKILL)
    found = disk.known()
    assert (found.size, found.files) == (count * 4 * KIB, count)
    for index in range(0, count, 2):
        (disk.path / f"many/{index}").unlink()
    sync(disk.guest)  # nothing changes any more, and still all of them are looked up
    # More than are looked up at once: too much for a while, never too little.
    looks = [disk.size()]
    while looks[-1] > count * 2 * KIB and len(looks) < count // prealloc_worker.PROBES + 1:
        looks.append(disk.size())
    assert looks == sorted(looks, reverse=True)
    assert looks[-1] == count * 2 * KIB


# --- subvolumes -----------------------------------------------------------------------------------------------


def test_snapshots_count_once_and_keep_what_the_original_loses(disk: Disk) -> None:
    subvolume("create", disk.path / "source")
    file = disk.allocate("source/file", 8 * MIB)
    disk.begin()
    for index in range(10):
        subvolume("snapshot", disk.path / "source", disk.path / f"copy{index}")
    assert disk.size() == 8 * MIB
    file.unlink()
    assert disk.size() == 8 * MIB
    subvolume("delete", disk.path / "source")
    assert disk.size() == 8 * MIB
    for index in range(9):
        subvolume("delete", disk.path / f"copy{index}")
    assert disk.size() == 8 * MIB
    subvolume("delete", disk.path / "copy9")
    assert disk.size() == 0


@pytest.mark.parametrize("committed", [True, False])
def test_a_snapshot_and_the_deletion_of_its_original_between_two_looks(disk: Disk, committed: bool) -> None:
    subvolume("create", disk.path / "source")
    disk.allocate("source/old", 8 * MIB)
    sync(disk.guest)
    disk.begin()
    disk.allocate("source/new", 4 * MIB)
    if committed:
        sync(disk.guest)
    subvolume("snapshot", disk.path / "source", disk.path / "middle")
    disk.allocate("middle/newer", 2 * MIB)
    subvolume("snapshot", disk.path / "middle", disk.path / "copy")
    subvolume("delete", disk.path / "source")
    subvolume("delete", disk.path / "middle")
    if committed:
        sync(disk.guest)
    assert disk.known().size == 14 * MIB
    assert disk.size() == 14 * MIB


def test_a_snapshot_of_many_files_is_not_read_as_a_whole(disk: Disk) -> None:
    subvolume("create", disk.path / "source")
    for index in range(5000):
        (disk.path / f"source/{index}").touch()
    disk.allocate("source/file", 8 * MIB)
    sync(disk.guest)
    disk.begin()
    before = disk.scanner.look(0, PATIENCE_S).scanned
    subvolume("snapshot", disk.path / "source", disk.path / "copy")
    (disk.path / "source/file").unlink()
    after = disk.scanner.look(0, PATIENCE_S)
    assert (after.size, after.known) == (8 * MIB, True)
    assert after.scanned - before < 5000


def test_a_large_new_subvolume_without_a_known_source_is_read_in_the_background(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prealloc_worker, "INLINE_ITEMS", 1000)
    server = prealloc_worker.Server(Trees(disk.fd))
    server.read_all()
    until(lambda: server.answer(0).startswith(b"1 0 "), pause_s=0.005)
    subvolume("create", disk.path / "new")
    for index in range(1000):
        (disk.path / f"new/{index}").touch()
    disk.allocate("new/file", 8 * MIB)
    assert server.answer(0).startswith(b"0 ")
    until(lambda: server.answer(0).startswith(b"1 %d 1 " % (8 * MIB)), within_s=5, pause_s=0.005)


def test_the_balloon_does_not_count_and_its_snapshot_neither(disk: Disk) -> None:
    balloon = BtrfsBalloonFile(str(disk.path))
    try:
        disk.allocate("file", 8 * MIB)
        balloon.extend(64 * MIB)
        tree = tree_of(disk.path / SUBVOLUME)
        assert disk.begin().size == 72 * MIB
        found = disk.scanner.look(tree, PATIENCE_S)
        assert (found.size, found.files) == (8 * MIB, 1)
        subvolume("snapshot", disk.path / SUBVOLUME, disk.path / "copy")
        assert disk.size(tree) == 8 * MIB
        balloon.extend(32 * MIB)
        assert disk.size(tree) == 8 * MIB
        balloon.shrink(96 * MIB)
        assert disk.size(tree) == 72 * MIB  # only the snapshot holds it now
        subvolume("delete", disk.path / "copy")
        assert disk.size(tree) == 8 * MIB
        assert disk.size(0) == 8 * MIB
    finally:
        balloon.close()


def test_what_the_balloon_gave_back_counts_for_who_takes_it(disk: Disk) -> None:
    balloon = BtrfsBalloonFile(str(disk.path))
    try:
        balloon.extend(512 * MIB)
        tree = tree_of(disk.path / SUBVOLUME)
        disk.begin()
        assert disk.size(tree) == 0
        balloon.shrink(512 * MIB)
        sync(disk.guest)
        disk.allocate("file", 1536 * MIB)  # also where the balloon was
        assert disk.size(tree) == 1536 * MIB
    finally:
        balloon.close()


def test_any_subvolume_s_descriptor_does(make_guest: MakeGuest) -> None:
    guest = make_guest(GIB)
    subvolume("create", guest.mountpoint / "other")
    disk = Disk(guest)
    disk.allocate("file", 8 * MIB)
    fd = os.open(guest.mountpoint / "other", os.O_RDONLY)
    scanner = PreallocScanner(fd)
    try:
        until(lambda: scanner.look(0, PATIENCE_S).known, pause_s=0.005)
        assert scanner.look(0, PATIENCE_S).size == 8 * MIB
    finally:
        scanner.close()
        os.close(fd)
        disk.close()


# --- relocation -----------------------------------------------------------------------------------------------


def test_looks_during_a_balance_lose_nothing(disk: Disk) -> None:
    for index in range(60):
        disk.allocate(f"file{index}", 4 * MIB)
        write(disk.path / f"file{index}", MIB, 64 * KIB)
    subvolume("snapshot", disk.path, disk.path / "copy")
    scanner = Scanner(Trees(disk.fd))
    expected, _ = scanner.look(0)
    for _ in range(2):
        command = ["btrfs", "balance", "start", "--full-balance", str(disk.path)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as balance:
            while balance.poll() is None:
                assert scanner.look(0)[0] >= expected
        fresh = Scanner(Trees(disk.fd))
        assert fresh.look(0)[0] == expected
        scanner.look(0)
        assert _ranges(scanner) == _ranges(fresh)


def _ranges(scanner: Scanner) -> list[tuple[int, int]]:
    return union(unpack(piece for one in scanner.subvolumes.values() for piece in one.files.values()))


# --- the child ------------------------------------------------------------------------------------------------


def test_a_child_that_is_killed_starts_over(disk: Disk) -> None:
    disk.allocate("file", 8 * MIB)
    disk.begin()
    pid = disk.scanner.pid or 0
    os.kill(pid, signal.SIGKILL)
    until(lambda: not running(pid))
    assert not disk.scanner.look(0, 0).known
    assert disk.known().size == 8 * MIB
    assert disk.scanner.pid != pid


def test_a_stopped_child_is_not_waited_for_and_its_late_answer_not_taken(disk: Disk) -> None:
    disk.begin()
    pid = disk.scanner.pid or 0
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(20):  # more than the child may be behind with
            began = time.monotonic()
            assert not disk.scanner.look(0, 0.01).known
            assert time.monotonic() - began < 0.1
    finally:
        os.kill(pid, signal.SIGCONT)
    time.sleep(0.2)  # everything is answered, from before the file was there
    disk.allocate("file", 8 * MIB)
    assert disk.size() == 8 * MIB


def test_a_look_without_patience_answers_during_the_first_scan(disk: Disk) -> None:
    for index in range(3000):
        (disk.path / str(index)).touch()
    disk.scanner.start()
    began = time.monotonic()
    found = disk.scanner.look(0, 0)
    assert time.monotonic() - began < 0.1
    assert not found.known
    disk.known()


def test_the_first_scan_is_not_waited_for(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.allocate("file", 8 * MIB)
    go_on = threading.Event()
    read = Trees.read

    def slow(self: Trees, tree: int, *arguments: int, **options: bool) -> prealloc_worker.Files | None:
        found = read(self, tree, *arguments, **options)
        assert go_on.wait(5)
        return found

    monkeypatch.setattr(Trees, "read", slow)
    server = prealloc_worker.Server(Trees(disk.fd))
    server.read_all()
    try:
        until(lambda: server.answer(0).startswith(b"0 %d 1 " % (8 * MIB)), within_s=2, pause_s=0.005)
    finally:
        go_on.set()
    until(lambda: server.answer(0).startswith(b"1 %d 1 " % (8 * MIB)), within_s=5, pause_s=0.005)


def test_looks_from_several_threads(disk: Disk) -> None:
    disk.allocate("file", 8 * MIB)
    disk.begin()
    found: list[Unwritten] = []

    def look() -> None:
        found.extend(disk.scanner.look(0, PATIENCE_S) for _ in range(50))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert {(one.size, one.known) for one in found} == {(8 * MIB, True)}


def test_the_child_dies_with_its_parent_and_on_close(disk: Disk) -> None:
    # The scan has much to do, and end of input ends it at once.
    for index in range(3000):
        (disk.path / str(index)).touch()
    with subprocess.Popen(
        ["python3", "-I", "-S", prealloc_worker.__file__, str(disk.fd)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=(disk.fd,),
    ) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(5) == -signal.SIGKILL
    disk.begin()
    pid = disk.scanner.pid or 0
    disk.scanner.close()
    assert not running(pid)
    assert not disk.scanner.look(0, 0.1).known


def test_a_filesystem_that_cannot_be_searched_is_not_known(tmp_path: Path) -> None:
    fd = os.open("/proc", os.O_RDONLY)
    scanner = PreallocScanner(fd)
    try:
        scanner.start()
        for _ in range(20):
            assert not scanner.look(0, 1).known
            time.sleep(0.005)
        assert scanner.pid is not None
    finally:
        scanner.close()
        os.close(fd)


# --- anything at all ------------------------------------------------------------------------------------------


class Life:
    """Random changes to a filesystem with several subvolumes."""

    def __init__(self, disk: Disk, seed: int) -> None:
        self.disk = disk
        self.dice = random.Random(seed)
        self.places = [disk.path]
        self.made = 0

    def step(self) -> str:
        """One change; what it was."""
        action = self.dice.choice(
            [self.allocate] * 5 + [self.write] * 3 + [self.punch, self.zero, self.truncate] * 2
            + [self.unlink] * 3 + [self.rename, self.reflink, self.move] * 2 + [self.crowd, self.commit, self.drop]
            + [self.snapshot] * 2
        )  # fmt: skip
        action()
        return action.__name__

    def _file(self) -> Path | None:
        files = sorted(path for path in self.dice.choice(self.places).iterdir() if path.is_file())
        return self.dice.choice(files) if files else None

    def _new(self) -> Path:
        self.made += 1
        return self.dice.choice(self.places) / f"file{self.made}"

    def _range(self) -> tuple[int, int]:
        return self.dice.randrange(64) * 16 * KIB, self.dice.randrange(1, 32) * 16 * KIB

    def _fallocate(self, path: Path, mode: int) -> None:
        offset, size = self._range()
        self.disk.allocate(str(path.relative_to(self.disk.path)), size, mode, offset)

    def allocate(self) -> None:
        self._fallocate(self._file() if self.dice.random() < 0.3 and self._file() else self._new(), 0)  # type: ignore[arg-type]

    def _on_file(self, mode: int) -> None:
        if (path := self._file()) is not None:
            self._fallocate(path, mode)

    def punch(self) -> None:
        self._on_file(PUNCH)

    def zero(self) -> None:
        self._on_file(ZERO_RANGE)

    def write(self) -> None:
        if (path := self._file()) is not None:
            write(path, *self._range())

    def truncate(self) -> None:
        if (path := self._file()) is not None:
            os.truncate(path, self._range()[0])

    def unlink(self) -> None:
        if (path := self._file()) is not None:
            path.unlink()

    def rename(self) -> None:
        if (path := self._file()) is not None:
            path.rename(path.with_name(self._new().name))

    def reflink(self) -> None:
        if (path := self._file()) is not None:
            clone(path, self._new())

    def move(self) -> None:
        if (path := self._file()) is not None:
            clone(path, self._new())
            path.unlink()

    def crowd(self) -> None:
        for _ in range(150):
            self._new().touch()

    def commit(self) -> None:
        sync(self.disk.guest)

    def snapshot(self) -> None:
        if len(self.places) < 6:
            self.made += 1
            target = self.disk.path / f"sub{self.made}"
            subvolume("snapshot", self.dice.choice(self.places), target)
            # A snapshot shows those of the subvolumes in it as empty directories.
            self.places.append(target)

    def drop(self) -> None:
        if len(self.places) > 1:
            subvolume("delete", self.places.pop(self.dice.randrange(1, len(self.places))))


@pytest.mark.parametrize("seed", range(4))
def test_an_incremental_look_never_finds_less_than_a_full_one(disk: Disk, seed: int) -> None:
    life = Life(disk, seed)
    for _ in range(20):
        life.allocate()
    scanner = Scanner(Trees(disk.fd))
    scanner.look(0)
    did: list[str] = []
    for _ in range(60):
        did += [life.step() for _ in range(life.dice.randrange(1, 6))]
        found = scanner.look(0)[0]
        fresh = Scanner(Trees(disk.fd))
        full = fresh.look(0)[0]
        assert found >= full, did
        assert not outside_of(fresh, scanner), did
        if found > full:
            assert scanner.look(0)[0] == full, did


def outside_of(one: Scanner, other: Scanner) -> int:
    """Bytes that `one` has found and `other` has not."""
    return prealloc_worker.outside(_ranges(one), _ranges(other))
