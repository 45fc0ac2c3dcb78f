"""Whether the pool is still the filesystem, and each image still the file, that is being shared.

While it is not, nothing may grow: what is free there now is not what guests were promised. `judge` is pure; reading
(`look`) blocks and belongs into the pool's thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from storaged.host.identity import FileId, device_name, file_id
from storaged.host.watch import PoolError

log = logging.getLogger(__name__)

READ_ONLY = {"ro": "read-only", "emergency_ro": "read-only after an error", "shutdown": "shut down"}
"""Options of a superblock in /proc/self/mountinfo (ext4: the last two, `emergency_ro` from Linux 6.15 on)."""
HANDLE_EVERY = 4
"""Looks after which an image's handle is compared, beside its device and inode, which always are."""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """What tells a mounted filesystem: its device, f_fsid of statvfs(3), and its superblock's options."""

    device: int
    fsid: int
    options: frozenset[str] = frozenset()

    def is_another(self, other: Filesystem) -> bool:
        """Whether these are two filesystems. btrfs and tmpfs (major number 0) get another device at every mount."""
        if self.fsid != other.fsid:
            return True
        stands = os.major(self.device) or not self.fsid
        return bool(stands) and self.device != other.device


@dataclass(frozen=True, slots=True)
class Condition:
    """What is wrong, in words; empty when nothing is. `guests`: with their images, by name."""

    pool: str = ""
    guests: Mapping[str, str] = field(default_factory=dict)

    def reason(self, guest: str) -> str:
        """Why this guest's image must be left alone; empty when it need not."""
        return self.pool or self.guests.get(guest, "")


def judge_pool(path: str, was: Filesystem, now: Filesystem | None) -> str:
    """What is wrong with the pool at `path`; `now` is None when the path is gone."""
    if now is None:
        return f"pool {path} is gone: mount it again"
    if now.is_another(was):
        return (
            f"pool {path} is another filesystem (device {device_name(now.device)}, was {device_name(was.device)}): "
            "it was unmounted or replaced"
        )
    for option, said in READ_ONLY.items():
        if option in now.options:
            return f"pool {path} is {said}"
    return ""


def judge_image(path: str, was: FileId, now: FileId | None) -> str:
    """What is wrong with the image at `path` of a guest that runs; `now` is None when the path is gone."""
    if now is None:
        return f"image {path} was deleted or renamed while its machine runs"
    if now != was:
        return f"image {path} is another file ({now}, was {was}) while its machine runs"
    return ""


class Conditions:
    """Looks at one pool, each time against what was there first. `now` is the newest finding.

    An image is known from the first look at its running guest until that guest has ended.
    """

    def __init__(self, path: str) -> None:
        self.now = Condition()
        self._path = path
        self._pool: Filesystem | None = None
        self._images: dict[str, FileId] = {}
        self._looks = 0

    def look(self, images: Mapping[str, str]) -> Condition:
        """Look at the pool, and at the images of the guests that run. Logs what has changed. Raises PoolError."""
        pool = self._look_at_pool()
        # Behind a pool that is gone every image is: one line says it.
        guests = dict(self.now.guests) if pool else self._look_at_images(images)
        before, self.now = self.now, Condition(pool, guests)
        _say(before, self.now)
        return self.now

    def stands(self) -> bool:
        """Whether the pool is still what the last `look` found. Raises PoolError."""
        return self._look_at_pool() == self.now.pool

    def _look_at_pool(self) -> str:
        try:
            now = _filesystem(self._path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if self._pool is None:
                raise PoolError(f"pool {self._path}: {error.strerror}") from error
            now = None
        except OSError as error:
            raise PoolError(f"pool {self._path}: {error.strerror}") from error
        if self._pool is None:
            self._pool = now
        return judge_pool(self._path, self._pool, now) if self._pool is not None else ""

    def _look_at_images(self, images: Mapping[str, str]) -> dict[str, str]:
        self._images = {name: known for name, known in self._images.items() if name in images}
        self._looks += 1
        found = {}
        for number, (name, path) in enumerate(images.items()):
            was = self._images.get(name)
            # A handle costs as much as all the rest of a look, and an inode is rarely given to another file at once.
            compared = name in self.now.guests or (number + self._looks) % HANDLE_EVERY == 0
            handle = None if was is None or compared else was.handle
            try:
                now = file_id(path, handle)
            except FileNotFoundError:
                now = None
            except OSError as error:
                found[name] = f"image {path}: {error.strerror}"
                continue
            if was is None and now is not None:
                was = self._images[name] = now
            reason = judge_image(path, was, now) if was is not None else f"image {path} does not exist"
            if reason:
                found[name] = reason
        return found


def _say(before: Condition, now: Condition) -> None:
    """One line when something begins to be wrong, one when it ends."""
    if now.pool and now.pool != before.pool:
        log.error("%s; nothing is granted until this is repaired", now.pool)
    elif before.pool and not now.pool:
        log.info("repaired: %s", before.pool)
    for name, reason in now.guests.items():
        if before.guests.get(name) != reason:
            log.error("%s: %s; no guest of its pool is granted more until this is repaired", name, reason)
    for name, reason in before.guests.items():
        if name not in now.guests:
            log.info("%s: repaired: %s", name, reason)


def _filesystem(path: str) -> Filesystem:
    """What is mounted at `path`. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        stats, device = os.fstatvfs(fd), os.fstat(fd).st_dev
        options = _options(fd)
    finally:
        os.close(fd)
    if not options and stats.f_flag & os.ST_RDONLY:
        options = frozenset({"ro"})
    return Filesystem(device, stats.f_fsid, options)


def _options(fd: int) -> frozenset[str]:
    """Options of the superblock that the file is on; empty when they are not told.

    Not those of the mount (f_flag has both): a service may see read-only what its machines write (ProtectSystem=).
    """
    mount = _after(f"/proc/self/fdinfo/{fd}", b"mnt_id:")
    line = _after("/proc/self/mountinfo", b"%s " % mount) if mount else b""
    # ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [TAGS...] - TYPE SOURCE SUPER_OPTIONS  (proc(5))
    return frozenset(os.fsdecode(line.rpartition(b" ")[2]).split(",")) if line else frozenset()


def _after(path: str, start: bytes) -> bytes:
    """What stands in the file's line that begins so; empty when there is none."""
    try:
        with open(path, "rb") as file:
            return next((line[len(start) :].strip() for line in file if line.startswith(start)), b"")
    except OSError:
        return b""
