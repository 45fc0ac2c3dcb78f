"""kill -9 of the daemon, of its resize child, of both, at random moments of shrinks, grows and balloons.

The guest's applications write on meanwhile. After each kill the daemon is started again and must converge: no job goes
on for ever, the size is true, the limit is kept; now and then every fsynced file must be whole, a new report met
exactly, and `btrfs check` clean.

`python -m lab.killing COUNT [SEED]` prints the counts; 1 when anything was wrong.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from lab.daemon import Daemon
from lab.loop import Guest, memory, private_mounts, sweep, workspace
from lab.recovery import QUIET, Recovery, damaged_records, digest_of, record_at, size_of, spread, write_durably
from storaged.resize.layout import KERNEL_MINIMUM
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, KIB, MIB

SIZE = 8 * GIB
PIECES = 32
VICTIMS = ("daemon", "daemon", "child", "both")
ALL_EVERY = 3
CHECK_EVERY = 50
GOES_WITHIN_S = 10.0


RESIZES = "resize_worker"


class Application:
    """A program in the guest that writes on whatever happens to the daemon, every record certain before the next.

    Now and then it writes a file of its own, and deletes an old one. Where there is no room it waits for some.
    """

    def __init__(self, root: Path, dice: random.Random) -> None:
        self.records = 0
        self.files: dict[str, str] = {}
        self._root = root
        self._dice = dice
        self._number = 0
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, or go on."""
        self._done.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Pause."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def spread(self) -> None:
        """Write files all over the disk, so that the next shrink has something to move."""
        with contextlib.suppress(OSError):
            spread(self._root, SIZE * 8 // 10, PIECES, lambda _: self._file(3 * MIB))

    def lost(self) -> list[str]:
        """What is not as it was written."""
        with self._lock:
            faults = [name for name, digest in self.files.items() if digest_of(self._root / name) != digest]
            damaged = damaged_records(self._root / "records", self.records)
        return [f"damaged: {name}" for name in faults] + ([damaged] if damaged else [])

    def _run(self) -> None:
        with (self._root / "records").open("r+b" if self.records else "w+b", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            while not self._done.wait(0.02):
                with contextlib.suppress(OSError):
                    self._record(file.fileno())
                    if self._dice.random() < 0.1:
                        self._file(self._dice.choice([500, 30 * KIB, MIB]))

    def _record(self, fd: int) -> None:
        content = record_at(self.records)
        if os.pwrite(fd, content, self.records * len(content)) == len(content):
            os.fsync(fd)
            self.records += 1

    def _file(self, size: int) -> None:
        with self._lock:
            self._number += 1
            name = f"file{self._number}"
            try:
                self.files[name] = write_durably(self._root / name, self._dice.randbytes(size))
            except OSError:
                (self._root / name).unlink(missing_ok=True)
                raise
            if len(self.files) > 3 * PIECES:
                oldest = next(iter(self.files))
                del self.files[oldest]
                (self._root / oldest).unlink()


@dataclass(slots=True)
class Tally:
    """What was killed in what, what became of the jobs, what was wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    records: int = 0
    checks: int = 0
    resizing: int = 0
    slowest_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def victims(self) -> Counter[str]:
        """How often each was killed, whatever it was at."""
        return self._summed(0)

    @property
    def works(self) -> Counter[str]:
        """How often somebody was killed at each kind of work."""
        return self._summed(1)

    def _summed(self, part: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for name, count in self.kills.items():
            found[name.split(" in ")[part]] += count
        return found

    def __str__(self) -> str:
        def list_of(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))

        return (
            f"{sum(self.kills.values())} kills ({list_of(self.kills)}), {self.resizing} of them in the kernel's work;"
            f" jobs: {list_of(self.outcomes)}; {self.records} fsynced records; btrfs check {self.checks} times;"
            f" slowest start {self.slowest_s:.2f} s; faults: {len(self.faults)}"
        )


class Killer:
    """One guest and its daemon, killed again and again."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.tally = Tally()
        self._dice = random.Random(seed)
        self._victims: list[str] = []
        self._guest = Guest(directory, SIZE)
        self._root = self._guest.mountpoint
        config = directory / "storaged.toml"
        config.write_text(QUIET, encoding="utf-8")
        self._daemon = Daemon(directory, "--config", str(config), stateful=self._root)
        self._state = directory / "state"
        self._exclusive = Path()
        self._application = Application(self._root, random.Random(seed + 1))
        self._asked: list[grpc.Future[Any]] = []  # and not waited for

    def run(self, count: int) -> Tally:
        """Kill `count` times."""
        try:
            self._daemon.start()
            uuid = next(self._state.iterdir()).name
            self._exclusive = Path("/sys/fs/btrfs") / uuid / "exclusive_operation"
            self._application.spread()
            self._application.start()
            for number in range(1, count + 1):
                if faults := self._once(number):
                    self.tally.faults += [f"kill {number}: {fault}" for fault in faults]
                if number % CHECK_EVERY == 0 or number == count:
                    self._check(number)
        finally:
            self._application.stop()
            self._daemon.kill()
        self.tally.records = self._application.records
        return self.tally

    def _once(self, number: int) -> list[str]:
        dice, daemon = self._dice, self._daemon
        if dice.random() < 0.4 and size_of(self._root) == SIZE:
            daemon.report_free(1 << 50)
            self._application.spread()
        children = daemon.children(RESIZES)
        self._asked.clear()
        what = self._begin()
        if not self._victims:  # all of them come before any comes again: a few kills have each kind too
            self._victims = dice.sample(VICTIMS, len(VICTIMS))
        victims = self._victims.pop()
        time.sleep(dice.choice([0.0, dice.uniform(0, 0.01), dice.uniform(0, 0.3)]))
        self.tally.kills[f"{victims} in {what}"] += 1
        self.tally.resizing += self._exclusive.read_text(encoding="ascii").strip() in ("resize", "balance")
        faults = []
        if victims != "daemon":
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if victims == "child":
            # The daemon lives on, and says how its job ended; it may not even have heard of it yet.
            for asked in self._asked:
                asked.exception()
            daemon.wait_resized()
            faults += Recovery(daemon, self._root).truthful()
        else:
            daemon.kill()
            faults += [f"child {pid} outlives the daemon" for pid in children if not _gone(pid)]
            if dice.random() < 0.15:
                self._killed_as_it_starts()
            begun = time.monotonic()
            daemon.start()
            self.tally.slowest_s = max(self.tally.slowest_s, time.monotonic() - begun)
        recovery = Recovery(daemon, self._root)
        faults += recovery.truthful()
        job = daemon.report().job
        if what in ("shrink", "grow", "best effort"):
            self.tally.outcomes[f"{what} {storaged_v1_pb2.JobState.Name(job.state)}"] += 1
        faults += recovery.protected()
        if number % ALL_EVERY == 0:
            faults += recovery.reported(self._dice.choice([0, 150 * MIB, GIB]))
            faults += recovery.writable()
            faults += self._application.lost()
        return faults

    def _begin(self) -> str:
        """Start some work without waiting for its end; what it is."""
        dice, daemon = self._dice, self._daemon
        size = size_of(self._root)
        if dice.random() < 0.65:
            if size < SIZE * 3 // 4:
                whole = vm_guest_pb2.ResizeFilesystemRequest(size=SIZE)
                self._asked.append(daemon.maitred.ResizeFilesystem.future(whole, timeout=10))
                return "grow"
            if dice.random() < 0.4:
                further = storaged_v1_pb2.ResizeRequest(size_bytes=KERNEL_MINIMUM, best_effort=True)
                self._asked.append(daemon.storage.Resize.future(further, timeout=10))
                return "best effort"
            with contextlib.suppress(grpc.RpcError):  # below the minimum, which moves with what is written
                least = daemon.minimum()
                daemon.resize(least + dice.randrange(0, max((size - least) // 2, 1)))
            return "shrink"
        held = daemon.report().balloon.size_bytes
        limit = dice.choice([2 * GIB, 50 * GIB]) if held and dice.random() < 0.5 else dice.choice([0, 150 * MIB, GIB])
        request = vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_NORMAL, free_space_bytes=GIB + limit)
        self._asked.append(daemon.maitred.UpdateStorageBalloon.future(request, timeout=10))
        return "inflate" if limit < 2 * GIB else "deflate"

    def _killed_as_it_starts(self) -> None:
        """A crash in the recovery from a crash."""
        self._daemon.launch()
        time.sleep(self._dice.uniform(0, 0.6))
        self._daemon.kill()
        self.tally.kills["daemon in its start"] += 1

    def _check(self, number: int) -> None:
        self._application.stop()
        self._daemon.stop()
        self._guest.unmount()
        try:
            self._guest.check()
        except RuntimeError as error:
            self.tally.faults.append(f"kill {number}: btrfs check: {str(error)[-300:]}")
        self._guest.mount()
        self.tally.checks += 1
        self.tally.faults += self._application.lost()
        self._daemon.start()
        self._application.start()


def _gone(pid: int) -> bool:
    """True once the process has ended, which a moment's patience is allowed for."""
    until = time.monotonic() + GOES_WITHIN_S
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def main(count: int, seed: int = 1) -> int:
    """Kill `count` times; 1 when anything was wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is cleared
    private_mounts()
    sweep(memory())
    with workspace(memory()) as directory:
        tally = Killer(directory, seed).run(count)
    for fault in tally.faults:
        print(f"FAULT {fault}")
    print(tally)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
