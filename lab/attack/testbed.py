"""Guests and daemons of one scenario, and how everything is cleaned up after it."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from lab.daemon import Daemon
from lab.loop import Guest, run, workspace
from lab.recovery import QUIET
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB

NORMAL, LOW, CRITICAL = vm_guest_pb2.DISK_NORMAL, vm_guest_pb2.DISK_LOW, vm_guest_pb2.DISK_CRITICAL
SUCCESS = vm_guest_pb2.SUCCESS
PLENTY = 1 << 50
PLACES = {"shm": "/dev/shm", "disk": tempfile.gettempdir()}
DIRTY = Path("/proc/sys/vm")


class Testbed:
    """What a scenario works with. Everything that it makes is gone when the `with opened_testbed(...)` block ends."""

    __test__ = False

    def __init__(self, directory: Path, stack: ExitStack, place: str, seed: int, *, quick: bool, name: str) -> None:
        self.directory = directory
        self.place = place
        self.dice = random.Random(f"{seed} {name}")
        self.quick = quick
        self._stack = stack
        self._name = name
        self._made = 0

    def tries(self, quick: int, thorough: int) -> int:
        """How often to repeat what does not fail each time."""
        return quick if self.quick else thorough

    def say(self, **values: object) -> None:
        """Print one line of counts; integers that are multiples of bytes should be given in MiB by the caller."""
        print(
            f"  {self._name} [{self.place}] " + " ".join(f"{key}={value}" for key, value in values.items()), flush=True
        )

    def finally_do(self, work: Callable[[], object]) -> None:
        """Call `work` at the end, whatever happens; its errors are suppressed."""

        def quietly() -> None:
            with contextlib.suppress(OSError, RuntimeError):
                work()

        self._stack.callback(quietly)

    def guest(self, size: int, *, mkfs: tuple[str, ...] = (), mount: str = "", device_size: int | None = None) -> Guest:
        """A mounted btrfs on a sparse image."""
        self._made += 1
        guest = Guest(self.directory / f"disk{self._made}", size, mkfs=mkfs, mount=mount, device_size=device_size)
        self.finally_do(guest.close)
        return guest

    def close(self, guest: Guest) -> None:
        """The guest is done with: its image need not take room any longer."""
        with contextlib.suppress(RuntimeError):
            guest.close()
        guest.image.unlink(missing_ok=True)

    def daemon(
        self, guest: Guest, *arguments: str, config: str | None = QUIET, state: str = "state", at: Path | None = None
    ) -> Daemon:
        """A daemon that serves `guest`, mounted at `at`. With `config` None its settings are the defaults."""
        directory = self.directory / f"{guest.image.parent.name}-{state}"
        directory.mkdir(exist_ok=True)
        options: tuple[str, ...] = ()
        if config is not None:
            (directory / "storaged.toml").write_text(config, encoding="utf-8")
            options = ("--config", str(directory / "storaged.toml"))
        daemon = Daemon(directory, *options, *arguments, stateful=at or guest.mountpoint)
        self.finally_do(daemon.kill)
        return daemon.start()


@contextlib.contextmanager
def opened_testbed(name: str, place: str, seed: int, *, quick: bool) -> Iterator[Testbed]:
    """A testbed whose images lie at `place`."""
    with workspace(PLACES[place]) as directory, _write_back_limits(), ExitStack() as stack:
        yield Testbed(directory, stack, place, seed, quick=quick, name=name)


@contextlib.contextmanager
def _write_back_limits() -> Iterator[None]:
    """Put the machine's write-back limits back: a daemon that is killed at LOW leaves them lowered."""
    pairs = (("dirty_bytes", "dirty_ratio"), ("dirty_background_bytes", "dirty_background_ratio"))
    found = {name: (DIRTY / name).read_text(encoding="ascii") for pair in pairs for name in pair}
    try:
        yield
    finally:
        for pair in pairs:
            for name in pair:
                if int(found[name]):
                    (DIRTY / name).write_text(found[name], encoding="ascii")


def report(daemon: Daemon, limit: int, level: int = NORMAL) -> bool:
    """Tell the daemon a host's free space that leaves `limit` to applications; True when it answers SUCCESS."""
    return daemon.report_free(GIB + limit, level) == SUCCESS


def mib(size: float) -> int:
    """Mebibytes, for printed counts."""
    return round(size / MIB)


def why(daemon: Daemon) -> str:
    """What the daemon says of its balloon, for a fault's text."""
    balloon = daemon.report().balloon
    parts = [balloon.failure_reason or "no reason", f"balloon {mib(balloon.size_bytes)} MiB"]
    unwritten = f"{mib(balloon.unwritten_bytes)} MiB" if balloon.HasField("unwritten_bytes") else "not known"
    parts += [f"unwritten {unwritten}", f"may write {mib(balloon.may_write_bytes)} MiB"]
    return ", ".join(parts)


def until(condition: Callable[[], bool], within_s: float, pause_s: float = 0.05) -> bool:
    """Wait for `condition`; False when it did not hold within the time."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause_s)
    return True


def sync(guest: Guest) -> None:
    """Commit the guest's filesystem."""
    run("btrfs", "filesystem", "sync", guest.mountpoint)


def mounted_at(bed: Testbed, guest: Guest, name: str, options: str) -> Path:
    """Mount the guest's filesystem a second time."""
    path = bed.directory / name
    path.mkdir(exist_ok=True)
    run("mount", "-o", options, guest.device, path)
    bed.finally_do(lambda: os.path.ismount(path) and run("umount", path))
    return path
