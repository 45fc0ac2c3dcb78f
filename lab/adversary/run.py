"""One run: guests, agents, the host's own doings, and the controller between them."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc

from lab.adversary import host as hosts
from lab.adversary.agents import NAMES as AGENTS
from lab.adversary.agents import Agents
from lab.adversary.applications import Application, Preallocator, SmallFiles, Swap, Writer
from lab.adversary.fairness import HUNGRY_S, Watch
from lab.adversary.figures import Figures
from lab.adversary.host import GROWN, RESERVE, SHRUNK, Pool
from lab.daemon import Daemon
from lab.host import HostDaemon
from lab.loop import Guest, clear, fill, host_disk, run
from lab.recovery import QUIET
from storaged.units import GIB, MIB

ATTACKERS = ("preallocation", "swap", "small-files", "shrinks", "copies", "agents", "pid-file", "moved-image")
SMALL_DISK, LARGE_DISK = 3 * GIB, 7 * GIB
PROMISED = 4 * GIB
IDLE, RESIZED, LIAR = "idle", "resized", "liar"
FAIRNESS_EVERY_S = 0.5
OVERRUN = re.compile(r": (\S+) wrote .* more than it was granted")


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


def _applications(
    guests: dict[str, Guest], attackers: Collection[str], figures: Figures, seed: int
) -> dict[str, list[Application]]:
    found: dict[str, list[Application]] = {
        name: [Writer(guests[name].mountpoint, figures, seed + number)] for number, name in enumerate(("a", "b"))
    }
    if "preallocation" in attackers:
        found["p"] = [Preallocator(guests["p"].mountpoint, figures, seed)]
    if "swap" in attackers:
        found.setdefault("p", []).append(Swap(guests["p"].mountpoint, figures, seed))
    if "small-files" in attackers:
        found["s"] = [SmallFiles(guests["s"].mountpoint, figures, seed)]
    return found


def _names(attackers: Collection[str]) -> list[str]:
    names = ["a", "b", IDLE]
    names += ["p"] if {"preallocation", "swap"} & set(attackers) else []
    names += ["s"] if "small-files" in attackers else []
    return names + ([RESIZED] if "shrinks" in attackers else [])


def _again(work: Callable[[int], None], over: threading.Event) -> threading.Thread:
    def loop() -> None:
        number = 0
        while not over.is_set():
            work(number)
            number += 1

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def _diced(work: Callable[[random.Random], None], dice: random.Random) -> Callable[[int], None]:
    return lambda _: work(dice)


def attack(
    directory: Path,
    seconds: float,
    seed: int,
    *,
    controlled: bool,
    attackers: Collection[str] = (),
    size: int | None = None,
    enough: Callable[[Figures], bool] | None = None,
) -> Figures:
    """One run in `directory`; its figures. Ends before `seconds` when there is `enough`. Cleared on the way out."""
    figures = Figures()
    size = size or (LARGE_DISK if attackers else SMALL_DISK)
    pool = Pool(host_disk(directory, size), size, figures)
    try:
        with ExitStack() as stack:
            guests = {name: Guest(pool.path / name, PROMISED) for name in _names(attackers)}
            daemons = {}
            quiet = directory / "guest.toml"
            quiet.write_text(QUIET)
            for name, guest in guests.items():
                (directory / name).mkdir()
                options = ("--config", str(quiet), "--metrics", "127.0.0.1:0")
                daemon = Daemon(directory / name, *options, stateful=guest.mountpoint)
                daemons[name] = stack.enter_context(daemon)
            if RESIZED in guests:
                fill(guests[RESIZED].mountpoint / "data", 300 * MIB)
            stack.enter_context(hosts.machine(directory / "a.pid"))
            others = Agents(directory, pool.path, figures, seed) if "agents" in attackers else None
            if others is not None:
                stack.callback(others.close)
            config = _config(directory, pool.path, guests, others, pid_file="pid-file" in attackers)
            host = HostDaemon(config, directory / "host.log", directory / "host.sock")
            if controlled:
                host.start()
                stack.callback(host.end)
                _until_told(list(daemons.values()))
            idle = Idle(guests[IDLE], daemons.pop(IDLE), figures)
            storm = _Storm(random.Random(seed), pool, guests, daemons, host if controlled else None, attackers)
            ends = time.monotonic() + seconds
            storm.run(seed, lambda: time.monotonic() >= ends or (enough is not None and enough(figures)))
            idle.measure()
            _overruns(directory / "host.log", figures)
        for name, guest in guests.items():
            try:
                guest.unmount()
                guest.check()
            except RuntimeError as error:
                figures.checks.append(f"{name}: {str(error)[-100:]}")
    finally:
        clear(pool.path)
        clear(directory)
    return figures


def _config(directory: Path, pool: Path, guests: dict[str, Guest], others: Agents | None, *, pid_file: bool) -> Path:
    lines = [
        f'[serve]\nlisten = ["unix:{directory}/host.sock"]\n[pool.p]\npath = "{pool}"\n',
        f'[sharing]\nreserve_least = "{RESERVE}"\nbase = "128MiB"\n[resize]\nstate_dir = "{directory}/host-state"\n',
    ]
    for name, guest in guests.items():
        lines.append(f'[guest.{name}]\naddress = "unix:{directory}/{name}/storaged.sock"\nimage = "{guest.image}"\n')
        if pid_file and name == "a":
            lines.append(f'pid_file = "{directory}/a.pid"\n')
    if others is not None:
        for name in AGENTS:
            address, image = others.address(name), others.images[name]
            lines.append(f'[guest.{name}]\naddress = "unix:{address}"\nimage = "{image}"\ntrust_balloon = true\n')
    path = directory / "host.toml"
    path.write_text("".join(lines))
    return path


def _until_told(daemons: list[Daemon]) -> None:
    ends = time.monotonic() + 30
    while not all(daemon.report().pressure.host_free_bytes for daemon in daemons):
        if time.monotonic() > ends:
            raise RuntimeError("the controller told nobody anything")
        time.sleep(0.2)


def _overruns(log: Path, figures: Figures) -> None:
    if log.exists():
        found = OVERRUN.findall(log.read_text(encoding="utf-8"))
        figures.fenced = found.count(LIAR)
        figures.overruns.update(name for name in found if name != LIAR)


@dataclass(slots=True)
class _Storm:
    """Everybody at once."""

    dice: random.Random
    pool: Pool
    guests: dict[str, Guest]
    daemons: dict[str, Daemon]
    host: HostDaemon | None
    attackers: Collection[str]
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, seed: int, ends: Callable[[], bool]) -> None:
        """Until `ends`; then everything is read back."""
        figures = self.pool.figures
        applications = _applications(self.guests, self.attackers, figures, seed)
        everyone = [each for found in applications.values() for each in found]
        threads = [_again(each, self.over) for each in everyone]
        try:
            threads += [_again(work, self.over) for work in self._host_work()]
            self._watch(applications, ends)
        finally:
            self.over.set()
            for thread in threads:
                thread.join(100)
        for each in everyone:
            each.verify()
        for guest in self.guests.values():
            stats = run("btrfs", "device", "stats", guest.mountpoint)
            errors = sum(int(line.split()[-1]) for line in stats.splitlines())
            if errors:
                figures.lost(f"{guest.mountpoint.name} device stats", errors)

    def _host_work(self) -> list[Callable[[int], None]]:
        """What the host does all the time, each in a thread of its own."""
        figures, pool, directory = self.pool.figures, self.pool, self.pool.path.parent
        works: list[Callable[[random.Random], None]] = [partial(hosts.burst, pool)]
        if "copies" in self.attackers:
            works.append(partial(hosts.copy, pool))
        if self.host is not None and "shrinks" in self.attackers:
            host = self.host
            works.append(lambda dice: hosts.resize(host, RESIZED, (SHRUNK, GROWN), dice, figures))
        if "pid-file" in self.attackers:
            works.append(lambda dice: hosts.lose_pid_file(directory / "a.pid", dice, figures))
        if "moved-image" in self.attackers:
            works.append(lambda dice: hosts.move_image(self.guests["b"].image, dice, pool))
        return [_diced(work, random.Random(self.dice.random())) for work in works]

    def _watch(self, applications: dict[str, list[Application]], ends: Callable[[], bool]) -> None:
        figures, fairness = self.pool.figures, Watch()
        kill_at = time.monotonic() + self.dice.uniform(2, 6)
        look_at = 0.0
        while not ends():
            free = self.pool.free()
            figures.least_free = min(figures.least_free, free)
            figures.host_full += free == 0
            now = time.monotonic()
            if self.host is not None and now >= kill_at:
                hosts.kill(self.host, self.daemons, self.dice, self.pool)
                fairness.forget()
                kill_at = time.monotonic() + self.dice.uniform(2, 8)
            if self.host is not None and now >= look_at:
                look_at = now + FAIRNESS_EVERY_S
                hungry = {
                    name: any(now - each.hungry_at < HUNGRY_S for each in found) for name, found in applications.items()
                }
                self._fair(self.host, fairness, hungry)
            time.sleep(0.01)
        figures.unfair_s = fairness.longest

    def _fair(self, host: HostDaemon, fairness: Watch, hungry: dict[str, bool]) -> None:
        try:
            if host.pool().HasField("promise_holds"):
                fairness.look(host.guests(), hungry)
            else:  # an image is not where it was: nobody may grow
                fairness.forget()
        except (grpc.RpcError, RuntimeError):
            fairness.forget()
