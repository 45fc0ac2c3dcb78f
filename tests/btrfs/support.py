"""What the whole runs share: aged filesystems, samplers, hashes, what a daemon's children are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from lab import recovery
from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.units import GIB, KIB, MIB

SUBVOLUME = ".storaged-balloon"
TARGET_SLACK = 4 * MIB

QUIET = recovery.QUIET


@dataclass
class Figures:
    """Lines for people: what was measured on the way."""

    lines: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)

    def note(self, **values: object) -> None:
        """One line of `name=value`; sizes as given."""
        self.lines.append(" ".join(f"{name}={value}" for name, value in values.items()))

    def show(self, what: str, counts: object) -> None:
        """The same, and also at the end of the run that made them: what was hit is as good as a test's result."""
        self.note(**{what: counts})
        self.shown.append(f"{what}: {counts}")


# --- what a filesystem says -----------------------------------------------------------------------------------


def available(guest: Guest) -> int:
    """What statvfs shows an application."""
    answer = os.statvfs(guest.mountpoint)
    return answer.f_bavail * answer.f_frsize


def read_only(guest: Guest) -> bool:
    """True also when the kernel forced it."""
    return bool(os.statvfs(guest.mountpoint).f_flag & os.ST_RDONLY)


def held(guest: Guest) -> int:
    """Bytes the balloon holds; 0 when there is none."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(guest.mountpoint / SUBVOLUME) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def subvolumes(guest: Guest) -> list[str]:
    """Paths of all subvolumes."""
    return [line.split(" path ", 1)[1] for line in run("btrfs", "subvolume", "list", guest.mountpoint).splitlines()]


def report_for(limit: int) -> int:
    """What the host must report for applications to have `limit`."""
    return limit + GIB


# --- filling and ageing ---------------------------------------------------------------------------------------


def half_holes(guest: Guest, size: int, seed: int = 1) -> None:
    """Small files of `size` bytes altogether, every second one deleted: holes of 4 to 64 KiB all over."""
    rng = random.Random(seed)
    block = os.urandom(64 * KIB)
    written = index = 0
    names: list[Path] = []
    while written < size:
        folder = guest.mountpoint / f"small{index // 2000}"
        if index % 2000 == 0:
            folder.mkdir()
        length = rng.randrange(4 * KIB, 64 * KIB)
        name = folder / str(index)
        name.write_bytes(block[:length])
        names.append(name)
        written += length
        index += 1
    os.sync()
    for name in names[::2]:
        name.unlink()
    sync(guest)


def nearly_full(guest: Guest, share: float = 0.95) -> None:
    """One file of `share` of what is available."""
    fill(guest.mountpoint / "full", int(available(guest) * share))


def snapshots(guest: Guest, size: int, count: int = 2) -> None:
    """Data, snapshots of the root, and half of the data deleted: the snapshots hold it."""
    for index in range(4):
        fill(guest.mountpoint / f"before{index}", size // 4)
    for index in range(count):
        run("btrfs", "-q", "subvolume", "snapshot", guest.mountpoint, guest.mountpoint / f"snapshot{index}")
    for index in range(2):
        (guest.mountpoint / f"before{index}").unlink()


def deletions(guest: Guest, size: int) -> None:
    """Much data, just deleted and not committed: the kernel still counts it as used."""
    fill(guest.mountpoint / "gone", size)
    fill(guest.mountpoint / "stays", size // 4)
    (guest.mountpoint / "gone").unlink()


def sync(guest: Guest) -> None:
    """Commit the guest's filesystem."""
    run("btrfs", "filesystem", "sync", guest.mountpoint)


def scatter(guest: Guest, seed: int) -> str:
    """A random life: files, deletions, snapshots, preallocation. Says what it did."""
    rng = random.Random(seed)
    room = int(available(guest) * 0.8)
    did = []
    for step in range(rng.randint(2, 6)):
        kind = rng.choice(["file", "small", "prealloc", "snapshot", "delete", "delete"])
        size = min(rng.randrange(1 * MIB, 200 * MIB), max(available(guest) // 3, MIB), room)
        if kind == "file":
            fill(guest.mountpoint / f"file{step}", size)
        elif kind == "small":
            folder = guest.mountpoint / f"many{step}"
            folder.mkdir()
            for index in range(rng.randint(50, 800)):
                (folder / str(index)).write_bytes(os.urandom(rng.randrange(1, 20 * KIB)))
        elif kind == "prealloc":
            with (guest.mountpoint / f"pre{step}").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        elif kind == "snapshot":
            run("btrfs", "-q", "subvolume", "snapshot", guest.mountpoint, guest.mountpoint / f"snap{step}")
        else:
            files = sorted(path for path in guest.mountpoint.iterdir() if path.name.startswith(("file", "many", "pre")))
            if not files:
                continue
            victim = rng.choice(files)
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
            if rng.random() < 0.5:
                sync(guest)
        did.append(kind)
    return ",".join(did)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the balloon."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and SUBVOLUME not in path.parts:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def balance_status(guest: Guest) -> str:
    """What `btrfs balance status` says, whatever it is."""
    command = ["btrfs", "balance", "status", str(guest.mountpoint)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return done.stdout


def pause_a_balance(guest: Guest) -> None:
    """Leave a paused balance behind; it has moved little."""
    command = ["btrfs", "balance", "start", "--full-balance", str(guest.mountpoint)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as balance:
        until = time.monotonic() + 20
        while time.monotonic() < until and balance.poll() is None:
            paused = subprocess.run(["btrfs", "balance", "pause", guest.mountpoint], capture_output=True, check=False)
            if paused.returncode == 0:
                break
            time.sleep(0.002)
    assert "is paused" in balance_status(guest)


# --- watching from outside ------------------------------------------------------------------------------------


class Sampler:
    """Calls `probe` again and again in a thread while the `with` block runs; keeps every different answer."""

    def __init__(self, probe: Callable[[], int], pause_s: float = 0.0005) -> None:
        self._probe = probe
        self._pause_s = pause_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.samples = 0
        self.values: list[int] = []
        self.times: list[tuple[float, int]] = []

    @staticmethod
    def longest(samples: list[tuple[float, int]]) -> float:
        """Seconds from the first to the last of `samples`."""
        return round(samples[-1][0] - samples[0][0], 4) if samples else 0.0

    def _loop(self) -> None:
        while True:
            last = self._done.is_set()
            with contextlib.suppress(OSError):
                value = self._probe()
                self.samples += 1
                self.times.append((time.monotonic(), value))
                if not self.values or self.values[-1] != value:
                    self.values.append(value)
            if last:
                return
            time.sleep(self._pause_s)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()


@contextlib.contextmanager
def writing(guest: Guest, rate: int, name: str = "writer") -> Iterator[None]:
    """Somebody writes about `rate` bytes a second into one file, until the block ends or there is no room."""
    done = threading.Event()

    def write() -> None:
        block = os.urandom(MIB)
        with contextlib.suppress(OSError), (guest.mountpoint / name).open("wb", buffering=0) as file:
            while not done.wait(MIB / rate):
                file.write(block)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def running(pid: int) -> bool:
    """True while the process is there and not a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] not in "ZX"


def until(condition: Callable[[], bool], within_s: float = 30.0, pause_s: float = 0.05) -> float:
    """Wait for `condition`; the seconds it took. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > within_s:
            raise TimeoutError(f"not so after {within_s:g} s")
        time.sleep(pause_s)
    return time.monotonic() - began


def metric(daemon: Daemon, name: str) -> float:
    """`Daemon.metric`, as a function."""
    return daemon.metric(name)
