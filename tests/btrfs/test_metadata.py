"""The largest balloon leaves metadata enough: files can be made, deleted, and room comes back at once."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from lab.loop import Guest
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import Figures, held, report_for

pytestmark = pytest.mark.btrfs
MOST_FILES = 100_000


def _make(path: Path, kind: str) -> None:
    if kind == "empty":
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    elif kind == "small":
        path.write_bytes(b"x" * 1900)  # lies inside the metadata
    else:
        path.symlink_to("t" * 3000)


def _make_many(
    folder: Path, kind: str, within_s: float, most: int = MOST_FILES, rate: float | None = None
) -> tuple[int, int]:
    """(how many were made, errno that ended it or 0); at most `rate` of them a second."""
    folder.mkdir()
    began = time.monotonic()
    until = began + within_s
    made = 0
    try:
        while made < most and time.monotonic() < until:
            _make(folder / f"{made:06}", kind)
            made += 1
            if rate and made % 100 == 0:
                time.sleep(max(began + made / rate - time.monotonic(), 0))
    except OSError as error:
        return made, error.errno or -1
    return made, 0


def _usable_again(guest: Guest) -> float:
    """Seconds until 200 files with data can be made."""
    folder = guest.mountpoint / "after"

    def works() -> bool:
        try:
            folder.mkdir(exist_ok=True)
            for index in range(200):
                (folder / str(index)).write_bytes(os.urandom(5000))
            support.sync(guest)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        return True

    return support.until(works, within_s=60)


@pytest.mark.parametrize(
    ("size", "profile", "kind", "within_s"),
    [
        (512 * MIB, "dup", "small", 3.0),
        (512 * MIB, "single", "symlink", 6.0),
        (512 * MIB, "single", "empty", 3.0),
        (4 * GIB, "dup", "symlink", 5.0),
        (4 * GIB, "single", "small", 3.0),
        *(
            pytest.param(size, profile, kind, 60.0, marks=[pytest.mark.slow, pytest.mark.timeout(300)])
            for size in (512 * MIB, 4 * GIB)
            for profile in ("dup", "single")
            for kind in ("small", "symlink", "empty")
        ),
    ],
)
def test_metadata_is_never_starved(
    size: int,
    profile: str,
    kind: str,
    within_s: float,
    make_guest: MakeGuest,
    make_daemon: MakeDaemon,
    figures: Figures,
) -> None:
    guest = make_guest(size, mkfs=("-m", profile))
    daemon = make_daemon(guest)
    # A file with contents needs room for a page until it is written, wherever it then lies.
    free = report_for(16 * MIB) if kind == "small" else 0
    assert daemon.report_free(free, vm_guest_pb2.DISK_CRITICAL) == vm_guest_pb2.SUCCESS, daemon.report().balloon
    at_largest = daemon.report()

    made, error = _make_many(guest.mountpoint / "many", kind, within_s)

    assert error in (0, errno.ENOSPC)
    assert not support.read_only(guest)
    assert made >= 1000  # the guest lives on under the largest balloon
    starved = daemon.report().filesystem
    support.sync(guest)
    began = time.monotonic()
    for path in sorted((guest.mountpoint / "many").iterdir())[: min(made, 2000)]:
        path.unlink()
    support.sync(guest)
    deleting = time.monotonic() - began
    assert not support.read_only(guest)

    began = time.monotonic()
    assert daemon.report_free(100 * GIB) == vm_guest_pb2.SUCCESS
    deflating = time.monotonic() - began
    assert held(guest) == 0
    usable = _usable_again(guest)
    figures.note(
        size=size,
        profile=profile,
        kind=kind,
        headroom_before=at_largest.filesystem.metadata_headroom_bytes,
        unallocated_before=at_largest.filesystem.unallocated_bytes,
        made=made,
        errno=error,
        headroom_then=starved.metadata_headroom_bytes,
        deleting_s=round(deleting, 2),
        deflating_s=round(deflating, 2),
        usable_after_s=round(usable, 2),
    )
    assert not support.read_only(guest)
    assert usable < 10


@pytest.mark.parametrize("profile", ["single", "dup"])
def test_room_stays_for_the_next_metadata_chunk(
    profile: str, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    # A filesystem whose metadata chunks are nearly full when its host runs out of space.
    guest = make_guest(512 * MIB, mkfs=("-m", profile))
    filesystem = BtrfsFilesystem(str(guest.mountpoint))
    made = 0
    while True:
        space = filesystem.space()
        if made and 6 * MIB < space.metadata_headroom < 7 * MIB and space.metadata_total > 40 * MIB:
            break
        made += _make_many(guest.mountpoint / f"before{made}", "symlink", 60, most=200)[0]
        support.sync(guest)
        assert made < 40_000
    daemon = make_daemon(guest)
    for _ in range(2):  # what is said again takes no more
        assert daemon.report_free(0, vm_guest_pb2.DISK_CRITICAL) == vm_guest_pb2.SUCCESS, daemon.report().balloon
    kept = filesystem.space().unallocated
    filesystem.close()
    assert kept >= 16 * MIB, kept  # at once: the guard may come too late
    more, error = _make_many(guest.mountpoint / "more", "symlink", 5, most=5000, rate=2000)
    figures.note(profile=profile, made=made, unallocated_kept=kept, more=more, errno=error)
    assert not support.read_only(guest)
    assert more >= 1500, (more, error, kept)  # a fifth of that without


@pytest.mark.parametrize("rate", [2500, None])
def test_metadata_is_relieved_while_the_host_still_has_its_reserve(
    rate: float | None, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest = make_guest(512 * MIB, mkfs=("-m", "single"))
    daemon = make_daemon(guest)
    assert daemon.report_free(GIB) == vm_guest_pb2.SUCCESS  # nothing for the guest, all of the reserve still there
    made, error = _make_many(guest.mountpoint / "many", "symlink", 10, most=20_000, rate=rate)
    relief = daemon.report().balloon.metadata_relief_bytes
    figures.note(rate=rate, relief=relief, made=made, errno=error)
    assert not support.read_only(guest)
    assert relief <= 256 * MIB
    if rate:  # the guard may lose against a storm, but not against this
        assert not error
        assert relief
    assert daemon.report_free(100 * GIB) == vm_guest_pb2.SUCCESS
    assert _usable_again(guest) < 10
