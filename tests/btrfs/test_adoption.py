"""The balloon after restores and rollbacks: found wherever it lies, and nothing else is touched."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from lab.loop import fill, run
from storaged import check
from storaged.balloon.file import BtrfsBalloonFile
from storaged.btrfs import ioctl
from storaged.errors import FilesystemError
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.subvolumes import in_subvolume, open_balloon, roll_back, room_of, said, top_level
from tests.btrfs.support import SUBVOLUME, available, report_for

pytestmark = pytest.mark.btrfs
NEAR = 4 * MIB


# --- stubs ----------------------------------------------------------------------------------------------------


def test_a_rollback_leaves_a_stub_and_the_balloon_comes_back(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = in_subvolume(make_guest(GIB))
    fill(guest.mountpoint / "data", 50 * MIB)
    support.sync(guest)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS
    size = support.held(guest)
    daemon.stop()
    roll_back(guest)
    assert (guest.mountpoint / SUBVOLUME).stat().st_ino == 2
    again = make_daemon(guest)
    assert abs(support.held(guest) - size) <= NEAR
    assert any("@old" in note and "moved" in note for note in again.report().notes)
    assert abs(available(guest) - 200 * MIB) <= NEAR
    for limit in (100 * MIB, 500 * MIB):
        assert again.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
        assert abs(available(guest) - limit) <= NEAR
    assert again.stop() == 0
    with top_level(guest) as top:
        assert not (top / "@old" / SUBVOLUME).exists()


def _from_tar(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    for index in range(1, 4):
        (directory / f"{index:08}").touch(0o600)


@pytest.mark.parametrize("empty", [True, False])
def test_what_a_backup_restored_is_removed(empty: bool, make_guest: MakeGuest) -> None:
    guest = make_guest(GIB)
    if empty:
        (guest.mountpoint / SUBVOLUME).mkdir()
    else:
        _from_tar(guest.mountpoint / SUBVOLUME)
    with open_balloon(guest) as balloon:
        assert not (guest.mountpoint / SUBVOLUME).exists()
        assert SUBVOLUME in said(balloon, warning=False)
        balloon.extend(50 * MIB)
        assert (guest.mountpoint / SUBVOLUME).stat().st_ino == 256


def _with_contents(directory: Path) -> None:
    _from_tar(directory)
    (directory / "00000002").write_bytes(b"mine")


def _with_other_names(directory: Path) -> None:
    _from_tar(directory)
    (directory / "notes").touch()


def _of_another_user(directory: Path) -> None:
    _from_tar(directory)
    os.chown(directory / "00000002", 1000, 1000)


def _preallocated(directory: Path) -> None:
    directory.mkdir()
    (directory / "00000001").touch()
    run("fallocate", "--keep-size", "--length", "1M", directory / "00000001")


@pytest.mark.parametrize("make", [_with_contents, _with_other_names, _of_another_user, _preallocated])
def test_a_directory_that_only_looks_alike_stays(
    make: object, make_guest: MakeGuest, caplog: pytest.LogCaptureFixture
) -> None:
    guest = make_guest(GIB)
    make(guest.mountpoint / SUBVOLUME)  # type: ignore[operator]
    there = sorted(path.name for path in (guest.mountpoint / SUBVOLUME).iterdir())
    with open_balloon(guest) as balloon:
        assert "in the way" in said(balloon, warning=True)
        assert f"{SUBVOLUME}-1" in said(balloon, warning=True)
        balloon.extend(50 * MIB)
    assert sorted(path.name for path in (guest.mountpoint / SUBVOLUME).iterdir()) == there
    with open_balloon(guest) as balloon:
        assert balloon.size() == 50 * MIB, "found again under its other name"
        assert balloon.root_id
        balloon.remove()
        assert balloon.root_id == 0
    assert support.subvolumes(guest) == []


def test_what_is_only_looked_at_stays(make_guest: MakeGuest) -> None:
    guest = in_subvolume(make_guest(GIB))
    with open_balloon(guest) as balloon:
        balloon.extend(100 * MIB)
    roll_back(guest)
    lines = {line.topic: line for line in check.examine(str(guest.mountpoint))}
    assert lines["balloon"].verdict is check.Verdict.WARNING
    assert "@old" in lines["balloon"].reason
    assert (guest.mountpoint / SUBVOLUME).exists()
    with top_level(guest) as top:
        assert room_of(top / "@old" / SUBVOLUME) == 100 * MIB
    guest.unmount()


def test_what_is_mounted_there_stays(make_guest: MakeGuest) -> None:
    guest = make_guest(GIB)
    (guest.mountpoint / SUBVOLUME).mkdir()
    other = guest.image.parent / "ext4.img"
    other.touch()
    os.truncate(other, 64 * MIB)
    run("mkfs.ext4", "-q", other)
    run("mount", "-o", "loop", other, guest.mountpoint / SUBVOLUME)
    assert (guest.mountpoint / SUBVOLUME).stat().st_ino == 2
    with open_balloon(guest) as balloon:
        assert "in the way" in said(balloon, warning=True)
    run("umount", guest.mountpoint / SUBVOLUME)


# --- elsewhere ------------------------------------------------------------------------------------------------


def test_it_is_moved_here_from_another_subvolume(make_guest: MakeGuest) -> None:
    guest = in_subvolume(make_guest(GIB))
    with open_balloon(guest) as balloon:
        balloon.extend(100 * MIB)
        identity = balloon.root_id
    roll_back(guest, stub=False)
    with open_balloon(guest) as balloon:
        assert balloon.size() == 100 * MIB
        assert balloon.root_id == identity
        assert "@old" in said(balloon, warning=False)
        assert said(balloon, warning=True) == ""
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        assert mounts.count(f" {guest.device} ") == 1, "the private mount is in no table"
    guest.unmount()
    guest.check()


def test_it_is_moved_into_a_directory_that_is_mounted(make_guest: MakeGuest) -> None:
    guest = in_subvolume(make_guest(GIB))
    with open_balloon(guest) as balloon:
        balloon.extend(100 * MIB)
    (guest.mountpoint / "a" / "b").mkdir(parents=True)
    with contextlib.closing(BtrfsBalloonFile(str(guest.mountpoint / "a" / "b"))) as balloon:
        assert balloon.size() == 100 * MIB
    assert (guest.mountpoint / "a" / "b" / SUBVOLUME).stat().st_ino == 256


def test_of_two_the_one_at_the_mount_stays(make_guest: MakeGuest) -> None:
    guest = in_subvolume(make_guest(2 * GIB))
    before = available(guest)
    with open_balloon(guest) as balloon:
        balloon.extend(100 * MIB)
    with top_level(guest) as top:
        for name in (SUBVOLUME, f"{SUBVOLUME}-3"):
            run("btrfs", "-q", "subvolume", "create", top / name)
            (top / name / "00000001").touch()
            run("fallocate", "--keep-size", "--length", "300M", top / name / "00000001")
    with open_balloon(guest) as balloon:
        assert balloon.size() == 100 * MIB
        support.sync(guest)
        assert abs(before - 100 * MIB - available(guest)) <= NEAR
    assert sorted(support.subvolumes(guest)) == [SUBVOLUME, "@"]  # paths are relative to the mount


def test_where_its_parent_is_read_only_its_room_comes_back(make_guest: MakeGuest) -> None:
    guest = in_subvolume(make_guest(GIB))
    before = available(guest)
    with open_balloon(guest) as balloon:
        balloon.extend(100 * MIB)
    roll_back(guest, stub=False)
    with top_level(guest) as top:
        run("btrfs", "property", "set", "-ts", top / "@old", "ro", "true")
    for _ in range(2):
        with open_balloon(guest) as balloon:
            assert balloon.size() == 0
            support.sync(guest)
            assert abs(available(guest) - before) <= NEAR
            balloon.extend(50 * MIB)
            balloon.remove()
        support.sync(guest)


def test_snapshots_of_a_balloon_are_never_touched(make_guest: MakeGuest) -> None:
    guest = in_subvolume(make_guest(GIB))
    with open_balloon(guest) as balloon:
        balloon.extend(100 * MIB)
    with top_level(guest) as top:
        here = top / "@" / SUBVOLUME
        for name, *options in (("copy",), (f"{SUBVOLUME}-frozen",), (SUBVOLUME, "-r"), (f"{SUBVOLUME}-2",)):
            run("btrfs", "-q", "subvolume", "snapshot", *options, here, top / name)
    there = sorted(support.subvolumes(guest))
    with open_balloon(guest) as balloon:
        assert balloon.size() == 100 * MIB
        assert SUBVOLUME in said(balloon, warning=True)
    assert sorted(support.subvolumes(guest)) == there


def test_without_the_private_mount_it_says_what_it_cannot_reach(
    make_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storaged.btrfs import private_mount

    guest = in_subvolume(make_guest(GIB))

    def refused(fd: int) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(private_mount, "top_level", refused)
    with open_balloon(guest) as balloon:
        balloon.extend(100 * MIB)
        assert balloon.found == []
        with pytest.raises(FilesystemError, match="another storaged holds the balloon of"):
            BtrfsBalloonFile(str(guest.mountpoint))
    roll_back(guest, stub=False)
    with open_balloon(guest) as balloon:
        assert balloon.size() == 0
        assert "Operation not permitted" in said(balloon, warning=True)


def test_a_filesystem_that_is_mounted_read_only_stays_so(make_guest: MakeGuest) -> None:
    guest = make_guest(GIB)
    (guest.mountpoint / SUBVOLUME).mkdir()
    run("mount", "-o", "remount,ro", guest.mountpoint)
    with open_balloon(guest) as balloon:
        assert balloon.size() == 0
        assert support.read_only(guest)
        run("mount", "-o", "remount,rw", guest.mountpoint)
        balloon.extend(MIB)
        assert (guest.mountpoint / SUBVOLUME).stat().st_ino == 256


# --- giving back ------------------------------------------------------------------------------------------------


def test_what_a_whole_segment_gave_is_counted_once(make_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = make_guest(4 * GIB)
    fallocate = ioctl.fallocate

    def no_metadata(fd: int, mode: int, offset: int, length: int) -> None:
        if mode & ioctl.FALLOC_FL_PUNCH_HOLE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(fd, mode, offset, length)

    with open_balloon(guest) as balloon:
        for _ in range(4):
            balloon.extend(100 * MIB)
        support.sync(guest)
        first, *_, last = sorted(balloon.extents())
        assert first != last
        monkeypatch.setattr(ioctl, "fallocate", no_metadata)
        held = balloon.size()
        given = balloon.vacate([(address, 1) for address, _ in balloon.extents()[:-1]])
        assert given == held - balloon.size()
        assert given <= held
