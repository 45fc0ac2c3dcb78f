"""A guest that is mounted from a subvolume, rolled back as snapshot tools do it, and its balloon without a daemon."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lab.loop import Guest, run
from storaged.balloon.file import BtrfsBalloonFile
from tests.btrfs.support import SUBVOLUME


def in_subvolume(guest: Guest, name: str = "@") -> Guest:
    """The same guest, mounted with `subvol=@` as distributions do."""
    run("btrfs", "-q", "subvolume", "create", guest.mountpoint / name)
    guest.unmount()
    guest.mount_options = f"subvol={name}"
    guest.mount()
    return guest


@contextlib.contextmanager
def top_level(guest: Guest) -> Iterator[Path]:
    """The top-level subvolume, mounted beside it."""
    path = guest.image.parent / "top"
    path.mkdir(exist_ok=True)
    run("mount", "-o", "subvolid=5", guest.device, path)
    try:
        yield path
    finally:
        run("umount", path)


def roll_back(guest: Guest, *, stub: bool = True) -> None:
    """What snapshot tools do: the old root is moved away, a snapshot of it takes its place."""
    guest.unmount()
    with top_level(guest) as top:
        (top / "@").rename(top / "@old")
        run("btrfs", "-q", "subvolume", "snapshot", top / "@old", top / "@")
        if not stub:
            (top / "@" / SUBVOLUME).rmdir()
    guest.mount()


def room_of(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir()) if directory.exists() else 0


@contextlib.contextmanager
def open_balloon(guest: Guest) -> Iterator[BtrfsBalloonFile]:
    with contextlib.closing(BtrfsBalloonFile(str(guest.mountpoint))) as balloon:
        yield balloon


def said(balloon: BtrfsBalloonFile, *, warning: bool) -> str:
    return "\n".join(text for text, warns in balloon.found if warns is warning)
