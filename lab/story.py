"""A life to cut: shrinks, grows, balloons, snapshots, restarts and a guest that writes, on a disk that logs its writes.

The daemon's state directory lies on the same filesystem, so its journal is in the log as well.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path

from lab import writelog
from lab.daemon import Daemon
from lab.ledger import NEVER, Asked, Kept, Ledger
from lab.loop import Guest, run
from lab.recovery import QUIET, record_at, spread, write_durably
from lab.writelog import Entry, LoggedDisk
from storaged.resize.layout import KERNEL_MINIMUM
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, KIB, MIB, sector_floor

STATE = ".state"
RECORD_EVERY_S = 0.2
SPREAD = 28


@dataclass(frozen=True, slots=True)
class Plan:
    """What one recorded life is made of."""

    seed: int
    size: int
    device: int
    mkfs: tuple[str, ...]
    mount: str
    rounds: int

    def __str__(self) -> str:
        traits = [f"{self.size // MIB} of {self.device // MIB} MiB", " ".join(self.mkfs) or "dup 16K", self.mount]
        return f"seed {self.seed}: " + ", ".join(trait for trait in traits if trait)


def plan(seed: int, rounds: int = 2) -> Plan:
    """The plan of `seed`."""
    dice = random.Random(seed)
    size = dice.choice([3 * GIB, 4 * GIB])
    return Plan(
        seed=seed,
        size=size,
        device=size + GIB,
        mkfs=dice.choice([(), ("-m", "single"), ("-n", "4096")]),
        mount=dice.choice(["", "", "compress-force=zstd:1"]),
        rounds=rounds,
    )


@dataclass(slots=True)
class Recording:
    """A life on disk: `base` as it was before, `log`, and what was certain when."""

    base: Path
    log: Path
    ledger: Ledger
    entries: list[Entry]
    sizes: list[tuple[int, int]]
    moved: int


def record(life: Plan, directory: Path) -> Recording:
    """Live through the plan on a logged disk."""
    dice = random.Random(life.seed + 1)
    guest = Guest(directory, life.size, name="base", mkfs=life.mkfs, mount=life.mount, device_size=life.device)
    kept: dict[str, Kept] = {}

    def populate(number: int) -> None:
        name, content = f"old{number}", dice.randbytes(dice.choice([1500, 90 * KIB, MIB, 2 * MIB]))
        kept[name] = Kept(write_durably(guest.mountpoint / name, content), 0)

    with daemon_on(guest.mountpoint, directory):
        pass  # it has given a new filesystem's metadata room, low on the disk, as in any guest
    spread(guest.mountpoint, life.size * 8 // 10, SPREAD, populate)
    run("btrfs", "-q", "balance", "start", "-dusage=0", guest.mountpoint)
    guest.unmount()
    guest.detach()
    data = directory / "data.img"
    run("cp", "--sparse=always", guest.image, data)
    disk = LoggedDisk(directory, data)
    try:
        guest.device = disk.start().device
        guest.mount()
        story = _Story(life, dice, guest, Ledger(disk.position, files=kept), directory)
        story.tell()
        guest.unmount()
    finally:
        if os.path.ismount(guest.mountpoint):
            guest.unmount()
        disk.stop()
    found = list(writelog.entries(disk.log))
    sizes = [(0, life.size), *writelog.committed_sizes(disk.log, found)]
    data.unlink()
    return Recording(guest.image, disk.log, story.ledger, found, sizes, story.moved)


class _Story:
    """What happens on the logged disk, every certainty noted."""

    def __init__(self, life: Plan, dice: random.Random, guest: Guest, ledger: Ledger, directory: Path) -> None:
        self.ledger = ledger
        self.moved = 0
        self._life = life
        self._dice = dice
        self._root = guest.mountpoint
        self._daemon = daemon_on(guest.mountpoint, directory)
        self._number = 0

    def tell(self) -> None:
        """Live."""
        self.ledger.phase("start")
        done = threading.Event()
        with self._daemon:
            writer = threading.Thread(target=self._append, args=(done,), daemon=True)
            writer.start()
            try:
                for turn in range(self._life.rounds):
                    self._round(turn)
            finally:
                done.set()
                writer.join()
            self.ledger.phase("stop")

    def _round(self, turn: int) -> None:
        dice, top = self._dice, self._life.size
        self._files(3)
        self._report("inflate", dice.choice([300, 500, 800]) * MIB)
        self._files(2)
        least = self._daemon.minimum()
        # Most hosts ask for whole sectors, not all do.
        smaller = least + dice.randrange(0, (top - least) // 3) // MIB * MIB + dice.choice([0, 0, 1])
        self._resize("shrink", smaller)
        self._snapshot(turn)
        self._further()
        self._resize("grow", smaller)
        self._files(2)
        self._report("inflate", dice.choice([60, 150]) * MIB)
        self._report("deflate", dice.choice([700, 1000]) * MIB)
        self._restart()
        for name in dice.sample(sorted(name for name in self.ledger.files if name.startswith("old")), 3):
            if self.ledger.files[name].gone == NEVER:
                self.ledger.delete(self._root, name)
        self._resize("grow", dice.choice([self._life.size, self._life.device]))
        # With the balloon over the rest what is written now lies where the next shrink must move it.
        self._report("inflate", 400 * MIB)
        self._files(4)
        self._report("deflate", 50 * GIB)

    def _append(self, done: threading.Event) -> None:
        """An application that appends to its log, a record at a time, each certain before the next."""
        with (self._root / "records").open("ab", buffering=0) as file:
            number = 0
            while not done.wait(RECORD_EVERY_S):
                file.write(record_at(number))
                os.fsync(file.fileno())
                self.ledger.records.append(self.ledger.position())
                number += 1

    def _files(self, count: int) -> None:
        self.ledger.phase("files")
        for _ in range(count):
            self._number += 1
            size = self._dice.choice([300, 20 * KIB, 400 * KIB, 3 * MIB])
            self.ledger.write(self._root, f"new{self._number}", self._dice.randbytes(size))

    def _report(self, phase: str, limit: int) -> None:
        self.ledger.phase(phase)
        asked = Asked(limit, self.ledger.position())
        self.ledger.limits.append(asked)
        if self._daemon.report_free(GIB + limit) != vm_guest_pb2.SUCCESS:
            raise RuntimeError(f"the balloon is not right: {self._daemon.report().balloon}")
        asked.certain = self.ledger.position()

    def _resize(self, phase: str, size: int) -> None:
        self.ledger.phase(phase)
        asked = Asked(size, self.ledger.position())
        self.ledger.resizes.append(asked)
        if self._daemon.resize(size) != vm_guest_pb2.ResizeFilesystemResponse.STARTED:
            raise RuntimeError("the resize did not start")
        asked.certain = self.ledger.position()
        job = self._followed(asked)
        if job.current_size != size:
            raise RuntimeError(f"the resize ended otherwise: {job}")

    def _further(self) -> None:
        """Below what is promised, chunks rewritten on the way."""
        self.ledger.phase("best effort")
        asked = Asked(KERNEL_MINIMUM, self.ledger.position())
        self.ledger.resizes.append(asked)
        request = storaged_v1_pb2.ResizeRequest(size_bytes=KERNEL_MINIMUM, best_effort=True)
        self._daemon.storage.Resize(request, timeout=20)
        asked.certain = self.ledger.position()
        self._followed(asked)

    def _followed(self, asked: Asked) -> storaged_v1_pb2.Job:
        """To its end."""
        while (status := self._daemon.status()).resize_in_progress:
            self._told(status.current_size)
        self._told(status.current_size)
        job = self._daemon.report().job
        if job.state != storaged_v1_pb2.JOB_DONE:
            raise RuntimeError(f"the resize ended otherwise: {job}")
        asked.done = self.ledger.position()
        self.moved += job.moved_bytes
        return job

    def _told(self, size: int) -> None:
        if not self.ledger.sizes or self.ledger.sizes[-1][1] != sector_floor(size):
            self.ledger.sizes.append((self.ledger.position(), sector_floor(size)))

    def _snapshot(self, turn: int) -> None:
        self.ledger.phase("snapshot")
        run("btrfs", "-q", "subvolume", "snapshot", self._root, self._root / f"snapshot{turn}")
        position = self.ledger.position()
        there = {name: kept for name, kept in self.ledger.files.items() if "/" not in name and kept.gone > position}
        for name, kept in there.items():
            self.ledger.files[f"snapshot{turn}/{name}"] = Kept(kept.digest, position)

    def _restart(self) -> None:
        self.ledger.phase("restart")
        self._daemon.kill()
        self._daemon.start()


def daemon_on(mountpoint: Path, directory: Path) -> Daemon:
    """A daemon whose state lies on the filesystem it manages."""
    config = directory / "storaged.toml"
    config.write_text(QUIET, encoding="utf-8")
    return Daemon(directory, "--config", str(config), "--state-dir", str(mountpoint / STATE), stateful=mountpoint)
