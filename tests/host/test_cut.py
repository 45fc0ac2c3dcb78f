"""A guest that grows its filesystem while its image is being cut loses nothing. A real loop device, a real btrfs."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from lab.loop import Guest, memory, run, workspace
from storaged.host import loop, superblock
from storaged.host.images import ImageError, WouldCut
from storaged.host.loop import LoopImage
from storaged.host.saga_model import Outcome, Stage
from storaged.units import GIB, MIB
from tests.btrfs.support import hashes
from tests.host.test_cut_machines import CUTTING, taken_up

pytestmark = pytest.mark.btrfs
SMALL, LARGE = 512 * MIB, GIB
ROUNDS = 40
GAPS = ["checked", "held", "flushed", "read", "cut", "confirmed", "released"]
QUICK = {"read", "cut"}
"""The gaps next to the cut; the others take minutes together."""
EACH_GAP = [gap if gap in QUICK else pytest.param(gap, marks=pytest.mark.slow) for gap in GAPS]


@pytest.fixture
def guest() -> Iterator[Guest]:
    """A filesystem that a shrink has just made smaller than its image, nearly full, with data left in the cut part."""
    with workspace(memory()) as directory:
        guest = Guest(directory / "g", LARGE, mkfs=("-m", "single", "-d", "single"), mount="nodiscard")
        _write(guest, "before", 150)
        _write(guest, "moved", 500)
        (guest.mountpoint / "moved").unlink()
        run("btrfs", "filesystem", "sync", guest.mountpoint)
        _shrink(guest)
        yield guest
        guest.close()


def _shrink(guest: Guest) -> None:
    """The filesystem to `SMALL`; what was deleted just before may still be in the way."""
    for left in range(20, -1, -1):
        run("btrfs", "filesystem", "sync", guest.mountpoint)
        try:
            run("btrfs", "filesystem", "resize", str(SMALL), guest.mountpoint)
            break
        except RuntimeError:
            if not left:
                raise
            time.sleep(0.2)
    run("btrfs", "filesystem", "sync", guest.mountpoint)


def _write(guest: Guest, name: str, mib: int) -> bool:
    """A file of random bytes that was fsynced; False, and no file, when there is no room."""
    path = guest.mountpoint / name
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)  # where nothing is left there was not even room for its name
        return False
    return True


def _grow(guest: Guest) -> bool:
    """As the guest's root may: to all of the device, and fill what that gives."""
    run("btrfs", "filesystem", "resize", "max", guest.mountpoint)
    for number in range(9):
        _write(guest, f"grown-{number}", 70)
    run("btrfs", "filesystem", "sync", guest.mountpoint)
    return superblock.read(str(guest.image)).size > SMALL


def _grew(guest: Guest) -> bool:
    """As `_grow`, and fills only what was won."""
    run("btrfs", "filesystem", "resize", "max", guest.mountpoint)
    run("btrfs", "filesystem", "sync", guest.mountpoint)
    return _grow(guest) if superblock.read(str(guest.image)).size > SMALL else _write(guest, "grown-0", 4) and False


def _sizes(guest: Guest) -> tuple[int, int]:
    return guest.image.stat().st_size, superblock.read(str(guest.image)).size


def _sound(guest: Guest, content: dict[str, str]) -> None:
    """What was fsynced is there, read from the image and not from memory; the device shows all of the image."""
    guest.unmount()
    assert int(run("blockdev", "--getsize64", guest.device)) == guest.image.stat().st_size
    assert not int(run("losetup", "-n", "-O", "SIZELIMIT", guest.device))
    assert str(guest.image) in run("losetup", "-n", "-O", "BACK-FILE", guest.device)
    guest.check()
    guest.mount()
    assert hashes(guest.mountpoint) == content


def test_a_guest_that_grows_between_the_check_and_the_cut_loses_nothing(guest: Guest) -> None:
    class Racing(LoopImage):
        async def _set(self, size: int) -> None:
            if size == SMALL:
                await asyncio.to_thread(_grow, guest)
            await super()._set(size)

    with contextlib.suppress(WouldCut):
        asyncio.run(Racing(str(guest.image)).shrink(SMALL))
    image, filesystem = _sizes(guest)
    assert image >= filesystem
    _sound(guest, hashes(guest.mountpoint))


@pytest.mark.parametrize("gap", EACH_GAP)
def test_a_guest_that_grows_in_any_gap_loses_nothing(guest: Guest, gap: str) -> None:
    met, grew = [], []

    async def between(step: str) -> None:
        met.append(step)
        if step == gap:
            grew.append(await asyncio.to_thread(_grow, guest))

    said = ""
    try:
        assert asyncio.run(LoopImage(str(guest.image), between).shrink(SMALL)) == SMALL
    except WouldCut as error:
        said = error.message
    assert grew == [gap == "checked"], "once the device is limited the guest's kernel refuses"
    if gap == "checked":
        assert met == ["checked", "held", "flushed"]
        assert said.endswith(f"was not cut to {SMALL} bytes and keeps its {LARGE}: its filesystem grew to {LARGE} "
                             "before the guest could be kept from it")  # fmt: skip
        assert _sizes(guest) == (LARGE, LARGE)
    else:
        assert (met, said) == (GAPS, "")
        assert _sizes(guest) == (SMALL, SMALL)
    _sound(guest, hashes(guest.mountpoint))


KILLED = """
import asyncio, os, signal, sys
from storaged.host.loop import LoopImage

async def between(step):
    if step == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(LoopImage(sys.argv[1], between).shrink(int(sys.argv[2])))
"""


def _killed(guest: Guest, gap: str) -> None:
    command = [sys.executable, "-c", KILLED, str(guest.image), str(SMALL), gap]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("gap", EACH_GAP)
def test_killed_in_any_gap_the_next_run_cuts_it(guest: Guest, gap: str) -> None:
    content = hashes(guest.mountpoint)
    _killed(guest, gap)
    limited = gap not in {"checked", "released"}
    assert int(run("losetup", "-n", "-O", "SIZELIMIT", guest.device)) == (SMALL if limited else 0)
    assert asyncio.run(LoopImage(str(guest.image)).shrink(SMALL)) == SMALL
    assert _sizes(guest) == (SMALL, SMALL)
    _sound(guest, content)


class _Calls:
    """Does `before(n)` before the n-th call that changes or flushes the device or the file."""

    def __init__(self, patch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
        self.count = 0
        self._before = before
        for owner, name in ((fcntl, "ioctl"), (os, "truncate"), (os, "fsync")):
            patch.setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, call: Callable[..., int]) -> Callable[..., int]:
        def counted(*arguments: object) -> int:
            if call is not _IOCTL or arguments[1] != loop._GET_STATUS64:
                number, self.count = self.count, self.count + 1
                self._before(number)
            return call(*arguments)

        return counted


_IOCTL = fcntl.ioctl
KILLED_AT = """
import asyncio, os, signal, sys
import pytest
from storaged.host.loop import LoopImage
from tests.host.test_cut import _Calls

def before(number):
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

_Calls(pytest.MonkeyPatch(), before)
asyncio.run(LoopImage(sys.argv[1]).shrink(int(sys.argv[2])))
"""


@pytest.mark.timeout(300)
def test_killed_between_any_two_calls_to_the_kernel_all_is_undone_and_nothing_lost(guest: Guest) -> None:
    content = hashes(guest.mountpoint)
    limited, cut = [], []
    for number in itertools.count():
        command = [sys.executable, "-c", KILLED_AT, str(guest.image), str(SMALL), str(number)]
        code = subprocess.run(command, check=False).returncode
        image, filesystem = _sizes(guest)
        assert image in {SMALL, LARGE}
        assert filesystem == SMALL
        if not code:
            break
        assert code == -signal.SIGKILL
        limited.append(bool(int(run("losetup", "-n", "-O", "SIZELIMIT", guest.device))))
        cut.append(image == SMALL)
        asyncio.run(LoopImage(str(guest.image)).recover(cutting=True))
        _sound(guest, content)
        asyncio.run(LoopImage(str(guest.image)).grow(LARGE))
    assert {(False, False), (True, False), (True, True), (False, True)} == set(zip(limited, cut, strict=True))
    assert len(cut) >= 12


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_guest_that_grows_between_any_two_calls_to_the_kernel_loses_nothing(guest: Guest) -> None:
    outcomes = []
    for number in itertools.count():
        grew = False

        def before(call: int, wanted: int = number) -> None:
            nonlocal grew
            if call == wanted:
                grew = _grew(guest)

        said = ""
        with pytest.MonkeyPatch.context() as patch:
            calls = _Calls(patch, before)
            try:
                asyncio.run(LoopImage(str(guest.image)).shrink(SMALL))
            except WouldCut as error:
                said = error.message
        image, filesystem = _sizes(guest)
        assert image >= filesystem, number
        assert bool(said) == grew, "a filesystem that grew is never cut"
        assert ("was not cut" in said) == grew
        outcomes.append(grew)
        _sound(guest, hashes(guest.mountpoint))
        if calls.count <= number:
            break
        for path in guest.mountpoint.glob("grown-*"):
            path.unlink()
        run("btrfs", "filesystem", "sync", guest.mountpoint)
        _shrink(guest)
        asyncio.run(LoopImage(str(guest.image)).grow(LARGE))
    assert outcomes[0], "before the limit it grows"
    assert not any(outcomes[2:]), "and never behind it"


def _cut(work: LoopImage) -> str:
    try:
        asyncio.run(work.shrink(SMALL))
    except WouldCut as error:
        return error.message
    return "cut"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_guest_that_grows_all_the_while_loses_nothing(guest: Guest) -> None:
    """Its resize races with the limit: what had passed the kernel's check before is seen before the cut."""
    outcomes: list[str] = []
    work = LoopImage(str(guest.image))
    while len(outcomes) < ROUNDS:
        stop = threading.Event()

        def grows(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                with contextlib.suppress(RuntimeError):
                    run("btrfs", "filesystem", "resize", "max", guest.mountpoint)

        thread = threading.Thread(target=grows)
        thread.start()
        try:
            time.sleep(len(outcomes) % 20 / 1000)  # one of these meets the limit
            outcomes.append(_cut(work))
        finally:
            stop.set()
            thread.join()
        image, filesystem = _sizes(guest)
        assert image >= filesystem
        _sound(guest, hashes(guest.mountpoint))
        _shrink(guest)
        asyncio.run(work.grow(LARGE))
    print(*(f"{outcomes.count(each)}: {each}" for each in sorted(set(outcomes))), sep="\n")  # noqa: T201  # with -rP
    assert "cut" in outcomes, outcomes
    assert not any("reads as zeros" in outcome for outcome in outcomes), outcomes


@pytest.mark.parametrize("gap", ["held", "cut"])
@pytest.mark.parametrize("work", ["check", "grow", "recover"])
def test_killed_in_a_gap_nothing_else_is_held_up(guest: Guest, gap: str, work: str) -> None:
    content = hashes(guest.mountpoint)
    _killed(guest, gap)
    backend = LoopImage(str(guest.image))
    match work:
        case "check":
            asyncio.run(backend.check())
        case "recover":
            asyncio.run(backend.recover(cutting=True))
        case "grow":
            assert asyncio.run(backend.grow(2 * LARGE)) == 2 * LARGE
    _sound(guest, content)


@pytest.mark.parametrize("gap", ["held", "confirmed"])
@pytest.mark.parametrize("journal", [True, False])
def test_killed_in_a_gap_the_next_daemon_removes_the_limit(guest: Guest, gap: str, journal: bool) -> None:
    content = hashes(guest.mountpoint)
    _killed(guest, gap)
    ended = replace(CUTTING, stage=Stage.ENDED, outcome=Outcome.FAILED)
    asyncio.run(taken_up(guest.image.parent, LoopImage(str(guest.image)), ended if journal else None))
    _sound(guest, content)


def test_the_next_guest_that_grows_finds_the_limit_gone(guest: Guest) -> None:
    _killed(guest, "held")
    asyncio.run(LoopImage(str(guest.image)).recover(cutting=True))
    assert _grow(guest)
    with pytest.raises(WouldCut):
        asyncio.run(LoopImage(str(guest.image)).shrink(SMALL))
    _sound(guest, hashes(guest.mountpoint))


def test_a_cut_that_is_cancelled_leaves_no_limit(guest: Guest) -> None:
    async def cancelled() -> None:
        reached = asyncio.Event()

        async def between(step: str) -> None:
            if step == "held":
                reached.set()
                await asyncio.sleep(0.1)

        task = asyncio.create_task(LoopImage(str(guest.image), between).shrink(SMALL))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    content = hashes(guest.mountpoint)
    asyncio.run(cancelled())
    _sound(guest, content)


def test_a_limit_that_somebody_else_set_is_refused(guest: Guest) -> None:
    content = hashes(guest.mountpoint)
    guest.unmount()
    guest.detach()
    guest.device = run("losetup", "--show", "-f", "--sizelimit", str(SMALL), guest.image)
    backend = LoopImage(str(guest.image))
    for work in (backend.check(), backend.shrink(SMALL), backend.grow(2 * LARGE), backend.recover(cutting=True)):
        with pytest.raises(ImageError, match="shows only a part"):
            asyncio.run(work)
    assert int(run("losetup", "-n", "-O", "SIZELIMIT", guest.device)) == SMALL
    guest.detach()
    guest.attach()
    guest.mount()
    _sound(guest, content)


def test_a_superblock_that_cannot_be_read_before_the_cut_leaves_all_as_it_was(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = hashes(guest.mountpoint)
    read = superblock.read

    async def between(step: str) -> None:
        def fails(path: str) -> superblock.Superblock:
            raise superblock.NoFilesystem("the btrfs superblock in the image is damaged")

        monkeypatch.setattr(superblock, "read", fails if step == "flushed" else read)

    with pytest.raises(ImageError, match="damaged"):
        asyncio.run(LoopImage(str(guest.image), between).shrink(SMALL))
    monkeypatch.setattr(superblock, "read", read)
    assert _sizes(guest) == (LARGE, SMALL)
    _sound(guest, content)
