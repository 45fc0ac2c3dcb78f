"""The cut of an image that a machine holds: it stands still meanwhile, and runs again whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from qemu.qmp import ConnectError, QMPClient

from storaged.host import images, superblock
from storaged.host.crosvm import CrosvmImage
from storaged.host.images import ImageBackend, ImageError, WouldCut
from storaged.host.journal import Journal
from storaged.host.qmp import MARK, QmpImage
from storaged.host.resizes import Resizes, World
from storaged.host.saga_model import Direction, Outcome, Saga, Stage
from storaged.host.settings import Resizing
from storaged.units import GIB
from tests.host.resizable import write_superblock
from tests.host.test_saga_images import Crosvm, needs_qemu

SMALL, LARGE = GIB, 2 * GIB
GAPS = ["checked", "held", "flushed", "read", "cut", "confirmed", "released"]
STANDS = {"held", "flushed", "read", "cut", "confirmed"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "g.img"
    with path.open("wb") as file:
        file.truncate(LARGE)
    write_superblock(path, SMALL)
    return path


class Qemu:
    """A real machine that runs, though only its firmware."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.socket = directory / "qmp.sock"
        self.image = image
        self.process = subprocess.Popen([
            *("qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"),
            *("-qmp", f"unix:{self.socket},server=on,wait=off"),
            *("-blockdev", f"driver=file,node-name=f0,filename={image}"),
            *("-blockdev", "driver=raw,node-name=disk0,file=f0"),
            *("-device", "virtio-blk-pci,drive=disk0,id=vd0"),
        ])  # fmt: skip
        ends = time.monotonic() + 20
        while not self.socket.exists():
            assert self.process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.02)

    async def ask(self, command: str, **arguments: object) -> object:
        client = QMPClient()
        await client.connect(str(self.socket))
        try:
            return await client.execute(command, arguments)
        finally:
            await client.disconnect()

    async def state(self) -> str:
        answer = await self.ask("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])

    async def marked(self) -> bool:
        objects = await self.ask("qom-list", path="/objects")
        assert isinstance(objects, list)
        return any(each["name"] == MARK for each in objects)

    def backend(self, between: images.Between = images.nothing) -> QmpImage:
        return QmpImage(str(self.image), str(self.socket), "", between)


@pytest.fixture
def qemu(tmp_path: Path, image: Path) -> Iterator[Qemu]:
    machine = Qemu(tmp_path, image)
    yield machine
    machine.process.kill()
    machine.process.wait()


@needs_qemu
async def test_qemu_stands_still_from_the_check_to_the_cut(qemu: Qemu) -> None:
    states: dict[str, str] = {}

    async def between(step: str) -> None:
        states[step] = await qemu.state()

    assert await qemu.backend(between).shrink(SMALL) == SMALL
    assert states == {step: "paused" if step in STANDS else "running" for step in GAPS}
    assert await qemu.state() == "running"
    assert not await qemu.marked()


@needs_qemu
async def test_a_filesystem_that_grew_before_the_machine_was_stopped_is_not_cut(qemu: Qemu) -> None:
    async def between(step: str) -> None:
        if step == "checked":
            write_superblock(qemu.image, LARGE)

    with pytest.raises(WouldCut, match=f"was not cut to {SMALL} bytes and keeps its {LARGE}"):
        await qemu.backend(between).shrink(SMALL)
    assert qemu.image.stat().st_size == LARGE
    assert await qemu.state() == "running"
    assert not await qemu.marked()


@needs_qemu
@pytest.mark.parametrize("gap", ["held", "cut", "released"])
async def test_a_commit_that_was_under_way_gets_its_room_back(qemu: Qemu, gap: str) -> None:
    async def between(step: str) -> None:
        if step == gap:
            write_superblock(qemu.image, LARGE)

    with pytest.raises(WouldCut):
        await qemu.backend(between).shrink(SMALL)
    assert qemu.image.stat().st_size == LARGE
    assert await qemu.state() == "running"


@needs_qemu
async def test_a_machine_that_was_paused_stays_paused(qemu: Qemu) -> None:
    await qemu.ask("stop")
    assert await qemu.backend().shrink(SMALL) == SMALL
    assert await qemu.state() == "paused"
    await qemu.backend().check()
    await qemu.backend().recover(cutting=True)
    assert await qemu.state() == "paused"


@needs_qemu
@pytest.mark.parametrize("gap", GAPS)
async def test_whatever_fails_the_machine_runs_again(qemu: Qemu, gap: str) -> None:
    async def between(step: str) -> None:
        if step == gap:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await qemu.backend(between).shrink(SMALL)
    assert await qemu.state() == "running"
    assert not await qemu.marked()


@needs_qemu
async def test_a_cut_that_is_cancelled_leaves_the_machine_running(qemu: Qemu) -> None:
    reached = asyncio.Event()

    async def between(step: str) -> None:
        if step == "held":
            reached.set()
            await asyncio.sleep(0.1)

    task = asyncio.create_task(qemu.backend(between).shrink(SMALL))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await qemu.state() == "running"


KILLED = """
import asyncio, os, signal, sys
from storaged.host.qmp import QmpImage

async def between(step):
    if step == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(QmpImage(sys.argv[1], sys.argv[2], "", between).shrink(int(sys.argv[3])))
"""


@needs_qemu
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("work", ["shrink", "check", "grow", "recover"])
async def test_killed_in_any_gap_the_next_run_resumes_the_machine(qemu: Qemu, gap: str, work: str) -> None:
    command = [sys.executable, "-c", KILLED, str(qemu.image), str(qemu.socket), str(SMALL), gap]
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == -signal.SIGKILL
    assert await qemu.state() == ("paused" if gap in STANDS else "running")
    backend = qemu.backend()
    match work:
        case "shrink":
            assert await backend.shrink(SMALL) == SMALL
        case "check":
            await backend.check()
        case "grow":
            assert await backend.grow(2 * LARGE) == 2 * LARGE
        case "recover":
            await backend.recover(cutting=True)
    assert await qemu.state() == "running"
    assert not await qemu.marked()


async def _runs(qemu: Qemu) -> bool:
    """False also while the monitor speaks with somebody else: it takes one at a time."""
    try:
        return await qemu.state() == "running" and not await qemu.marked()
    except ConnectError:
        return False


@needs_qemu
async def test_a_monitor_that_hangs_while_the_machine_stands_is_asked_until_it_runs(
    qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "WITHIN_S", 0.5)

    async def between(step: str) -> None:
        if step == "read":
            os.kill(qemu.process.pid, signal.SIGSTOP)

    with pytest.raises(ImageError, match=r"did not answer .*may still be stopped"):
        await qemu.backend(between).shrink(SMALL)
    await asyncio.sleep(6)  # its queue of connections fills meanwhile
    os.kill(qemu.process.pid, signal.SIGCONT)
    ends = time.monotonic() + 10
    while not await _runs(qemu):
        assert time.monotonic() < ends
        await asyncio.sleep(0.2)
    image, filesystem = qemu.image.stat().st_size, superblock.read(str(qemu.image)).size
    assert image >= filesystem


# --- crosvm ---------------------------------------------------------------------------------------------------


@pytest.fixture
def crosvm(tmp_path: Path, image: Path) -> Iterator[Crosvm]:
    peer = Crosvm(tmp_path / "crosvm.sock", [image])
    yield peer
    peer.close()


async def test_crosvm_is_suspended_from_the_check_to_the_cut(tmp_path: Path, image: Path, crosvm: Crosvm) -> None:
    states: dict[str, bool] = {}

    async def between(step: str) -> None:
        states[step] = crosvm.suspended

    assert await CrosvmImage(str(image), f"{tmp_path}/crosvm.sock", 0, between).shrink(SMALL) == SMALL
    assert states == {step: step in STANDS for step in GAPS}


@pytest.mark.parametrize("gap", GAPS)
async def test_whatever_fails_crosvm_resumes(tmp_path: Path, image: Path, crosvm: Crosvm, gap: str) -> None:
    async def between(step: str) -> None:
        if step == gap:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await CrosvmImage(str(image), f"{tmp_path}/crosvm.sock", 0, between).shrink(SMALL)
    assert not crosvm.suspended


async def test_crosvm_is_resumed_only_where_the_journal_says_that_it_was_being_cut(
    tmp_path: Path, image: Path, crosvm: Crosvm
) -> None:
    backend = CrosvmImage(str(image), f"{tmp_path}/crosvm.sock", 0)
    crosvm.suspended = True
    await backend.check()
    await backend.recover(cutting=False)
    assert crosvm.suspended
    await backend.recover(cutting=True)
    assert not crosvm.suspended


async def test_a_crosvm_that_cannot_be_suspended_is_not_cut(tmp_path: Path, image: Path, crosvm: Crosvm) -> None:
    crosvm.suspends = False
    with pytest.raises(ImageError, match="crosvm refuses to suspend the machine"):
        await CrosvmImage(str(image), f"{tmp_path}/crosvm.sock", 0).shrink(SMALL)
    assert os.stat(image).st_size == LARGE


# --- the next daemon ------------------------------------------------------------------------------------------


async def taken_up(directory: Path, backend: ImageBackend, saga: Saga | None) -> Resizes:
    """What a daemon does at its start with a journal that says this; None: with none."""
    settings = Resizing(state_dir=str(directory / "state"))
    if saga is not None:
        Journal(f"{settings.state_dir}/resizes-p.json").save([saga])
    world = World(
        lambda _: (str(directory / "g.img"), backend),
        lambda _: None,
        lambda *_: None,
        lambda: None,
        lambda: 0,
        lambda *_: None,
        lambda _: 0,
    )
    resizes = Resizes("p", settings, world)
    task = asyncio.create_task(resizes.run(["g"]))
    ends = time.monotonic() + 20
    while saga is not None and saga.active and any(each.active for each in resizes.snapshot or (saga,)):
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return resizes


CUTTING = Saga("g-1", "g", SMALL, 1.0, LARGE, LARGE, Direction.SHRINK, Stage.IMAGE, sent=True)


async def test_the_next_daemon_resumes_crosvm_and_cuts(tmp_path: Path, image: Path, crosvm: Crosvm) -> None:
    crosvm.suspended = True
    resizes = await taken_up(tmp_path, CrosvmImage(str(image), f"{tmp_path}/crosvm.sock", 0), CUTTING)
    assert resizes.snapshot[0].outcome is Outcome.DONE
    assert crosvm.said[0] == "ResumeVcpus"
    assert not crosvm.suspended


@needs_qemu
@pytest.mark.parametrize("journal", [True, False])
async def test_the_next_daemon_resumes_a_machine_whatever_its_journal_says(
    tmp_path: Path, qemu: Qemu, journal: bool
) -> None:
    command = [sys.executable, "-c", KILLED, str(qemu.image), str(qemu.socket), str(SMALL), "read"]
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == -signal.SIGKILL
    assert await qemu.state() == "paused"
    ended = replace(CUTTING, stage=Stage.ENDED, outcome=Outcome.FAILED)
    await taken_up(tmp_path, qemu.backend(), ended if journal else None)
    assert await qemu.state() == "running"
