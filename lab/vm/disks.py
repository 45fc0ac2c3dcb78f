"""Disks on the host's side: blank ones, used ones, what a host finds on one, and a small filesystem that holds them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab.loop import memory, run, workspace
from storaged.units import MIB


def blank(path: Path, size: int) -> Path:
    """A sparse file."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def host_bytes(path: Path) -> int:
    """What a file costs the host."""
    return os.stat(path).st_blocks * 512


def free(pool: Path) -> int:
    """What a host's own disk watcher would say."""
    found = os.statvfs(pool)
    return found.f_bavail * found.f_frsize


@contextlib.contextmanager
def small_host(size: int) -> Iterator[Path]:
    """A small filesystem on the host, for sparse disks and for others; as much in memory as there is room."""
    with workspace(memory()) as directory:
        image = blank(directory / "host.img", size)
        run("mkfs.ext4", "-q", "-m", "0", "-N", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        pool = directory / "pool"
        pool.mkdir()
        run("mount", "-o", "loop", image, pool)
        yield pool


@dataclass
class Base:
    """A used disk whose data lies everywhere, and what is on it."""

    path: Path
    size: int
    hashes: dict[str, str] = field(default_factory=dict)


def make_base(
    path: Path, size: int, *, above: int = 0, file: int = 16 * MIB, files: int = 48, kept_every: int = 3
) -> Base:
    """Written on the host, which is a hundred times as fast as the guest; its data lies `above` so many bytes."""
    base = Base(blank(path, size), size)
    chance = random.Random(1)
    run("mkfs.btrfs", "-q", path)
    with mounted(path) as target:
        if above:
            run("fallocate", "-l", str(above), target / "room")
        for number in range(files):
            content = chance.randbytes(file)
            (target / f"data{number}").write_bytes(content)
            if number % 8 == 7:
                run("btrfs", "filesystem", "sync", target)
            base.hashes[f"data{number}"] = hashlib.sha256(content).hexdigest()
        for number in range(files):
            if number % kept_every:
                (target / f"data{number}").unlink()
                del base.hashes[f"data{number}"]
        (target / "room").unlink(missing_ok=True)
        run("btrfs", "filesystem", "sync", target)
        run("fstrim", target)
    return base


def check(disk: Path, base: Base) -> None:
    """What a host finds on the disk before anybody repairs or replays anything: sound, and every old file whole."""
    run("btrfs", "check", "--readonly", disk)
    with mounted(disk, "ro", "rescue=nologreplay") as target:
        for name, expected in base.hashes.items():
            with (target / name).open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == expected, name


@contextlib.contextmanager
def mounted(disk: Path, *options: str) -> Iterator[Path]:
    """The disk's files, as the host sees them."""
    with workspace() as directory:
        target = directory / "mnt"
        target.mkdir()
        run("mount", "-o", ",".join(("loop", *options)), disk, target)
        try:
            yield target
        finally:
            for left in range(100, -1, -1):
                try:
                    run("umount", target)
                    break
                except RuntimeError:  # a process that is about to be another program still has our files open
                    if not left:
                        raise
                    time.sleep(0.05)
