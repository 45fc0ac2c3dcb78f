"""What runs in guests: each is called again and again with a number, and verifies at the end what was durable."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import random
import time
from pathlib import Path
from typing import Protocol

from lab.adversary.figures import Figures
from lab.loop import run
from storaged.units import KIB, MIB

BLOCK = 8 * MIB
AFTER_ENOSPC_S = 0.2
SWAP = 256 * MIB
MOST_SMALL = 20_000


class Application(Protocol):
    """`hungry_at`: when it was last told that there is no room, monotonic seconds."""

    hungry_at: float

    def __call__(self, number: int) -> None:
        """One step of its work."""
        ...

    def verify(self) -> None:
        """Read back what was durable."""
        ...


class _Files:
    """Files and the digests that they must have."""

    def __init__(self, root: Path, figures: Figures, seed: int) -> None:
        self.hungry_at = 0.0
        self._root = root
        self._figures = figures
        self._dice = random.Random(seed)
        self._kept: dict[Path, str] = {}

    def verify(self) -> None:
        """Read everything back."""
        for path, digest in self._kept.items():
            try:
                same = hashlib.sha256(path.read_bytes()).hexdigest() == digest
            except OSError:
                same = False
            self._figures.whole += same
            self._figures.damaged += not same

    def _refused(self, path: Path, error: OSError, what: str, *, certain: bool) -> None:
        with contextlib.suppress(OSError):  # the filesystem may be read-only since
            path.unlink(missing_ok=True)
        # What was accepted and then could not be written met a full host: a loop device passes that on as ENOSPC,
        # a virtual disk as EIO. An honest ENOSPC comes before.
        if certain or error.errno != errno.ENOSPC:
            self._figures.lost(f"{self._root.name} {what}", error)
            time.sleep(0.1)
            return
        self._figures.enospc += 1
        self.hungry_at = time.monotonic()
        if self._dice.random() < 0.3:
            self._drop(len(self._kept) // 2)
        time.sleep(AFTER_ENOSPC_S)

    def _drop(self, count: int) -> None:
        for old in self._dice.sample(sorted(self._kept), min(count, len(self._kept))):
            del self._kept[old]
            with contextlib.suppress(OSError):
                old.unlink()


class Writer(_Files):
    """Durable files until there is no room, then half of them are deleted, and on."""

    def __call__(self, number: int) -> None:
        data = self._dice.randbytes(BLOCK)
        path = self._root / f"file{number}"
        accepted = False
        try:
            with path.open("wb", buffering=0) as file:
                at = 0
                while at < BLOCK:
                    at += file.write(data[at:])
                accepted = True
                os.fsync(file.fileno())
        except OSError as error:
            self._refused(path, error, "write", certain=accepted)
        else:
            self._kept[path] = hashlib.sha256(data).hexdigest()
            self._figures.written += BLOCK


class Preallocator(_Files):
    """A database or a torrent: room is taken first, and written much later; then it must be there."""

    def __call__(self, number: int) -> None:
        size = self._dice.choice((16, 64, 200)) * MIB
        path = self._root / f"preallocated{number}"
        allocated = False
        try:
            with path.open("wb", buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                os.fsync(file.fileno())
                allocated = True
                self._figures.did["preallocated files"] += 1
                time.sleep(self._dice.uniform(0, 2))
                digest = hashlib.sha256()
                for at in range(0, size, BLOCK):
                    data = self._dice.randbytes(BLOCK)
                    digest.update(data)
                    os.pwrite(file.fileno(), data, at)
                os.fsync(file.fileno())
        except OSError as error:
            self._refused(path, error, "write to preallocated room", certain=allocated)
        else:
            self._kept[path] = digest.hexdigest()
            self._figures.written += size
        if len(self._kept) > 4:
            self._drop(3)


class Swap:
    """A swap file as the kernel uses it: preallocated, without copy on write, written past the page cache."""

    def __init__(self, root: Path, figures: Figures, seed: int) -> None:
        self.hungry_at = 0.0
        self._figures = figures
        self._dice = random.Random(seed)
        self._path = root / "swap"
        self._path.touch()
        run("chattr", "+C", self._path)
        self._file = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        self._made = False
        self._page = mmap.mmap(-1, MIB)

    def _make(self) -> bool:
        """Take the room, once there is so much."""
        try:
            os.posix_fallocate(self._file, 0, SWAP)
            os.fsync(self._file)
        except OSError:
            self._figures.enospc += 1
            self.hungry_at = time.monotonic()
            time.sleep(AFTER_ENOSPC_S)
            return False
        return True

    def __call__(self, number: int) -> None:
        self._made = self._made or self._make()
        if not self._made:
            return
        self._page[:8] = number.to_bytes(8, "little")
        try:
            os.pwrite(self._file, self._page, self._dice.randrange(SWAP // MIB) * MIB)
            self._figures.did["MiB swapped out"] += 1
        except OSError as error:
            self._figures.lost("swap", error)
        time.sleep(self._dice.uniform(0, 0.05))

    def verify(self) -> None:
        """Nothing of it outlives its machine."""
        os.close(self._file)


class SmallFiles(_Files):
    """A package manager: files of a few KiB, most of which live in metadata."""

    def __call__(self, number: int) -> None:
        folder = self._root / f"small{number % 50}"
        path = folder / str(number)
        data = self._dice.randbytes(self._dice.choice((200, 1500, 2000, 3 * KIB)))
        durable = number % 200 == 0
        accepted = False
        try:
            folder.mkdir(exist_ok=True)
            with path.open("wb", buffering=0) as file:
                file.write(data)
                accepted = durable
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            self._refused(path, error, "small file", certain=accepted)
            return
        self._figures.did["small files"] += 1
        if durable:
            self._kept[path] = hashlib.sha256(data).hexdigest()
        if number % MOST_SMALL == MOST_SMALL - 1:
            self._kept.clear()
            for each in self._root.glob("small*"):
                run("rm", "-rf", each)
