"""A disk, a filesystem and a daemon of its own for every test; nothing is left behind, also by a test that fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import loop
from lab.daemon import Daemon
from lab.loop import Guest
from storaged.btrfs.system import ProcSysctl
from storaged.core.model import DirtyLimits
from tests.btrfs.support import QUIET, Figures
from tests.conftest import why_no_btrfs

MakeGuest = Callable[..., Guest]
MakeDaemon = Callable[..., Daemon]
COLLECTED = pytest.StashKey[Figures]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What the runs hit stands at their end, also when all of them pass."""
    collected = config.stash.get(COLLECTED, None)
    if collected is not None and collected.shown:
        terminalreporter.section("counts")
        for line in collected.shown:
            terminalreporter.write_line(line)


def default_limits() -> DirtyLimits:
    """The kernel's own write-back limits (mm/page-writeback.c)."""
    return DirtyLimits(0, 0, 20, 10)


@pytest.fixture(scope="session", autouse=True)
def clean_machine() -> Iterator[None]:
    """What killed runs left is cleared; the machine's write-back limits are put back whatever the tests do."""
    if why_no_btrfs():
        yield
        return
    loop.sweep()
    loop.sweep(loop.memory())
    sysctl = ProcSysctl()
    found = sysctl.dirty_limits()
    if found.dirty_bytes:  # a killed run's
        found = default_limits()
        sysctl.set_dirty_limits(found)
    yield
    sysctl.set_dirty_limits(found)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose mounts, loop devices and files are gone after the test."""
    with loop.workspace() as path:
        yield path


@pytest.fixture
def make_guest(place: Path) -> Iterator[MakeGuest]:
    """`make_guest(size, ...)`: a filesystem on a loop device, as `lab.loop.Guest` takes it."""
    made = 0

    def make(size: int, **options: object) -> Guest:
        nonlocal made
        made += 1
        return Guest(place / f"disk{made}", size, **options)  # type: ignore[arg-type]

    return make  # type: ignore[return-value]  # the workspace clears what it made


@pytest.fixture
def make_daemon(place: Path) -> Iterator[MakeDaemon]:
    """`make_daemon(guest, *arguments, config=TOML)`: a daemon on it that serves. Killed after the test if it runs."""
    made: list[Daemon] = []

    def make(
        guest: Guest, *arguments: str, config: str | None = QUIET, state: str = "state", managed: bool = True
    ) -> Daemon:
        # A directory per guest and state: a second daemon made for the same guest finds the first one's journal.
        directory = place / f"{guest.image.parent.name}-{state}"
        directory.mkdir(exist_ok=True)
        options: tuple[str, ...] = ()
        if config is not None:
            (directory / "storaged.toml").write_text(config, encoding="utf-8")
            options = ("--config", str(directory / "storaged.toml"))
        daemon = Daemon(directory, *options, *arguments, stateful=guest.mountpoint)
        made.append(daemon)
        return daemon.start(managed=managed)

    yield make
    for daemon in made:
        daemon.kill()


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Iterator[Figures]:
    """Measured figures, appended to the file that STORAGED_FIGURES names."""
    pytestconfig.stash[COLLECTED] = collected = Figures()
    yield collected
    path = os.environ.get("STORAGED_FIGURES")
    if path:
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in collected.lines)
