"""Two guests write all they can on a disk that was promised to both, while everything around them misbehaves.

    python -m lab.adversary [--seconds N] [--seed N] [--without]

A host process takes and frees space in bursts; the controller and the guests' daemons are killed with kill -9 and
started again. At the end: I/O errors in the guests, how often the host was full, whether every durable file is whole.
`--without` runs the same without a controller: the figures show what it is for. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lab.daemon import Daemon
from lab.host import HostDaemon
from lab.loop import Guest, clear, host_disk, run, workspace
from lab.recovery import QUIET
from storaged.host.watch import FilesystemSource
from storaged.units import GIB, MIB

DISK = 3 * GIB
PROMISED = 4 * GIB
IDLE = "idle"
RESERVE = 512 * MIB
BLOCK = 8 * MIB
IDLE_GROWTH = MIB
"""Bytes of the image of an idle guest that one report may cost."""
BURST = RESERVE // 4
"""A host's own writers: what a sharer can withstand is half the reserve (see docs/sharing.md)."""


@dataclass(slots=True)
class Figures:
    """What happened."""

    written: int = 0
    enospc: int = 0
    io_errors: int = 0
    damaged: int = 0
    whole: int = 0
    host_full: int = 0
    least_free: int = DISK
    bursts: int = 0
    idle_growth: int = 0
    """Bytes by which the image of a guest without applications grew in `idle_reports` reports."""
    idle_reports: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {"controller": 0, "daemon": 0})
    checks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.written / GIB:.1f} GiB written, ENOSPC {self.enospc} times; I/O errors {self.io_errors};"
            f" files whole {self.whole}, damaged {self.damaged}; host full {self.host_full} times, least free"
            f" {self.least_free // MIB} MiB; {self.bursts} bursts; kills {self.kills};"
            f" idle guest: image {self.idle_growth / MIB:+.1f} MiB in {self.idle_reports} reports;"
            f" btrfs check {'; '.join(self.checks) or 'clean'}"
        )

    @property
    def unharmed(self) -> bool:
        """Nothing was lost, and the host never ran out."""
        idle = self.idle_growth <= IDLE_GROWTH * self.idle_reports
        return idle and not (self.io_errors or self.damaged or self.host_full or self.checks)


class Idle:
    """A guest without applications: whatever its image takes is the balloon's own doing."""

    def __init__(self, guest: Guest, daemon: Daemon, figures: Figures) -> None:
        self._guest = guest
        self._daemon = daemon
        self._figures = figures
        self._reports = self._told()
        self._image = guest.host_bytes()

    def _told(self) -> int:
        results = ("success", "failed", "ignored")
        return int(sum(self._daemon.metric(f'storaged_balloon_updates_total{{result="{one}"}}') for one in results))

    def measure(self) -> None:
        """Note what has been since it was made."""
        self._figures.idle_growth = self._guest.host_bytes() - self._image
        self._figures.idle_reports = self._told() - self._reports


class Writer:
    """Applications of one guest: durable files until there is no room, then half of them are deleted, and on."""

    def __init__(self, guest: Guest, figures: Figures, seed: int) -> None:
        self._root = guest.mountpoint
        self._figures = figures
        self._dice = random.Random(seed)
        self._kept: dict[Path, str] = {}

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
            self._kept[path] = hashlib.sha256(data).hexdigest()
            self._figures.written += BLOCK
        except OSError as error:
            with contextlib.suppress(OSError):  # the filesystem may be read-only since
                path.unlink(missing_ok=True)
            # What was accepted and then could not be written met a full host: a loop device passes that on as ENOSPC,
            # a virtual disk as EIO. An honest ENOSPC comes before.
            if accepted or error.errno != errno.ENOSPC:
                self._figures.io_errors += 1
                time.sleep(0.1)
                return
            self._figures.enospc += 1
            if self._dice.random() < 0.3:
                for old in self._dice.sample(sorted(self._kept), len(self._kept) // 2):
                    del self._kept[old]
                    old.unlink()
            time.sleep(0.2)

    def verify(self) -> None:
        """Read everything back."""
        for path, digest in self._kept.items():
            try:
                same = hashlib.sha256(path.read_bytes()).hexdigest() == digest
            except OSError:
                same = False
            self._figures.whole += same
            self._figures.damaged += not same


def _burst(pool: Path, dice: random.Random, figures: Figures) -> None:
    path = pool / "burst"
    try:
        with path.open("wb") as file:
            for _ in range(dice.randrange(BURST // 4, BURST) // MIB):
                file.write(bytes(MIB))
            file.flush()
            os.fsync(file.fileno())
        figures.bursts += 1
    except OSError:
        figures.host_full += 1
    time.sleep(dice.uniform(0.5, 3))
    path.unlink(missing_ok=True)
    time.sleep(dice.uniform(0.5, 3))


def _again(work: Callable[[int], None], over: threading.Event) -> threading.Thread:
    def loop() -> None:
        number = 0
        while not over.is_set():
            work(number)
            number += 1

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def _config(pool: Path, guests: dict[str, Guest]) -> Path:
    lines = [f'[pool.p]\npath = "{pool}"\n[sharing]\nreserve_least = "{RESERVE}"\nbase = "128MiB"\n']
    lines.append(f'[resize]\nstate_dir = "{pool.parent}/host-state"\n')
    for name, guest in guests.items():
        lines.append(f'[guest.{name}]\naddress = "unix:{pool.parent}/{name}/storaged.sock"\nimage = "{guest.image}"\n')
    path = pool.parent / "host.toml"
    path.write_text("".join(lines))
    return path


def attack(
    directory: Path, seconds: float, seed: int, *, controlled: bool, enough: Callable[[Figures], bool] | None = None
) -> Figures:
    """One run in `directory`; its figures. Ends before `seconds` when there is `enough`. Cleared on the way out."""
    figures, dice = Figures(), random.Random(seed)
    pool = host_disk(directory, DISK)
    try:
        with ExitStack() as stack:
            guests = {name: Guest(pool / name, PROMISED) for name in ("a", "b", IDLE)}
            daemons = {}
            quiet = directory / "guest.toml"
            quiet.write_text(QUIET)
            for name, guest in guests.items():
                (directory / name).mkdir()
                options = ("--config", str(quiet), "--metrics", "127.0.0.1:0")
                daemon = Daemon(directory / name, *options, stateful=guest.mountpoint)
                daemons[name] = stack.enter_context(daemon)
            host = HostDaemon(_config(pool, guests), directory / "host.log")
            if controlled:
                host.start()
                stack.callback(host.end)
                _until_told(list(daemons.values()))
            over = threading.Event()
            ends = time.monotonic() + seconds
            idle = Idle(guests[IDLE], daemons.pop(IDLE), figures)
            try:
                storm = _Storm(dice, figures, pool, guests, daemons, host if controlled else None)
                storm.run(lambda: time.monotonic() >= ends or (enough is not None and enough(figures)), over)
                idle.measure()
            finally:
                over.set()
        for name, guest in guests.items():
            try:
                guest.unmount()
                guest.check()
            except RuntimeError as error:
                figures.checks.append(f"{name}: {str(error)[-100:]}")
    finally:
        clear(pool)
        clear(directory)
    return figures


def _until_told(daemons: list[Daemon]) -> None:
    ends = time.monotonic() + 30
    while not all(daemon.report().pressure.host_free_bytes for daemon in daemons):
        if time.monotonic() > ends:
            raise RuntimeError("the controller told nobody anything")
        time.sleep(0.2)


@dataclass(slots=True)
class _Storm:
    """Everybody at once."""

    dice: random.Random
    figures: Figures
    pool: Path
    guests: dict[str, Guest]
    daemons: dict[str, Daemon]
    host: HostDaemon | None

    def run(self, ends: Callable[[], bool], over: threading.Event) -> None:
        """Until `ends`; then everything is read back."""
        busy = [guest for name, guest in self.guests.items() if name != IDLE]
        writers = [Writer(guest, self.figures, number) for number, guest in enumerate(busy)]
        threads = [_again(writer, over) for writer in writers]
        bursts = random.Random(self.dice.random())
        threads.append(_again(lambda _: _burst(self.pool, bursts, self.figures), over))
        kill_at = time.monotonic() + self.dice.uniform(2, 6)
        while not ends():
            free = FilesystemSource(str(self.pool)).free()
            self.figures.least_free = min(self.figures.least_free, free)
            self.figures.host_full += free == 0
            if self.host is not None and time.monotonic() >= kill_at:
                self._kill(self.host)
                kill_at = time.monotonic() + self.dice.uniform(2, 8)
            time.sleep(0.01)
        over.set()
        for thread in threads:
            thread.join(60)
        for writer in writers:
            writer.verify()
        for guest in self.guests.values():
            stats = run("btrfs", "device", "stats", guest.mountpoint)
            self.figures.io_errors += sum(int(line.split()[-1]) for line in stats.splitlines())

    def _kill(self, host: HostDaemon) -> None:
        if self.dice.random() < 0.5:
            host.end()
            self.figures.kills["controller"] += 1
            time.sleep(self.dice.uniform(0, 1.5))
            host.start()
        else:
            daemon = self.daemons[self.dice.choice(sorted(self.daemons))]
            daemon.kill()
            self.figures.kills["daemon"] += 1
            time.sleep(self.dice.uniform(0, 1.5))
            daemon.start()


def main() -> int:
    """Run it, print the figures; 1 when anybody was harmed though there was a controller."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", action="store_true", help="without a controller")
    arguments = parser.parse_args()
    with workspace() as directory:
        figures = attack(directory, arguments.seconds, arguments.seed, controlled=not arguments.without)
    print(f"adversary, {'no controller' if arguments.without else 'with the controller'}: {figures}")
    return 0 if figures.unharmed or arguments.without else 1


if __name__ == "__main__":
    sys.exit(main())
