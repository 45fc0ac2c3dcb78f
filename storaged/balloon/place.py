"""The directory that the balloon lies in, for one process at a time: locked, cleared of stubs, the balloon found.

A rollback, a restore or another `subvol=` option takes the balloon out of sight, but not off the disk. So it is looked
for on the whole filesystem, and moved here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from storaged.balloon import shape
from storaged.balloon.shape import Found, Shape
from storaged.btrfs import ioctl, private_mount, subvolumes
from storaged.btrfs.filesystem import kernel
from storaged.errors import FilesystemError, Kind
from storaged.units import format_size

log = logging.getLogger(__name__)

NAME = ".storaged-balloon"
OURS = re.compile(re.escape(NAME) + r"(-[1-9][0-9]{0,8})?")
NAMES = (NAME, *(f"{NAME}-{number}" for number in range(1, 16)))


@dataclass(frozen=True, slots=True)
class _Stray:
    """A balloon in another directory: `parent` is open, `path` is for people."""

    parent: int
    name: str
    path: str
    found: Found


class Place:
    """The directory at `mountpoint`. With `look_only` nothing is changed, and `found` says what would be."""

    def __init__(self, mountpoint: str, *, look_only: bool = False) -> None:
        self.mountpoint = mountpoint
        self.found: list[tuple[str, bool]] = []
        """What was noticed, and whether it is a warning."""
        self._look_only = look_only
        self._settled = False
        self._top = -1
        self.root = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._why_no_top = self._reach_top()
            self._lock()
            with kernel("looking for the balloon"):
                self._gather()
            self._settled = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the filesystem."""
        for fd in (self.root, self._top):
            if fd >= 0:
                os.close(fd)
        self.root = self._top = -1

    def _reach_top(self) -> str:
        try:
            self._top = private_mount.top_level(self.root)
        except OSError as error:
            log.debug("no private mount of %s: %s", self.mountpoint, error)
            return error.strerror or str(error)
        return ""

    def _lock(self) -> None:
        """Be the only one on the filesystem: its top-level directory is the same however it is mounted.

        Also on the directory itself, which is all that a process without a private mount can lock.
        """
        same = self._top >= 0 and os.path.samestat(os.fstat(self._top), os.fstat(self.root))
        for fd in (self._top, -1 if same else self.root):
            if fd < 0:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FilesystemError(
                    f"another storaged holds the balloon of {self.mountpoint}", errno.EBUSY, Kind.BUSY
                ) from error

    def _note(self, text: str, *, warning: bool = False) -> None:
        if (text, warning) in self.found:
            return
        self.found.append((text, warning))
        if self._settled:  # what was found before that, whoever starts the engine notes
            log.log(logging.WARNING if warning else logging.INFO, "%s", text)

    # --- here ---

    def balloons(self, more: tuple[str, ...] = ()) -> list[tuple[str, Found]]:
        """The balloons in this directory; stubs are removed on the way. Raises OSError."""
        balloons, blocked = [], []
        for name in dict.fromkeys((*NAMES, *more)):
            found = shape.look(self.root, name)
            if found.shape is Shape.BALLOON:
                balloons.append((name, found))
            elif found.shape is Shape.FOREIGN:
                blocked.append((name, found.why))
            elif found.shape is Shape.STUB and (failed := self._clear(name, found)):
                blocked.append((name, failed))
        if blocked:
            taken = balloons[0][0] if balloons else self._first_free() or "nothing"
            for name, why in blocked:
                text = f"{self.mountpoint}/{name} is in the way of the balloon: {why}; the balloon is {taken}"
                self._note(text, warning=True)
        return balloons

    def _clear(self, name: str, found: Found) -> str:
        """Remove a stub; why not, if it stays."""
        what = f"{self.mountpoint}/{name} is {found.why}"
        if self._look_only:
            self._note(f"{what}; `storaged serve` removes it")
            return ""
        try:
            shape.remove_stub(self.root, name)
        except OSError as error:
            return f"it is {found.why} and cannot be removed: {error.strerror}"
        self._note(f"{what}: removed")
        return ""

    def _first_free(self) -> str:
        for name in NAMES:
            found = shape.look(self.root, name)
            if found.shape is Shape.ABSENT or (self._look_only and found.shape is Shape.STUB):
                return name
        return ""

    def free_name(self) -> str:
        """A name for a new balloon. Raises OSError, and FilesystemError when all are taken."""
        name = self._first_free()
        if not name:
            path = f"{self.mountpoint}/{NAME}"
            text = f"{path} and {len(NAMES) - 1} other names are in the way of the balloon: remove one"
            raise FilesystemError(text, errno.EEXIST, Kind.PRECONDITION)
        return name

    # --- elsewhere ---

    def _gather(self) -> None:
        """Leave one balloon on the filesystem, and that one here."""
        own = (subvolumes.root_id(self.root), os.fstat(self.root).st_ino)
        entries = list(subvolumes.named(self.root, OURS))
        here = self.balloons(tuple(e.name for e in entries if (e.parent, e.directory) == own))
        elsewhere = [e for e in entries if (e.parent, e.directory) != own]
        if self._top < 0:
            for entry in elsewhere:
                text = f"{entry.name} in subvolume {entry.parent} may be a balloon and cannot be reached"
                self._note(f"{text}: no private mount: {self._why_no_top}", warning=True)
            elsewhere = []
        with contextlib.ExitStack() as opened:
            strays = list(self._strays(elsewhere, opened))
            strays.sort(key=lambda stray: stray.found.held, reverse=True)
            if self._look_only:
                for stray in strays:
                    text = f"a balloon of {format_size(stray.found.held)} lies in {stray.path}"
                    self._note(f"{text}; `storaged serve` moves or removes it", warning=True)
                return
            if not here and strays and strays[0].found.held and self._adopt(strays[0], own):
                del strays[0]
            for name, found in here[1:]:
                self._remove(_Stray(self.root, name, f"{self.mountpoint}/{name}", found))
            for stray in strays:
                self._remove(stray)

    def _strays(self, entries: list[subvolumes.Entry], opened: contextlib.ExitStack) -> Iterator[_Stray]:
        """Those of the entries that are balloons, with their parents open."""
        for entry in entries:
            path = entry.name
            try:
                where = subvolumes.path(self._top, entry.parent, entry.directory)
                path = f"{where}/{entry.name}".lstrip("/")
                parent = subvolumes.walk(self._top, where)
                opened.callback(os.close, parent)
                found = _judge(parent, entry)
            except FileNotFoundError:
                continue  # deleted or moved meanwhile
            except OSError as error:
                self._note(f"{path} may be a balloon and cannot be looked at: {error.strerror}", warning=True)
                continue
            if found.shape is Shape.BALLOON:
                yield _Stray(parent, entry.name, path, found)
            elif found.shape is Shape.FOREIGN:
                self._note(f"{path} is called like a balloon and is left alone: {found.why}", warning=True)

    def _adopt(self, stray: _Stray, own: tuple[int, int]) -> bool:
        """Move a balloon here; false when that cannot be."""
        try:
            directory = subvolumes.walk(self._top, subvolumes.path(self._top, *own))
            try:
                if not os.path.samestat(os.fstat(directory), os.fstat(self.root)):
                    raise OSError(errno.ESTALE, "the mounted directory was moved meanwhile")
                name = self.free_name()
                os.rename(stray.name, name, src_dir_fd=stray.parent, dst_dir_fd=directory)
            finally:
                os.close(directory)
        except (OSError, FilesystemError) as error:
            log.debug("%s cannot be moved: %s", stray.path, error)
            return False
        held = format_size(stray.found.held)
        self._note(f"balloon of {held} found in {stray.path} and moved to {self.mountpoint}/{name}")
        return True

    def _remove(self, stray: _Stray) -> None:
        """Give the room of another balloon back; where its parent is read-only, an empty subvolume stays."""
        held = format_size(stray.found.held)
        try:
            directory = os.open(stray.name, shape.DIRECTORY, dir_fd=stray.parent)
            try:
                if subvolumes.root_id(directory) != stray.found.root_id:
                    return
                shape.empty(directory)
            finally:
                os.close(directory)
        except (OSError, shape.NotOurs) as error:
            self._note(f"a second balloon in {stray.path} keeps {held}: {error}", warning=True)
            return
        try:
            ioctl.delete_subvolume(stray.parent, stray.found.root_id)
        except OSError as error:
            log.debug("%s stays: %s", stray.path, error)
        if stray.found.held:
            self._note(f"a second balloon in {stray.path} was removed: {held} given back")


def _judge(parent: int, entry: subvolumes.Entry) -> Found:
    """What a directory entry of the root tree's is. Raises OSError."""
    fd = os.open(entry.name, shape.DIRECTORY, dir_fd=parent)
    try:
        if subvolumes.root_id(fd) != entry.root_id:
            return Found(Shape.ABSENT)
        found = shape.judge(fd, parent)
        if found.shape is Shape.BALLOON and subvolumes.protected(fd):
            return Found(Shape.FOREIGN, f"it is a snapshot or read-only, and keeps {format_size(found.held)}")
        return found
    finally:
        os.close(fd)
