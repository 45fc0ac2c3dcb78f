"""What the balloon is on disk: a subvolume of its own that outlives the daemon, and is never somebody else's file."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import SUBVOLUME, available, held, report_for

pytestmark = pytest.mark.btrfs
NEAR = 4 * MIB
SEGMENT = "00000001"  # as the balloon's own files are called


def _inflated(make_guest: MakeGuest, make_daemon: MakeDaemon) -> tuple[Guest, Daemon]:
    guest = make_guest(GIB)
    fill(guest.mountpoint / "data", 50 * MIB)
    support.sync(guest)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS
    return guest, daemon


def test_it_is_a_private_empty_file_in_a_subvolume_of_its_own(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, _ = _inflated(make_guest, make_daemon)
    assert support.subvolumes(guest) == [SUBVOLUME]
    directory = (guest.mountpoint / SUBVOLUME).stat()
    assert directory.st_ino == 256
    assert directory.st_mode & 0o777 == 0o700
    files = list((guest.mountpoint / SUBVOLUME).iterdir())
    assert files
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.stat().st_size == 0  # a backup reads nothing
    assert held(guest) > 400 * MIB


def test_a_snapshot_of_the_root_does_not_pin_it(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, daemon = _inflated(make_guest, make_daemon)
    before = available(guest) + held(guest)
    run("btrfs", "-q", "subvolume", "snapshot", guest.mountpoint, guest.mountpoint / "copy")
    run("btrfs", "-q", "subvolume", "snapshot", "-r", guest.mountpoint, guest.mountpoint / "frozen")
    assert daemon.report_free(100 * GIB) == vm_guest_pb2.SUCCESS
    assert held(guest) == 0
    assert available(guest) >= before - NEAR
    assert not list((guest.mountpoint / "copy" / SUBVOLUME).iterdir())


def test_protection_outlives_the_daemon_and_a_reboot(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, daemon = _inflated(make_guest, make_daemon)
    shown, size = available(guest), held(guest)
    daemon.kill()
    assert abs(available(guest) - shown) <= NEAR
    assert held(guest) == size
    guest.unmount()
    guest.detach()
    guest.attach()
    guest.mount()
    assert abs(available(guest) - shown) <= NEAR
    written, error = fill(guest.mountpoint / "probe")
    assert written <= 200 * MIB + GIB // 10
    assert error
    (guest.mountpoint / "probe").unlink()
    support.sync(guest)

    again = make_daemon(guest)
    assert again.report().balloon.limit_bytes == 200 * MIB
    assert abs(again.report().balloon.size_bytes - size) <= NEAR
    assert any("found the balloon again" in note for note in again.report().notes)
    assert abs(available(guest) - shown) <= NEAR
    assert again.report_free(100 * GIB) == vm_guest_pb2.SUCCESS
    assert held(guest) == 0


def test_a_balloon_without_its_journal_is_held_on_to(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, daemon = _inflated(make_guest, make_daemon)
    shown = available(guest)
    daemon.kill()
    again = make_daemon(guest, state="elsewhere")
    assert abs(available(guest) - shown) <= NEAR
    assert any("without a record of its limit" in note for note in again.report().notes)


def test_a_daemon_that_stops_leaves_the_protection(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, daemon = _inflated(make_guest, make_daemon)
    shown = available(guest)
    assert daemon.stop() == 0
    assert abs(available(guest) - shown) <= NEAR
    guest.unmount()  # nobody holds the filesystem
    guest.mount()


def _command(name: str, guest: Guest, state: Path) -> subprocess.CompletedProcess[str]:
    """`storaged NAME` on the guest's filesystem."""
    return subprocess.run(
        [*(sys.executable, "-m", "storaged", name), *("--stateful", guest.mountpoint, "--state-dir", state)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("way", ["release", "uninstall", "serve --release"])
def test_everything_is_given_back(way: str, make_guest: MakeGuest, make_daemon: MakeDaemon, place: Path) -> None:
    guest = make_guest(GIB)
    fill(guest.mountpoint / "data", 50 * MIB)
    support.sync(guest)
    make_daemon(guest).stop()  # whatever a first start changes for good
    before = available(guest)
    daemon = make_daemon(guest, *(["--release"] if way == "serve --release" else []))
    assert daemon.report_free(report_for(100 * MIB)) == vm_guest_pb2.SUCCESS
    state = daemon.socket.parent / "state"
    assert list(state.glob("*/journal.json"))
    assert daemon.stop() == 0
    if way != "serve --release":
        assert held(guest) > 0
        done = _command(way, guest, state)
        assert done.returncode == 0, done.stderr
        assert "given back" in done.stdout
        assert not list(state.glob("*"))
    assert support.subvolumes(guest) == []
    assert not (guest.mountpoint / SUBVOLUME).exists()
    assert abs(available(guest) - before) <= NEAR
    guest.unmount()
    guest.check()


def test_uninstall_is_refused_while_a_daemon_runs(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, daemon = _inflated(make_guest, make_daemon)
    size = held(guest)
    done = _command("uninstall", guest, daemon.socket.parent / "state")
    assert done.returncode == 1
    assert "another storaged holds the balloon" in done.stderr
    assert "Traceback" not in done.stderr
    assert held(guest) == size


def _plain_directory(guest: Guest, victim: Path) -> None:
    (guest.mountpoint / SUBVOLUME).mkdir()
    (guest.mountpoint / SUBVOLUME / SEGMENT).write_bytes(b"mine" * 1000)


def _link_to_directory(guest: Guest, victim: Path) -> None:
    (guest.mountpoint / SUBVOLUME).symlink_to(victim)


def _file(guest: Guest, victim: Path) -> None:
    (guest.mountpoint / SUBVOLUME).write_bytes(b"mine" * 1000)


def _link_inside(guest: Guest, victim: Path) -> None:
    run("btrfs", "-q", "subvolume", "create", guest.mountpoint / SUBVOLUME)
    (guest.mountpoint / SUBVOLUME / SEGMENT).symlink_to(victim / SEGMENT)


def _hard_link_inside(guest: Guest, victim: Path) -> None:
    run("btrfs", "-q", "subvolume", "create", guest.mountpoint / SUBVOLUME)
    (guest.mountpoint / SUBVOLUME / "other").write_bytes(b"mine" * 1000)
    os.link(guest.mountpoint / SUBVOLUME / "other", guest.mountpoint / SUBVOLUME / SEGMENT)


def _directory_inside(guest: Guest, victim: Path) -> None:
    run("btrfs", "-q", "subvolume", "create", guest.mountpoint / SUBVOLUME)
    (guest.mountpoint / SUBVOLUME / SEGMENT).mkdir()


def _file_with_contents_inside(guest: Guest, victim: Path) -> None:
    run("btrfs", "-q", "subvolume", "create", guest.mountpoint / SUBVOLUME)
    (guest.mountpoint / SUBVOLUME / SEGMENT).write_bytes(b"mine" * 100_000)


def _of_another_user(guest: Guest, victim: Path) -> None:
    run("btrfs", "-q", "subvolume", "create", guest.mountpoint / SUBVOLUME)
    os.chown(guest.mountpoint / SUBVOLUME, 1000, 1000)
    (guest.mountpoint / SUBVOLUME / SEGMENT).write_bytes(b"mine" * 1000)


Squat = Callable[[Guest, Path], None]
FOREIGN: list[Squat] = [
    _plain_directory,
    _link_to_directory,
    _file,
    _link_inside,
    _hard_link_inside,
    _directory_inside,
    _file_with_contents_inside,
    _of_another_user,
]


def _victim(guest: Guest) -> Path:
    """What a link could lead to."""
    victim = guest.mountpoint / "victim"
    victim.mkdir()
    (victim / SEGMENT).write_bytes(b"precious" * 1000)
    return victim


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_is_not_its_own_is_never_touched_and_another_name_taken(
    foreign: Squat, make_guest: MakeGuest, make_daemon: MakeDaemon
) -> None:
    guest = make_guest(GIB)
    foreign(guest, _victim(guest))
    there = _everything(guest)
    daemon = make_daemon(guest)
    assert any("in the way of the balloon" in note for note in daemon.report().notes)
    assert "WARNING" in daemon.log.read_text(encoding="utf-8")
    assert daemon.report_free(report_for(200 * MIB)) == vm_guest_pb2.SUCCESS
    assert abs(available(guest) - 200 * MIB) <= NEAR
    size = daemon.report().balloon.size_bytes
    assert daemon.stop() == 0
    again = make_daemon(guest)
    assert again.report().balloon.size_bytes == size, "found again under its other name"
    assert _everything(guest, besides=f"{SUBVOLUME}-1") == there


def test_what_is_not_its_own_is_never_followed(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(GIB)
    victim = _victim(guest)
    daemon = make_daemon(guest)
    for foreign in FOREIGN:
        foreign(guest, victim)
        there = _everything(guest)
        assert daemon.report_free(report_for(100 * MIB)) == vm_guest_pb2.SUCCESS, foreign
        assert _everything(guest, besides=f"{SUBVOLUME}-1") == there
        other = guest.mountpoint / f"{SUBVOLUME}-1"
        assert daemon.report_free(100 * GIB) == vm_guest_pb2.SUCCESS
        run("btrfs", "-q", "subvolume", "delete", other)
        squatter = guest.mountpoint / SUBVOLUME
        if squatter.is_symlink() or squatter.is_file():
            squatter.unlink()
        elif squatter.stat().st_ino == 256:
            run("btrfs", "-q", "subvolume", "delete", squatter)
        else:
            shutil.rmtree(squatter)
    assert daemon.report_free(report_for(100 * MIB)) == vm_guest_pb2.SUCCESS


def _everything(guest: Guest, besides: str = "") -> dict[str, tuple[int, int, int]]:
    """Type, size and bytes held of every name. Of the subvolume's permissions a test of its own speaks."""
    found = {}
    for path in sorted(guest.mountpoint.rglob("*")):
        if besides in path.parts:
            continue
        seen = path.lstat()
        mode = stat.S_IFMT(seen.st_mode) if path.name == SUBVOLUME else seen.st_mode
        found[str(path.relative_to(guest.mountpoint))] = (mode, seen.st_size, seen.st_blocks)
    return found


def test_a_balloon_deleted_by_hand_is_made_again(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest, daemon = _inflated(make_guest, make_daemon)
    for name in list((guest.mountpoint / SUBVOLUME).iterdir()):
        name.unlink()
    run("btrfs", "-q", "subvolume", "delete", "-c", guest.mountpoint / SUBVOLUME)
    support.sync(guest)
    daemon.report_free(report_for(200 * MIB))
    support.until(lambda: abs(available(guest) - 200 * MIB) <= NEAR, within_s=10)
    assert support.subvolumes(guest) == [SUBVOLUME]
    assert daemon.report_free(100 * GIB) == vm_guest_pb2.SUCCESS
    assert held(guest) == 0
