"""The storm: random reports against writers, commands and kills; after every SUCCESS the answer is checked."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator

import grpc

from lab.attack.commands import COMMANDS
from lab.attack.oracle import (
    NEAR,
    SHOWN,
    SLACK,
    Allocation,
    available,
    data_chunk,
    fill_really,
    image_bytes,
    judged,
    over,
    reach,
)
from lab.attack.storm import balance
from lab.attack.storm.applications import Applications
from lab.attack.storm.writers import STEPS
from lab.attack.testbed import CRITICAL, LOW, NORMAL, Testbed, mib, report, until, why
from lab.loop import run
from storaged.units import GIB, MIB

SIZE = 4 * GIB
PROFILES: tuple[tuple[str, ...], ...] = (
    (),
    ("-m", "single"),
    ("-m", "dup", "-d", "dup"),
    ("--mixed",),
    ("--nodesize", "4096"),
    ("-m", "single", "--nodesize", "4096"),
)
REST_EVERY_S = (8.0, 15.0)
KILL_EVERY_S = (4.0, 10.0)
COMMAND_EVERY_S = (0.5, 4.0)
PER_REPORT = MIB
IDLE_REPORTS = 3
RESTORED_WITHIN_S = 3.0
SCRUB_MET = re.compile(r"errs: wr 0, rd 0, flush 0, corrupt 0, gen [1-9]")


class Storm:
    """One guest, its daemon and everybody else."""

    def __init__(self, bed: Testbed, mkfs: tuple[str, ...]) -> None:
        self._bed = bed
        self._dice = bed.dice
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.idle_growth: list[float] = []
        self._log_before = set(_kernel_log())
        self._guest = bed.guest(SIZE, mkfs=mkfs)
        self._chunk = data_chunk(self._guest)
        self._daemon = bed.daemon(self._guest)
        self.applications = Applications(self._guest.mountpoint, self._dice.randrange(1 << 30), STEPS)
        self._hands = threading.Lock()
        self._over = threading.Event()
        self._promised: int | None = None
        self._when_read_only: list[str] = []
        """Faults that were found while the filesystem was read-only."""
        self._named = False
        """The kernel has forced the filesystem read-only in the way that docs/promise.md names: the storm is over."""

    def run(self, seconds: float) -> None:
        """All of it."""
        end = time.monotonic() + seconds
        commands = threading.Thread(target=self._command, args=(random.Random(self._dice.random()),), daemon=True)
        self.applications.start()
        commands.start()
        kill_at = time.monotonic() + self._dice.uniform(*KILL_EVERY_S)
        rest_at = time.monotonic() + self._dice.uniform(*REST_EVERY_S)
        try:
            while time.monotonic() < end and not self._over.is_set():
                self._report()
                if time.monotonic() > kill_at:
                    self._kill()
                    kill_at = time.monotonic() + self._dice.uniform(*KILL_EVERY_S)
                if time.monotonic() > rest_at:
                    with self._at_rest():
                        self._rest()
                    rest_at = time.monotonic() + self._dice.uniform(*REST_EVERY_S)
                time.sleep(self._dice.uniform(0, 0.3))
        except RuntimeError:
            self._over.set()
            commands.join(120)  # it knows whether the filesystem became read-only in the named case
            if not self._named:
                raise
        finally:
            self._over.set()
            self.applications.stop()
            commands.join(120)
        self._end()

    def _fault(self, kind: str, text: str) -> None:
        self.counts[f"violation: {kind}"] += 1
        read_only = os.statvfs(self._guest.mountpoint).f_flag & os.ST_RDONLY
        (self._when_read_only if read_only else self.faults).append(f"{kind}: {text}")

    def _allowed(self, limit: int, *, success: bool) -> None:
        """What the host has said is in force, also when it was answered FAILED: then the larger of both may be used."""
        if success:
            self._promised = limit
        elif self._promised is not None:
            self._promised = max(self._promised, limit)

    def _report(self) -> None:
        limit = self._dice.choice((0, 0, 64 * MIB, 300 * MIB, GIB, self._dice.randrange(2 * GIB), 1 << 40))
        level = self._dice.choice((NORMAL, LOW, CRITICAL))
        self.counts["reports"] += 1
        begun = time.monotonic()
        try:
            success = report(self._daemon, limit, level)
        except grpc.RpcError as error:
            self._fault("no answer", f"{error.code()} after {time.monotonic() - begun:.1f} s")
            return
        self.counts["successes" if success else "failures"] += 1
        self._allowed(limit, success=success)
        if not success:
            return
        taken = self._taken()
        more = over(self._guest, limit, self._chunk + NEAR, self.applications.unwritten, committed=True)
        if more and more > self._chunk + NEAR + (freed := max(taken - self._taken(), 0)):
            text = f"limit {mib(limit)} MiB, {mib(more)} MiB beyond it, {mib(freed)} MiB freed since"
            self._fault("false SUCCESS", f"{text} ({why(self._daemon)})")

    def _taken(self) -> int:
        """Host bytes of data that are not the balloon's: what is deleted after an answer may be written again."""
        allocation = Allocation(self._guest)
        return (allocation.data() - self._daemon.report().balloon.size_bytes) * allocation.copies()

    def _kill(self) -> None:
        self.counts["kills"] += 1
        self._daemon.kill()
        time.sleep(self._dice.choice((0.0, self._dice.uniform(0, 1))))
        try:
            self._daemon.start()
        except (RuntimeError, grpc.RpcError) as error:
            self._fault("no start", str(error)[-300:])
            return
        if self._promised is None:
            return
        limit = self._promised
        in_force = self._daemon.report().balloon
        if not in_force.HasField("limit_bytes") or in_force.limit_bytes > limit:
            self._fault("limit lost", f"{limit} promised, {in_force.limit_bytes} in force after a kill")

        def kept() -> bool:
            return not over(self._guest, limit, self._chunk + NEAR, self.applications.unwritten, committed=True)

        if not until(kept, RESTORED_WITHIN_S):
            self._fault("after a kill", f"limit {mib(limit)} MiB, {mib(reach(self._guest, 0) or 0)} MiB available")

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        with self.applications.paused(), self._hands:
            run("btrfs", "subvolume", "sync", self._guest.mountpoint)
            yield

    def _rest(self) -> None:
        """Nobody writes: idle reports, then a report that is checked by writing everything."""
        self.counts["rests"] += 1
        limit = self._dice.choice((0, 100 * MIB, 500 * MIB, GIB))
        unwritten = self.applications.unwritten()
        success = until(lambda: report(self._daemon, limit), 4, 0.5)
        self._allowed(limit, success=success)
        if not success:
            if unwritten + SLACK < limit:
                self._fault("FAILED at rest", f"limit {mib(limit)}, unwritten {mib(unwritten)}: {why(self._daemon)}")
            self.counts["FAILED at rest"] += 1
            return
        time.sleep(1)
        before = image_bytes(self._guest)
        answers = [report(self._daemon, limit, LOW) for _ in range(IDLE_REPORTS)]
        time.sleep(1)
        grown = image_bytes(self._guest) - before
        self.idle_growth.append(round(grown / MIB, 1))
        if grown > PER_REPORT * IDLE_REPORTS:
            self._fault("growth while idle", f"{grown / MIB:.1f} MiB in {IDLE_REPORTS} reports")
        if not all(answers):
            return
        with self.applications.lock:
            parts = list(self.applications.preallocated)
        shown = available(self._guest) or 0
        if (found := reach(self._guest, unwritten) or 0) > limit + SHOWN:
            self._fault(
                "false SUCCESS at rest", f"limit {mib(limit)}, available {mib(shown)}, can be written {mib(found)}"
            )
        growth = fill_really(self._guest, parts)
        self.counts["real fills"] += 1
        for fault in judged(growth, limit):
            self._fault("real fill", fault)

    def _command(self, dice: random.Random) -> None:
        while not self._over.wait(dice.uniform(*COMMAND_EVERY_S)):
            name = dice.choice(sorted(COMMANDS))
            with self._hands, balance.watched(str(self._guest.mountpoint), name) as looks:
                for command in COMMANDS[name]:
                    words = [str(self._guest.mountpoint) if word == "{}" else word for word in command]
                    done = subprocess.run(words, check=False, capture_output=True)
                    self.counts[f"{name}{' refused' if done.returncode else ''}"] += 1
            if any(look.starved for look in looks):
                self.counts[f"{name} starved metadata"] += 1
            if balance.forced_read_only(name, looks):
                self._named = True
                self.counts["named: forced read-only by a balance"] += 1
                self._over.set()

    def _end(self) -> None:
        guest = self._guest
        self.faults += [] if self._named else self._when_read_only
        errors = [text for text in self.applications.errors if not (self._named and os.strerror(errno.EROFS) in text)]
        self.faults += self.applications.verify() + errors[:5]
        self._daemon.kill()
        guest.unmount()
        try:
            guest.check()
        except RuntimeError as error:
            self._fault("btrfs check", str(error)[-300:])
        device = guest.device.rsplit("/", 1)[-1]
        bad = [line for line in _kernel_log() if line not in self._log_before and f"device {device}" in line]
        # A scrub that meets a block of metadata while it is rewritten counts a generation; `btrfs check` decides.
        self.counts["generations that a scrub counted"] += sum(SCRUB_MET.search(line) is not None for line in bad)
        bad = [line for line in bad if SCRUB_MET.search(line) is None]
        bad = [line for line in bad if any(word in line.lower() for word in self._bad_words())]
        for line in bad[:3]:
            self._fault("kernel log", line)

    def _bad_words(self) -> tuple[str, ...]:
        return ("corrupt",) if self._named else ("corrupt", "abort", "forced readonly")


def _kernel_log() -> list[str]:
    return subprocess.run(["dmesg"], check=False, capture_output=True, text=True).stdout.splitlines()


def storm(bed: Testbed, seconds: float) -> list[str]:
    """Writers of every kind, an administrator's commands, kills, and reports: every SUCCESS is checked."""
    faults: list[str] = []
    rounds = max(1, min(len(PROFILES), int(seconds // 60)))
    profiles = bed.dice.sample(PROFILES, rounds)
    for mkfs in profiles:
        one = Storm(bed, mkfs)
        try:
            one.run(seconds / rounds)
        finally:
            bed.say(mkfs=" ".join(mkfs) or "default", idle_growth_mib=one.idle_growth)
            bed.say(counts=dict(sorted(one.counts.items())))
            bed.say(applications=dict(sorted(one.applications.counts.items())))
        faults += one.faults
    return faults
