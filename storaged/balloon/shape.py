"""What lies under a name of the balloon's: a balloon, what a restore left of one, or something else."""

from __future__ import annotations

import enum
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from storaged.btrfs import subvolumes

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Shape(enum.Enum):
    """What it is."""

    ABSENT = "nothing"
    BALLOON = "a balloon"
    STUB = "what a restore left"  # nothing is in it
    FOREIGN = "something else"  # never touched


@dataclass(frozen=True, slots=True)
class Found:
    """What lies under a name; `why` for what is in the way. `held` and `root_id` of a balloon."""

    shape: Shape
    why: str = ""
    held: int = 0
    root_id: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the balloon."""

    name: str
    inode: int
    held: int


class NotOurs(Exception):
    """An entry of a directory is not a segment."""


def segments(directory: int) -> list[Segment]:
    """The segments in a balloon's directory, oldest first. Raises NotOurs for anything else in it, and OSError.

    A segment is numbered, belongs to us, and is empty to whoever reads it.
    """
    # Opened anew for every look: btrfs shows a descriptor the directory as it was when it was opened, and threads
    # that read through one descriptor share its place.
    fresh = os.open(".", DIRECTORY, dir_fd=directory)
    try:
        with os.scandir(fresh) as entries:
            return sorted(_segments(entries), key=lambda segment: segment.name)
    finally:
        os.close(fresh)


def _segments(entries: Iterator[os.DirEntry[str]]) -> Iterator[Segment]:
    user = os.geteuid()
    for entry in entries:
        name = entry.name
        if not (name.isascii() and name.isdigit()):
            raise NotOurs(f"{name!r} is not the balloon's")
        seen = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(seen.st_mode) or seen.st_size or seen.st_uid != user:
            raise NotOurs(f"{name!r} is not the balloon's")
        yield Segment(name, seen.st_ino, seen.st_blocks * 512)


def look(parent: int, name: str) -> Found:
    """What `name` in the directory `parent` is. Raises OSError only when that cannot be found out."""
    try:
        fd = os.open(name, DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return Found(Shape.ABSENT)
    except OSError:
        kind = stat.S_IFMT(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
        return Found(Shape.FOREIGN, {stat.S_IFLNK: "it is a symbolic link"}.get(kind, "it is not a directory"))
    try:
        return judge(fd, parent)
    finally:
        os.close(fd)


def judge(fd: int, parent: int) -> Found:
    """What the open directory in the open directory `parent` is. Raises OSError."""
    seen = os.fstat(fd)
    # A placeholder's st_dev is none of a subvolume's, but its f_fsid is its subvolume's: else something is mounted.
    if seen.st_ino == subvolumes.EMPTY_INODE and os.fstatvfs(fd).f_fsid == os.fstatvfs(parent).f_fsid:
        return Found(Shape.STUB, "the placeholder of a nested subvolume in a snapshot")
    inside = seen.st_dev == os.fstat(parent).st_dev
    if seen.st_uid != os.geteuid():
        return Found(Shape.FOREIGN, f"it belongs to user {seen.st_uid}")
    if not inside and not subvolumes.is_root(fd):
        return Found(Shape.FOREIGN, "another filesystem is mounted there")
    try:
        parts = segments(fd)
    except NotOurs as error:
        return Found(Shape.FOREIGN, str(error))
    held = sum(part.held for part in parts)
    if not inside:
        return Found(Shape.BALLOON, held=held, root_id=subvolumes.root_id(fd))
    if held:
        return Found(Shape.FOREIGN, "it is a directory whose files hold room, and not a subvolume")
    return Found(Shape.STUB, "a directory with empty files" if parts else "an empty directory")


def remove_stub(parent: int, name: str) -> None:
    """Remove what `look` called a stub. Raises OSError, also when it has been filled since."""
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        if os.fstat(fd).st_ino != subvolumes.EMPTY_INODE:
            for part in segments(fd):
                os.unlink(part.name, dir_fd=fd)
    except NotOurs as error:
        raise FileExistsError(errno.EEXIST, str(error)) from error
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def drop(directory: int, name: str) -> None:
    """Remove a segment; its room is free after the next commit. Raises OSError, FileNotFoundError when it is gone.

    Truncated first: that reports an error, where the room of a file that is only unlinked could stay with an orphan
    until the next mount. The unlink draws on the kernel's global reserve, and works where the other finds no room.
    """
    truncated = True
    fd = os.open(name, FILE, dir_fd=directory)
    try:
        os.ftruncate(fd, 0)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        truncated = False
    finally:
        os.close(fd)
    try:
        os.unlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.ENOSPC or not truncated:
            raise


def empty(directory: int) -> None:
    """Drop every segment of a balloon. Raises OSError and NotOurs."""
    for part in segments(directory):
        drop(directory, part.name)
