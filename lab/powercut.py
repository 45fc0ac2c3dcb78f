"""Power cuts at every flush of a whole life: shrinks, grows, balloons, snapshots, journal writes, a guest that writes.

One life is recorded on a disk that logs its writes (`lab.writelog`). Then, for each flush, the disk is made as it was
at that moment, and again with a random part of what no flush had followed, and looked at: it mounts, its size is a
committed one, every fsynced file is whole, a daemon started on it converges, `btrfs check` is clean. The daemon's
state directory lies on the same filesystem, so its journal is cut as well.

`python -m lab.powercut FIRST COUNT [POINTS [TORN]]`: seeds FIRST to FIRST + COUNT - 1, at most POINTS flushes each (0,
the default: all of them), TORN random states of each (1).
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab import writelog
from lab.daemon import Daemon
from lab.ledger import Asked, Kept, Ledger
from lab.loop import Guest, run, workspace
from lab.recovery import QUIET, Recovery, record_at, size_of, spread, write_durably
from lab.writelog import Entry, LoggedDisk, Replay
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


# --- the recording --------------------------------------------------------------------------------------------


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
        self._resize("shrink", least + dice.randrange(0, (top - least) // 3) // MIB * MIB + dice.choice([0, 0, 1]))
        self._snapshot(turn)
        self._files(2)
        self._report("inflate", dice.choice([60, 150]) * MIB)
        self._report("deflate", dice.choice([700, 1000]) * MIB)
        self._restart()
        for name in dice.sample(sorted(name for name in self.ledger.files if name.startswith("old")), 3):
            if self.ledger.files[name].gone > 1 << 61:
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
        while (status := self._daemon.status()).resize_in_progress:
            self._told(status.current_size)
        self._told(status.current_size)
        job = self._daemon.report().job
        if status.current_size != size or job.state != storaged_v1_pb2.JOB_DONE:
            raise RuntimeError(f"the resize ended otherwise: {job}")
        asked.done = self.ledger.position()
        self.moved += job.moved_bytes

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


# --- the cuts -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What was looked at and what was wrong."""

    cuts: Counter[str] = field(default_factory=Counter)
    torn: int = 0
    mid_journal: int = 0
    mid_resize: Counter[str] = field(default_factory=Counter)
    flushes: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = sum(self.cuts.values())
        where = ", ".join(f"{name} {count}" for name, count in sorted(self.cuts.items()))
        jobs = ", ".join(f"{name} {count}" for name, count in sorted(self.mid_resize.items())) or "none"
        return (
            f"{total} states of {self.flushes} flushes, {self.torn} of them torn, {self.mid_journal} in a journal write"
            f" ({where}); jobs cut off: {jobs}; faults: {len(self.faults)}"
        )


def chosen(flushes: list[int], recording: Recording, points: int, dice: random.Random) -> list[int]:
    """At most `points` of the flushes (0: all), as many from each phase as can be."""
    if not points or points >= len(flushes):
        return flushes
    phases: dict[str, list[int]] = {}
    for index in flushes:
        phases.setdefault(recording.ledger.phase_at(recording.entries[index].end), []).append(index)
    for found in phases.values():
        dice.shuffle(found)
    picked: list[int] = []
    while len(picked) < points:
        for found in phases.values():
            if found and len(picked) < points:
                picked.append(found.pop())
    return sorted(picked)


def cut(life: Plan, recording: Recording, directory: Path, points: int = 0, torn: int = 1) -> Iterator[Tally]:
    """Cut the power at the flushes; the tally after each state."""
    tally = Tally()
    tally.faults += [f"{life}: {fault}" for fault in told_too_early(recording)]
    dice = random.Random(life.seed + 2)
    entries = recording.entries
    flushes = [index for index, entry in enumerate(entries) if entry.flushes]
    played = 0
    with Replay(recording.log, recording.base) as replay:
        for index in chosen(flushes, recording, points, dice):
            for entry in entries[played : index + 1]:
                replay.apply(entry)
            played = index + 1
            window = entries[index + 1 : next((flush for flush in flushes if flush > index), len(entries))]
            tally.flushes += 1
            for state in range(torn + 1):
                kept = writelog.torn(window, dice) if state else []
                if state and not kept:
                    continue
                low, high = entries[index].end, max((entry.end for entry, _ in kept), default=entries[index].end)
                image = directory / "cut.img"
                with replay.copy_to(image) as copy:
                    for entry, length in kept:
                        copy.apply(entry, length)
                tally.cuts[recording.ledger.phase_at(low)] += 1
                tally.torn += bool(kept)
                look = _Look(recording, life.mount, directory, low, high)
                faults = look.all(image)
                tally.mid_journal += look.mid_journal
                tally.mid_resize.update(look.job)
                tally.faults += [f"{life}, entry {index}, {len(kept)} torn: {fault}" for fault in faults]
                image.unlink()
                yield tally


def told_too_early(recording: Recording) -> list[str]:
    """Sizes that the daemon told before they were on the disk for good: of each told one a commit must lie before."""
    return [
        f"size {size} was told at {position}, before it was committed"
        for position, size in recording.ledger.sizes
        if size not in {committed for at, committed in recording.sizes if at <= position}
    ]


class _Look:
    """One state of the disk; the last flush ended at `low` in the log, nothing of it is newer than `high`."""

    def __init__(self, recording: Recording, mount: str, directory: Path, low: int, high: int) -> None:
        self.mid_journal = False
        self.job: list[str] = []
        self._recording = recording
        self._ledger = recording.ledger
        self._mount = mount
        self._directory = directory
        self._low = low
        self._high = high

    def all(self, image: Path) -> list[str]:
        """Everything that is wrong with the image."""
        root = self._directory / "cut"
        root.mkdir(exist_ok=True)
        device = run("losetup", "--show", "-f", "--direct-io=off", image)
        try:
            try:
                run("mount", *(["-o", self._mount] if self._mount else []), device, root)
            except RuntimeError as error:
                return [f"does not mount: {error}"]
            try:
                faults = self._mounted(root)
            finally:
                _unmount(root)
            try:
                _checked(device)
            except RuntimeError as error:
                faults.append(f"btrfs check: {str(error)[-300:]}")
            return faults
        finally:
            run("losetup", "-d", device)

    def _mounted(self, root: Path) -> list[str]:
        faults = self._size(size_of(root))
        self.mid_journal = any((root / STATE).glob("*/journal.json.new"))
        place = self._directory / "daemon"
        place.mkdir(exist_ok=True)
        try:
            with daemon_on(root, place) as daemon:
                faults += self._remembered(daemon)
                faults += Recovery(daemon, root).all(allow=200 * MIB)
        except RuntimeError as error:
            faults.append(str(error))
        # Last: neither the cut nor the recovery may have cost anybody a file.
        faults += self._ledger.lost(root, self._low, self._high)
        return faults

    def _size(self, size: int) -> list[str]:
        before = [committed for at, committed in self._recording.sizes if at <= self._low][-1]
        during = {committed for at, committed in self._recording.sizes if self._low < at <= self._high}
        if size not in {before} | during:
            return [f"the size is {size}, neither {before} nor one of {sorted(during)}"]
        return []

    def _remembered(self, daemon: Daemon) -> list[str]:
        """What was answered before the cut is known after it."""
        faults = []
        report = daemon.report()
        limits = self._ledger.possible(self._ledger.limits, self._low, self._high)
        if limits and report.balloon.limit_bytes not in limits:
            faults.append(f"the limit is {report.balloon.limit_bytes}, not one of {sorted(limits)}")
        resizes = self._ledger.possible(self._ledger.resizes, self._low, self._high)
        if resizes and report.job.requested_size not in resizes:
            faults.append(f"the last job is one to {report.job.requested_size}, not one of {sorted(resizes)}")
        for asked in self._ledger.resizes:
            if asked.number != report.job.requested_size or asked.begun > self._low:
                continue
            if asked.done > self._low:
                self.job = [storaged_v1_pb2.JobState.Name(report.job.state)]
            elif report.job.state != storaged_v1_pb2.JOB_DONE:
                faults.append(f"the job was done before the cut, now it is {report.job}")
        return faults


def _unmount(root: Path) -> None:
    for attempt in range(50):
        try:
            run("umount", root)
        except RuntimeError:
            if attempt == 49:
                raise
            time.sleep(0.1)
        else:
            return


def _checked(device: str) -> None:
    """As `lab.loop.Guest.check`: the kernel lets go of the device a little after the unmount."""
    for _ in range(50):
        try:
            run("btrfs", "check", "--readonly", device)
        except RuntimeError as error:
            if "busy" not in str(error):
                raise
            time.sleep(0.1)
        else:
            return


def memory() -> str | None:
    """Where images lie in memory, so that the host's disk need not flush for every cut; None where that is not."""
    place = "/dev/shm"
    return place if os.access(place, os.W_OK) and shutil.disk_usage(place).free > 4 * GIB else None


def main(first: int, count: int, points: int = 0, torn: int = 1) -> int:
    """Record and cut `count` lives; 1 when anything was wrong."""
    wrong = 0
    for seed in range(first, first + count):
        with workspace(memory()) as directory:
            life = plan(seed)
            begun = time.monotonic()
            recording = record(life, directory)
            flushes = sum(1 for entry in recording.entries if entry.flushes)
            print(
                f"{life}: {len(recording.entries)} requests, {flushes} flushes,"
                f" {recording.log.stat().st_size // MIB} MiB written, {recording.moved // MIB} MiB moved,"
                f" {len(recording.sizes)} sizes, recorded in {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            shown, tally = 0, Tally()
            for done, tally in enumerate(cut(life, recording, directory, points, torn), 1):
                for fault in tally.faults[shown:]:
                    print(f"  FAULT {fault}", flush=True)
                shown = len(tally.faults)
                if not done % 100:
                    print(f"  {tally}", flush=True)
            print(f"{tally} ({time.monotonic() - begun:.0f} s)", flush=True)
            wrong += len(tally.faults)
    print(f"lives {count}, faults {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
