"""A pool that is read-only, gone or another, and an image that is: nothing grows, it is said, and it ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.loop import run, workspace
from storaged.errors import Kind, StoragedError
from storaged.host import encode
from storaged.host.condition import Conditions, Filesystem, judge_image, judge_pool
from storaged.host.events import PoolSampled
from storaged.host.identity import FileId
from storaged.host.watch import Watcher
from storaged.units import GIB, MIB
from tests.host.test_controller import Bench, Source, running

EXT4, BTRFS = Filesystem(os.makedev(8, 1), 7), Filesystem(os.makedev(0, 40), 9)


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        (EXT4, EXT4, ""),
        (EXT4, None, "is gone"),
        (EXT4, Filesystem(EXT4.device, 8), "another filesystem"),
        (EXT4, Filesystem(os.makedev(8, 2), 7), "another filesystem (device 8:2, was 8:1)"),
        (BTRFS, Filesystem(os.makedev(0, 41), 9), ""),
        (BTRFS, Filesystem(BTRFS.device, 10), "another filesystem"),
        (Filesystem(40, 0), Filesystem(41, 0), "another filesystem"),
        (EXT4, Filesystem(EXT4.device, 7, frozenset({"ro", "x"})), "is read-only"),
        (EXT4, Filesystem(EXT4.device, 7, frozenset({"rw", "emergency_ro"})), "is read-only after an error"),
        (EXT4, Filesystem(EXT4.device, 7, frozenset({"rw", "errors=remount-ro"})), ""),
    ],
)
def test_a_pool_is_judged(was: Filesystem, now: Filesystem | None, says: str) -> None:
    said = judge_pool("/p", was, now)
    assert says in said
    assert bool(says) == bool(said)


def test_an_image_is_judged() -> None:
    was = FileId(1, 2, b"3")
    assert judge_image("/i", was, FileId(1, 2, b"3")) == ""
    assert "deleted or renamed" in judge_image("/i", was, None)
    assert "another file" in judge_image("/i", was, FileId(1, 2, b"4"))


@pytest.fixture
def disk() -> Iterator[Path]:
    """An ext4 of its own, mounted at `disk` below a workspace; `Path.parent / "disk.img"` is what it is on."""
    with workspace() as directory:
        disk = directory / "disk"
        disk.mkdir()
        with (directory / "disk.img").open("wb") as file:
            file.truncate(64 * MIB)
        run("mkfs.ext4", "-q", "-b", "4096", directory / "disk.img")
        run("mount", "-o", "loop,errors=remount-ro", directory / "disk.img", disk)
        yield disk


async def _granted(bench: Bench) -> None:
    await bench.until(lambda: bench.bound("a") and bench.bound("b"))
    await _settled(bench)


async def _settled(bench: Bench) -> None:
    await bench.until(lambda: bench.allowed() > 8 * GIB)
    # A grant that was answered settles with the next look at the image, which a broken pool does not give.
    await bench.until(lambda: all(guest.lease.flight is None for guest in bench.controller.state.guests.values()))


async def _refused(bench: Bench, says: str) -> None:
    """Nothing may be written any more, it is told why, and no resize begins."""
    assert await bench.until(lambda: says in bench.controller.unread) < 3
    await bench.until(lambda: bench.allowed() == 0)
    with pytest.raises(StoragedError, match=says) as refused:
        await bench.controller.resize("a", 200 * GIB)
    assert refused.value.kind is Kind.PRECONDITION
    pool = encode.pool(bench.controller, None, [])
    assert says in pool.unreadable_reason
    guest = encode.guest(bench.controller.members["a"], bench.controller, 0.0, None)
    assert not guest.resizable
    assert says in guest.not_resizable_reason
    told = len(bench.agents["a"].told)
    await asyncio.sleep(1.5)
    assert len(bench.agents["a"].told) == told
    assert bench.allowed() == 0


async def _ends(bench: Bench) -> None:
    await bench.until(lambda: not bench.controller.unread and bench.allowed() > 8 * GIB)
    assert bench.controller.state.pool.outside < GIB, "what was not there was not written by others"


def _once(caplog: pytest.LogCaptureFixture, says: str) -> None:
    said = [record for record in caplog.records if says in record.getMessage() and record.levelname == "ERROR"]
    assert len(said) == 1


def _run(*command: str | Path) -> None:
    run(*command)


def _read_only(disk: Path) -> Callable[[], None]:
    run("mount", "-o", "remount,ro", disk)
    return lambda: _run("mount", "-o", "remount,rw", disk)


def _another_above(disk: Path) -> Callable[[], None]:
    run("mount", "-t", "tmpfs", "none", disk)
    return lambda: _run("umount", disk)


def _unmounted(disk: Path) -> Callable[[], None]:
    device = run("findmnt", "-n", "-o", "SOURCE", disk)
    again = disk.parent / "again"
    again.mkdir()
    run("mount", device, again)  # else the loop device goes with the last mount
    run("umount", "-l", disk)
    return lambda: _run("mount", device, disk)


def _renamed(disk: Path) -> Callable[[], None]:
    """The pool is a directory of the filesystem, say."""
    _unmounted(disk)
    disk.rmdir()

    def back() -> None:
        disk.mkdir()
        run("mount", run("findmnt", "-n", "-o", "SOURCE", disk.parent / "again"), disk)

    return back


@pytest.mark.btrfs
@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (_read_only, "is read-only"),
        (_another_above, "is another filesystem"),
        (_unmounted, "is another filesystem"),
        (_renamed, "is gone"),
    ],
)
async def test_a_pool_that_is_not_what_it_was(
    disk: Path, caplog: pytest.LogCaptureFixture, breaks: Callable[[Path], Callable[[], None]], says: str
) -> None:
    async with running(disk, 40 * GIB, "a", "b") as bench:
        await _granted(bench)
        repair = breaks(disk)
        await _refused(bench, says)
        _once(caplog, says)
        repair()
        await _ends(bench)


def _fail(device: str) -> None:
    """As the kernel does when it finds the ext4 on `device` damaged."""
    Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test\n", encoding="utf-8")


@pytest.mark.btrfs
async def test_a_pool_that_its_kernel_gave_up(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(disk, 40 * GIB, "a", "b") as bench:
        await _granted(bench)
        device = Path(run("findmnt", "-n", "-o", "SOURCE", disk)).name
        _fail(device)
        await _refused(bench, "is read-only")
        _once(caplog, "is read-only")


def _machine() -> subprocess.Popen[bytes]:
    """A process that stands for a guest's machine."""
    return subprocess.Popen(["sleep", "60"])


@pytest.mark.btrfs
async def test_a_guest_that_comes_while_the_pool_is_broken_gets_nothing(disk: Path) -> None:
    pid_file = disk.parent / "b.pid"
    async with running(disk, 40 * GIB, "a", "b", pid_files={"b": pid_file}) as bench:
        await bench.until(lambda: bench.bound("a"))
        await _settled(bench)
        repair = _read_only(disk)
        await bench.until(lambda: bench.allowed() == 0)
        machine = _machine()
        try:
            pid_file.write_text(f"{machine.pid}\n")
            await bench.until(lambda: bench.agents["b"].allowed == 0)
            await asyncio.sleep(1)
            assert bench.allowed() == 0
            repair()
            await _ends(bench)
        finally:
            machine.kill()
            machine.wait()


def _delete(image: Path) -> None:
    image.unlink()


def _write_another(image: Path) -> None:
    image.unlink()
    image.touch()
    os.truncate(image, 100 * GIB)


def _rename_over(image: Path) -> None:
    other = image.with_suffix(".new")
    other.touch()
    other.replace(image)


@pytest.mark.btrfs
@pytest.mark.parametrize(
    ("breaks", "says"),
    [(_delete, "was deleted or renamed"), (_write_another, "is another file"), (_rename_over, "is another file")],
)
async def test_an_image_that_is_not_what_it_was(
    disk: Path, caplog: pytest.LogCaptureFixture, breaks: Callable[[Path], None], says: str
) -> None:
    pid_file = disk.parent / "a.pid"
    machine = _machine()
    pid_file.write_text(f"{machine.pid}\n")
    try:
        async with running(disk, 12 * GIB, "a", "b", pid_files={"a": pid_file}) as bench:
            controller = bench.controller
            await bench.until(lambda: bench.bound("a") and bench.bound("b") and bench.allowed() > 4 * GIB)
            await asyncio.sleep(1)  # so that it was looked at
            image = disk / "a.img"
            breaks(image)
            await bench.until(lambda: says in controller.conditions.now.reason("a"))
            told = {name: len(each.told) for name, each in bench.agents.items()}
            bench.source.value = 60 * GIB
            await asyncio.sleep(2)
            assert {name: len(each.told) for name, each in bench.agents.items()} == told, "nobody was granted more"
            with pytest.raises(StoragedError, match=says) as refused:
                await controller.resize("a", 200 * GIB)
            assert refused.value.kind is Kind.PRECONDITION
            guest = encode.guest(controller.members["a"], controller, 0.0, None)
            assert says in guest.not_resizable_reason
            assert encode.guest(controller.members["b"], controller, 0.0, None).resizable
            _once(caplog, says)
            machine.kill()
            machine.wait()
            await bench.until(lambda: (bench.agents["b"].allowed or 0) > 12 * GIB)
            assert not controller.conditions.now.guests
    finally:
        machine.kill()
        machine.wait()


@pytest.mark.btrfs
def test_a_pool_that_goes_in_the_middle_of_a_look_has_nothing_free(disk: Path) -> None:
    class Goes(Source):
        calls = 0

        def free(self) -> int:
            self.calls += 1
            if self.calls == 2:
                run("mount", "-t", "tmpfs", "none", disk)
            return super().free()

    async def takes() -> tuple[PoolSampled | None, PoolSampled | None]:
        bench = Bench(disk, None, ("a",), {})
        bench.controller._watcher = Watcher(Goes(40 * GIB))
        images = {"a": f"{disk}/a.img"}
        return bench.controller._take(images), bench.controller._take({})

    sampled, unused = asyncio.run(takes())
    assert sampled is not None
    assert sampled.free == 0
    assert unused is None, "nobody is there to be told"


@pytest.mark.btrfs
def test_an_image_that_comes_back_is_itself(disk: Path) -> None:
    image, conditions = disk / "a.img", Conditions(str(disk))
    image.touch()
    assert conditions.look({"a": str(image)}) == conditions.now
    image.rename(disk / "b.img")
    assert conditions.look({"a": str(image)}).guests
    (disk / "b.img").rename(image)
    assert not conditions.look({"a": str(image)}).guests
