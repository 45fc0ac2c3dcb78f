"""Power cuts at every flush of a whole life: shrinks, grows, balloons, snapshots, journal writes, a guest that writes.

One life is recorded on a disk that logs its writes (`lab.writelog`). Then, for each flush, the disk is made as it was
at that moment, and again with a random part of what no flush had followed, and looked at: it mounts, its size is a
committed one, every fsynced file is whole, a daemon started on it converges, `btrfs check` is clean. The daemon's
state directory lies on the same filesystem, so its journal is cut as well.

`python -m lab.powercut FIRST COUNT [POINTS [TORN]]`: seeds FIRST to FIRST + COUNT - 1, at most POINTS flushes each (0,
the default: all of them), TORN random states of each (1).
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab import writelog
from lab.daemon import Daemon
from lab.loop import memory, private_mounts, run, sweep, workspace
from lab.recovery import Recovery, size_of
from lab.story import STATE, Plan, Recording, daemon_on, plan, record
from lab.writelog import Replay
from storaged.rpc.proto import storaged_v1_pb2
from storaged.units import MIB

WORK = ("shrink", "best effort", "grow", "inflate", "deflate")
"""The phases that a few cuts are for."""


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
    """At most `points` of the flushes (0: all), as many from each phase as can be, of the daemon's work first."""
    if not points or points >= len(flushes):
        return flushes
    phases: dict[str, list[int]] = {phase: [] for phase in WORK}
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
                # The latest moment it may have been: all that was answered until then must be there.
                flushed, moment = entries[index].end, (window or [entries[index]])[-1].end
                image = directory / "cut.img"
                with replay.copy_to(image) as copy:
                    for entry, length in kept:
                        copy.apply(entry, length)
                tally.cuts[recording.ledger.phase_at(flushed)] += 1
                tally.torn += bool(kept)
                look = Look(recording, life.mount, directory, flushed, moment)
                faults = look.all(image)
                tally.mid_journal += look.mid_journal
                tally.mid_resize.update(look.job)
                tally.faults += [f"{life}, entry {index}, {len(kept)} torn: {fault}" for fault in faults]
                image.unlink()
                yield tally


def told_too_early(recording: Recording) -> list[str]:
    """Sizes that the daemon told before they were on the disk for good: of each told one a commit must lie before."""
    flushes = [entry.end for entry in recording.entries if entry.flushes]
    faults = []
    for position, size in recording.ledger.sizes:
        flushed = max((end for end in flushes if end <= position), default=0)
        if size not in {committed for at, committed in recording.sizes if at <= flushed}:
            faults.append(f"size {size} was told at {position}, before it was committed")
    return faults


class Look:
    """One state of the disk: the log's length when it was flushed for the last time, and when the power went."""

    def __init__(self, recording: Recording, mount: str, directory: Path, flushed: int, moment: int) -> None:
        self.mid_journal = False
        self.job: list[str] = []
        self._recording = recording
        self._ledger = recording.ledger
        self._mount = mount
        self._directory = directory
        self._flushed = flushed
        self._moment = moment

    def all(self, image: Path) -> list[str]:
        """Everything that is wrong with the image."""
        root = self._directory / "cut"
        root.mkdir(exist_ok=True)
        writelog.wait_let_go(image)
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
        faults += self._ledger.lost(root, self._moment)
        return faults

    def _size(self, size: int) -> list[str]:
        before = [committed for at, committed in self._recording.sizes if at <= self._flushed][-1]
        during = {committed for at, committed in self._recording.sizes if self._flushed < at <= self._moment}
        if size not in {before} | during:
            return [f"the size is {size}, neither {before} nor one of {sorted(during)}"]
        return []

    def _remembered(self, daemon: Daemon) -> list[str]:
        """What was answered before the cut is known after it."""
        faults = []
        report = daemon.report()
        limits = self._ledger.possible(self._ledger.limits, self._moment)
        if limits and report.balloon.limit_bytes not in limits:
            faults.append(f"the limit is {report.balloon.limit_bytes}, not one of {sorted(limits)}")
        resizes = self._ledger.possible(self._ledger.resizes, self._moment)
        if resizes and report.job.requested_size not in resizes:
            faults.append(f"the last job is one to {report.job.requested_size}, not one of {sorted(resizes)}")
        # The newest that it may be: two jobs may have asked for the same size.
        begun = [asked for asked in self._ledger.resizes if asked.begun <= self._moment]
        asked = next((asked for asked in reversed(begun) if asked.number == report.job.requested_size), None)
        if asked is not None and asked.done > self._moment:
            self.job = [storaged_v1_pb2.JobState.Name(report.job.state)]
        elif asked is not None and report.job.state != storaged_v1_pb2.JOB_DONE:
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


def main(first: int, count: int, points: int = 0, torn: int = 1) -> int:
    """Record and cut `count` lives; 1 when anything was wrong."""
    wrong = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is cleared
    private_mounts()
    sweep(memory())
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
