"""The whole daemon as process 1 and as an ordinary process, in namespaces of its own, on a real btrfs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest

from lab.loop import Guest, run, workspace
from storaged.rpc.proto import common_pb2, vm_guest_pb2_grpc
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB
from tests.rpc.conftest import refused

pytestmark = pytest.mark.btrfs
ROOT = Path(__file__).parents[2]
Launch = vm.LaunchProcessRequest

# The machine's own /etc stays as it is: the folder is laid over it in the daemon's mount namespace.
START = """
set -e
mount -t tmpfs over "$1/over"
mkdir "$1/over/upper" "$1/over/work"
cp -r "$1/maitred" "$1/over/upper/maitred"
mount -t overlay etc -o "lowerdir=/etc,upperdir=$1/over/upper,workdir=$1/over/work" /etc
exec "$2" -m storaged serve --listen "unix:$1/s" --stateful "$1/$3" --state-dir "$1/state"
"""


@dataclass
class Running:
    """A daemon in its namespaces."""

    directory: Path
    maitred: vm_guest_pb2_grpc.MaitredAsyncStub
    pid: int
    """As we see it."""

    def below(self) -> list[tuple[str, str]]:
        """(name, state) of every process whose parent it is."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
                before, _, after = text.rpartition(")")
                if int(after.split()[1]) == self.pid:
                    found.append((before.partition("(")[2], after.split()[0]))
        return found

    def mounts(self) -> str:
        """What it has mounted."""
        return Path(f"/proc/{self.pid}/mounts").read_text(encoding="utf-8")

    async def resized(self) -> int:
        """Ask as a host does until no resize is in progress; the size then."""
        async with asyncio.timeout(20):
            while (status := await self.maitred.GetResizeStatus(common_pb2.EmptyMessage())).resize_in_progress:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            return status.current_size

    async def zombies_gone(self) -> None:
        """Wait until nothing below it is dead."""
        async with asyncio.timeout(10):
            while any(state == "Z" for _, state in self.below()):  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.05)


@asynccontextmanager
async def daemon(directory: Path, *, init: bool, stateful: str = "guest") -> AsyncIterator[Running]:
    """Run it until the end of the block; it must stop when asked to."""
    (directory / "maitred").mkdir()
    for name, text in (
        ("20-second", f'argv: ["sh", "-c", "echo second >> {directory}/startup"] wait_for_exit: true'),
        ("10-first", f'argv: ["sh", "-c", "echo first >> {directory}/startup"] wait_for_exit: true'),
        ("15-broken", "argv {"),
    ):
        (directory / "maitred" / name).write_text(text)
    (directory / "over").mkdir()
    namespaces = ["--mount", *(["--pid", "--fork", "--mount-proc", "--kill-child"] if init else [])]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  # ended below
            ["unshare", *namespaces, "sh", "-c", START, "sh", str(directory), sys.executable, stateful],
            stderr=log,
            cwd=ROOT,
        )
    try:
        async with asyncio.timeout(30):
            while not (directory / "s").exists() and process.poll() is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        pid = process.pid
        if init:
            (pid,) = (int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())  # noqa: ASYNC240
        async with grpc.aio.insecure_channel(f"unix:{directory}/s") as channel:
            stub: vm_guest_pb2_grpc.MaitredAsyncStub = vm_guest_pb2_grpc.MaitredStub(channel)
            await stub.GetKernelVersion(common_pb2.EmptyMessage(), wait_for_ready=True, timeout=20)
            yield Running(directory, stub, pid)
        os.kill(pid, signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
        process.returncode = 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()  # it is dead already
        print((directory / "log").read_text())  # noqa: T201  # shown when the test fails


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a btrfs mounted at `guest` in it."""
    with workspace() as directory:
        guest = Guest(directory, GIB)
        try:
            yield directory
        finally:
            guest.close()


@pytest.mark.parametrize("init", [False, True])
async def test_programs_and_mounts(place: Path, init: bool) -> None:
    async with daemon(place, init=init) as one:
        assert (place / "startup").read_text() == "first\nsecond\n", "the folder's requests came first"

        seen = f"import os; open({str(place / 'seen')!r}, 'w').write(f'{{os.getppid()}} {{sorted(os.environ)}}')"
        answer = await one.maitred.LaunchProcess(
            Launch(argv=[sys.executable, "-I", "-S", "-c", seen], env={"GIVEN": "x"}, wait_for_exit=True)
        )
        assert (answer.status, answer.code) == (vm.EXITED, 0)
        parent, _, names = (place / "seen").read_text().partition(" ")
        assert (parent == "1") == init
        if init:
            assert "GIVEN" in names
            assert "PATH" in names
            assert "HOME" not in names

        # Grandchildren whose parent does not wait for them, and a program that nobody waits for.
        orphans = "for i in 1 2 3 4 5; do (sleep 0.2; exit 3) & done; exit 4"
        answer = await one.maitred.LaunchProcess(Launch(argv=["sh", "-c", orphans], wait_for_exit=True))
        assert (answer.status, answer.code) == (vm.EXITED, 4)
        await one.maitred.LaunchProcess(Launch(argv=["true"]))
        await asyncio.sleep(0.5)
        await one.zombies_gone()

        target = str(place / "mnt" / "scratch")
        request = vm.MountRequest(
            source="scratch", target=target, fstype="tmpfs", create_target=True, permissions=0o750
        )
        assert (await one.maitred.Mount(request)).error == 0
        assert f" {target} tmpfs " in one.mounts()
        assert target not in Path("/proc/self/mounts").read_text()  # noqa: ASYNC240  # made in memory
        request.fstype = "nonsensefs"
        assert (await one.maitred.Mount(request)).error == errno.ENODEV

        code, text = await refused(one.maitred.Mount9P(vm.Mount9PRequest(port=54321, target=str(place / "shared"))))
        assert code is grpc.StatusCode.INTERNAL
        assert "54321" in text

        assert not (await one.maitred.GetResizeStatus(common_pb2.EmptyMessage())).resize_in_progress
        await one.maitred.ResizeFilesystem(vm.ResizeFilesystemRequest(size=512 << 20))
        assert await one.resized() == 512 << 20, "the child that resizes is still waited for by its own"


async def test_the_filesystem_may_come_after_the_daemon(place: Path) -> None:
    image = place / "later.img"
    with image.open("wb") as file:
        file.truncate(GIB)
    device = run("losetup", "--show", "-f", "--direct-io=off", image)
    nothing = common_pb2.EmptyMessage()
    async with daemon(place, init=True, stateful="later") as one:
        for call in (
            one.maitred.GetAvailableSpace(nothing),
            one.maitred.GetResizeStatus(nothing),
            one.maitred.UpdateStorageBalloon(vm.UpdateStorageBalloonRequest(state=1, free_space_bytes=GIB)),  # type: ignore[arg-type]
        ):
            code, text = await refused(call)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert f"{place}/later" in text
        await one.maitred.PrepareToSuspend(nothing)
        request = vm.MountRequest(
            source=device, target=f"{place}/later", fstype="btrfs", create_target=True, mkfs_if_needed=True
        )
        assert (await one.maitred.Mount(request)).error == 0
        assert (await one.maitred.GetAvailableSpace(nothing)).available_space > GIB // 2, "at once"
        report = vm.UpdateStorageBalloonRequest(state=1, free_space_bytes=GIB + (100 << 20))  # type: ignore[arg-type]
        assert (await one.maitred.UpdateStorageBalloon(report)).result == vm.SUCCESS
        assert (await one.maitred.GetAvailableSpace(nothing)).available_space <= 220 << 20
        log = (place / "log").read_text()
        assert "in use: " in log


async def test_a_resize_child_that_is_killed_under_process_1_is_found_by_whoever_started_it(place: Path) -> None:
    async with daemon(place, init=True) as one:
        await asyncio.sleep(0.5)
        workers = [
            int(name)
            for name in filter(str.isdigit, os.listdir("/proc"))
            if b"resize_worker" in cmdline(name) and parent(name) == one.pid
        ]
        assert len(workers) == 1
        os.kill(workers[0], signal.SIGKILL)
        await asyncio.sleep(2.5)
        assert dead(workers[0]), "its status is left to whoever started it"
        await one.maitred.ResizeFilesystem(vm.ResizeFilesystemRequest(size=512 << 20))
        assert await one.resized() == 512 << 20
        await one.zombies_gone()


def cmdline(name: str) -> bytes:
    """How a process was started."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{name}/cmdline").read_bytes()
    return b""


def stat(name: str | int) -> list[str]:
    """What /proc says of it, from its state on."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
    return ["gone", "0"]


def parent(name: str) -> int:
    """Its parent."""
    return int(stat(name)[1])


def dead(pid: int) -> bool:
    """True while it is dead and not reaped."""
    return stat(pid)[0] == "Z"
