"""One step of each kind of writer. Raises OSError where there is no room."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

from lab.attack.preallocation import fallocate, preallocate
from lab.attack.storm.applications import Applications, Step, digest, random_size
from lab.loop import run
from storaged.units import KIB, MIB

FICLONE = 0x40049409  # _IOW(0x94, 9, int)
MOST_PREALLOCATED = 12
MOST_SNAPSHOTS = 3
_MAPPED = """
import hashlib, mmap, os, sys
path, size = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, size)
data = os.urandom(size)
with mmap.mmap(fd, size) as view:
    view[:] = data
    view.flush()
os.fsync(fd)
print(hashlib.sha256(data).hexdigest())
"""


def _written(path: Path, content: bytes, flags: int = 0) -> None:
    """Create, write and fsync a file; nothing is left of it where that fails."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o600)
    try:
        view, at = memoryview(content), 0
        while at < len(content):
            at += os.write(fd, view[at : at + MIB])
        os.fsync(fd)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def buffered(world: Applications, dice: random.Random, number: int) -> None:
    """Buffered writes and fsync(2)."""
    content = dice.randbytes(random_size(dice))
    path = world.root / f"buffered{number}"
    _written(path, content)
    world.keep(path, digest(content))


def direct(world: Applications, dice: random.Random, number: int) -> None:
    """O_DIRECT from an aligned buffer."""
    size = random_size(dice)
    content = dice.randbytes(size)
    path = world.root / f"direct{number}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    try:
        with mmap.mmap(-1, size) as aligned:
            aligned[:] = content
            at = 0
            while at < size:
                with memoryview(aligned) as view, view[at : at + MIB] as part:
                    at += os.write(fd, part)
        os.fsync(fd)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    world.keep(path, digest(content))


def mapped(world: Applications, dice: random.Random, number: int) -> None:
    """A shared mapping, in a process of its own: where there is no room it gets SIGBUS."""
    path = world.root / f"mapped{number}"
    words = [sys.executable, "-I", "-S", "-c", _MAPPED, str(path), str(max(random_size(dice), 4 * KIB))]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        path.unlink(missing_ok=True)
        raise OSError(28, f"mapped writer ended with {done.returncode}: {done.stderr[-200:]}")
    world.keep(path, done.stdout.strip())


def reflink(world: Applications, dice: random.Random, number: int) -> None:
    """A clone of a file, half of which is then written anew."""
    source = world.any_kept(dice)
    if source is None:
        return
    path = world.root / f"clone{number}"
    with source.open("rb") as old, path.open("w+b") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            content = bytearray(new.read())
            half = dice.randbytes(len(content) // 2)
            content[: len(half)] = half
            at = 0
            while at < len(half):
                at += os.pwrite(new.fileno(), half[at:], at)
            os.fsync(new.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
    world.keep(path, digest(bytes(content)))


def compressed(world: Applications, dice: random.Random, number: int) -> None:
    """Text in a folder with the compression attribute."""
    folder = world.root / "compressed"
    if not folder.is_dir():
        folder.mkdir()
        run("btrfs", "property", "set", folder, "compression", "zstd")
    content = b"".join(b"%016x some text that compresses well\n" % dice.getrandbits(40) for _ in range(40_000))
    path = folder / str(number)
    _written(path, content)
    world.keep(path, digest(content))


def preallocating(world: Applications, dice: random.Random, number: int) -> None:
    """Preallocate, and write what was preallocated earlier, in pieces; the oldest files go."""
    with world.lock:
        parts = list(world.preallocated)
    if parts and dice.random() < 0.6:
        part = dice.choice(parts)
        part.write(dice.choice((MIB, 8 * MIB)))
    elif len(parts) < MOST_PREALLOCATED:
        path = world.root / f"preallocated{number}"
        try:
            made = preallocate(path, dice.choice((MIB, 8 * MIB, 32 * MIB)), dice.choice((0, 0, 1)))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        with world.lock:
            world.preallocated.append(made)
    else:
        with world.lock:
            gone = world.preallocated.pop(0)
        gone.path.unlink(missing_ok=True)


def snapshotting(world: Applications, dice: random.Random, number: int) -> None:
    """A subvolume that changes, its snapshots, and the oldest of them deleted."""
    subvolume = world.root / "subvolume"
    try:
        if not subvolume.is_dir():
            run("btrfs", "-q", "subvolume", "create", subvolume)
        path = subvolume / f"part{number % 4}"
        content = dice.randbytes(dice.choice((MIB, 8 * MIB)))
        world.forget(path)
        _written(path, content)
        world.keep(path, digest(content))
        run("btrfs", "-q", "subvolume", "snapshot", subvolume, world.root / f"snapshot{number}")
        if number >= MOST_SNAPSHOTS:
            old = world.root / f"snapshot{number - MOST_SNAPSHOTS}"
            if old.is_dir():
                run("btrfs", "-q", "subvolume", "delete", old)
    except RuntimeError as error:
        raise OSError(28, str(error)) from error


def small(world: Applications, dice: random.Random, number: int) -> None:
    """A hundred small files, of which most are soon deleted."""
    folder = world.root / f"small{number}"
    folder.mkdir()
    content = dice.randbytes(2048)
    for index in range(100):
        (folder / str(index)).write_bytes(content[: 500 + index * 15])
    if number >= 20 and (old := world.root / f"small{number - 20}").is_dir():
        for path in old.iterdir():
            path.unlink()
        old.rmdir()


def rewriting(world: Applications, dice: random.Random, number: int) -> None:
    """Random blocks of one nodatacow file, as a database; it is made anew now and then."""
    path = world.root / "database"
    size = 64 * MIB
    if number % 50 == 0:
        path.unlink(missing_ok=True)
        path.touch()
        run("chattr", "+C", path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if number % 50 == 25:
            fallocate(fd, 2 | 1, dice.randrange(0, size // 2, 4 * KIB), 8 * MIB)
        for _ in range(20):
            os.pwrite(fd, dice.randbytes(64 * KIB), dice.randrange(0, size - 64 * KIB, 4 * KIB))
        os.fsync(fd)
    finally:
        os.close(fd)


STEPS: dict[str, Step] = {
    "buffered": buffered,
    "direct": direct,
    "mapped": mapped,
    "reflink": reflink,
    "compressed": compressed,
    "preallocating": preallocating,
    "snapshotting": snapshotting,
    "small": small,
    "rewriting": rewriting,
}
