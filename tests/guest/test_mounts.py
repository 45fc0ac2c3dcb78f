"""What may be mounted: pure; and one contract for the simulation and for this kernel, in a private namespace."""

from __future__ import annotations

import asyncio
import errno
import os
import posixpath
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.loop import run, workspace
from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.guest.kernel_mounts import KernelMounts, _unescaped
from storaged.guest.mounts import (
    HANDLED_ELSEWHERE,
    LONGEST_OPTIONS,
    Mount,
    Mount9P,
    Mounts,
    MountSettings,
    MountSystem,
    absolute,
    check_9p,
    check_mount,
    options_9p,
)
from storaged.sim.mounts import MS_BIND, SimMounts
from tests.guest.private_mounts import private_thread, why_not

Answer = TypeVar("Answer")
MIB = 1 << 20

# --- pure ---------------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("/.ab \0\n"), max_size=12))
def test_a_path_is_refused_or_tidy_and_means_the_same(text: str) -> None:
    if not text.startswith("/") or ".." in text.split("/") or "\0" in text or "\n" in text:
        with pytest.raises(InvalidRequest, match="target"):
            absolute("target", text)
    else:
        path = absolute("target", text)
        assert path.startswith("/")
        assert posixpath.normpath(path) == path
        assert [p for p in path.split("/") if p] == [p for p in text.split("/") if p not in ("", ".")]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (Mount("s", "", "tmpfs"), "target"),
        (Mount("s", "mnt", "tmpfs"), "target"),
        (Mount("s", "/mnt/../etc", "tmpfs"), "target"),
        (Mount("s", "/m\0", "tmpfs"), "target"),
        (Mount("s", "/m\n/x", "tmpfs"), "target"),
        (Mount("s\0", "/mnt", "tmpfs"), "source"),
        (Mount("s", "/mnt", "tm\npfs"), "fstype"),
        (Mount("s", "/mnt", "tmpfs", options="a\0b"), "options"),
        (Mount("s", "/mnt", "tmpfs", options="x" * (LONGEST_OPTIONS + 1)), "options"),
        (Mount("s", "/" + "x" * 5000, "tmpfs"), "target"),
        (Mount("s", "/mnt", "tmpfs", permissions=0o10000), "permissions"),
        (Mount("vdb", "/mnt", "btrfs", mkfs_if_needed=True), "source"),
        (Mount("--help", "/mnt", "btrfs", mkfs_if_needed=True), "source"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(asked: Mount, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_mount(asked)
    assert field in caught.value.message


@pytest.mark.parametrize("asked", [Mount9P(0, "/m"), Mount9P(0xFFFFFFFF, "/m"), Mount9P(9999, "m"), Mount9P(9999, "")])
def test_so_is_a_9p_mount(asked: Mount9P) -> None:
    with pytest.raises(InvalidRequest):
        check_9p(asked)


def test_what_the_9p_client_is_told() -> None:
    assert options_9p(7, 1024) == "trans=fd,rfdno=7,wfdno=7,cache=none,access=any,version=9p2000.L,msize=1024"


# --- both worlds --------------------------------------------------------------------------------------------------


class Place:
    """One world: directories at `base`, devices of 256 MiB, the mounts that use them."""

    system: MountSystem
    mounts: Mounts
    base: str

    def device(self, kind: str) -> str:
        """A device with that on it."""
        raise NotImplementedError

    async def on(self, call: Callable[[], Answer]) -> Answer:
        """What `call` answers where the mounts are."""
        raise NotImplementedError

    async def mode(self, path: str) -> int | None:
        """A directory's permissions; None when there is none."""
        raise NotImplementedError

    async def source(self, path: str) -> str:
        """What is mounted there."""
        return await self.on(lambda: self.system.mounted(path))


class SimPlace(Place):
    """In memory."""

    def __init__(self) -> None:
        self.sim = self.system = SimMounts()
        self.mounts = Mounts(self.sim)
        self.base = "/mnt"

    def device(self, kind: str) -> str:
        path = f"/dev/sim{len(self.sim.devices)}"
        self.sim.devices[path] = kind
        return path

    async def on(self, call: Callable[[], Answer]) -> Answer:
        return call()

    async def mode(self, path: str) -> int | None:
        return self.sim.directories.get(path)


class RealPlace(Place):
    """This kernel, loop devices, one thread's namespace."""

    def __init__(self, directory: Path) -> None:
        self.threads = private_thread()
        self.system = KernelMounts()
        self.mounts = Mounts(self.system, threads=self.threads)
        self._directory = directory
        self.base = str(directory / "mnt")
        os.mkdir(self.base)

    def device(self, kind: str) -> str:
        image = self._directory / f"{len(os.listdir(self._directory))}.img"
        with image.open("wb") as file:
            file.truncate(256 * MIB)
            if kind == "junk":
                file.seek(700_000)
                file.write(b"somebody's")
        if kind in ("btrfs", "ext4"):
            run(f"mkfs.{kind}", "-q", image)
        return run("losetup", "--show", "-f", image)

    async def on(self, call: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self.threads, call)

    async def mode(self, path: str) -> int | None:
        def look() -> int | None:
            try:
                return os.stat(path).st_mode & 0o7777
            except FileNotFoundError:
                return None

        return await self.on(look)

    async def close(self) -> None:
        """Unmount, and end the thread with its namespace."""

        def unmount() -> None:
            with open("/proc/thread-self/mountinfo", encoding="utf-8") as file:
                targets = [_unescaped(line.split()[4]) for line in file]
            for target in reversed([t for t in targets if t.startswith(f"{self._directory}/")]):
                run("umount", target)

        await self.on(unmount)
        self.threads.shutdown()


REAL = pytest.mark.skipif(bool(why_not()), reason=f"mounts: {why_not()}")


@pytest.fixture(params=["sim", pytest.param("real", marks=REAL)])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Each world."""
    if request.param == "sim":
        yield SimPlace()
        return
    with workspace() as directory:
        real = RealPlace(directory)
        try:
            yield real
        finally:
            await real.close()


@pytest.fixture
async def kernel() -> AsyncIterator[RealPlace]:
    """This kernel alone."""
    with workspace() as directory:
        real = RealPlace(directory)
        try:
            yield real
        finally:
            await real.close()


async def test_tmpfs_with_its_target_made_and_permissions_given(place: Place) -> None:
    target = f"{place.base}/a/b/c"
    asked = Mount("scratch", target + "//", "tmpfs", options="size=1m", create_target=True, permissions=0o1755)
    assert await place.mounts.mount(asked) == 0
    assert await place.source(target) == "scratch"
    assert await place.mode(target) == 0o1755
    assert await place.mode(f"{place.base}/a") == 0o755


async def test_without_create_target_a_missing_one_is_an_errno(place: Place) -> None:
    assert await place.mounts.mount(Mount("scratch", f"{place.base}/x", "tmpfs")) == errno.ENOENT
    assert await place.mode(f"{place.base}/x") is None


@pytest.mark.parametrize(
    ("fstype", "kind", "number"),
    [
        ("nonsensefs", "btrfs", errno.ENODEV),
        ("btrfs", "ext4", errno.EINVAL),
        ("ext4", "btrfs", errno.EINVAL),
        ("btrfs", "", errno.EINVAL),
    ],
)
async def test_a_refusal_is_the_kernels_errno_and_leaves_nothing(
    place: Place, fstype: str, kind: str, number: int
) -> None:
    target = f"{place.base}/a/b"
    asked = Mount(place.device(kind), target, fstype, create_target=True, permissions=0o700)
    assert await place.mounts.mount(asked) == number
    assert await place.source(target) == ""
    assert await place.mode(f"{place.base}/a") is None, "directories made for it are gone again"
    assert await place.mode(place.base) == 0o755, "what was there stays as it was"


async def test_a_missing_device_is_an_errno_too(place: Place) -> None:
    asked = Mount("/dev/no-such-disk", f"{place.base}/a", "btrfs", create_target=True, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == errno.ENOENT


@pytest.mark.parametrize("fstype", ["btrfs", "ext4"])
async def test_a_filesystem_on_a_device(place: Place, fstype: str) -> None:
    device = place.device(fstype)
    target = f"{place.base}/{fstype}"
    asked = Mount(device, target, fstype, create_target=True, permissions=0o711, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == 0
    assert await place.source(target) == device
    assert await place.mode(target) == 0o711


async def test_a_bind_mount(place: Place) -> None:
    assert await place.mounts.mount(Mount("one", f"{place.base}/one", "tmpfs", create_target=True)) == 0
    await place.on(lambda: place.system.make_directories(f"{place.base}/one/below"))
    asked = Mount(f"{place.base}/one", f"{place.base}/two", "", MS_BIND, create_target=True)
    assert await place.mounts.mount(asked) == 0
    assert await place.source(f"{place.base}/two")
    assert await place.mounts.mount(Mount(f"{place.base}/none", f"{place.base}/two", "", MS_BIND)) == errno.ENOENT


async def test_a_blank_device_is_formatted_if_that_was_asked_for(place: Place) -> None:
    device = place.device("")
    target = f"{place.base}/data"
    asked = Mount(device, target, "btrfs", create_target=True, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == 0
    assert await place.source(target) == device


@pytest.mark.parametrize("kind", ["ext4", "junk"])
async def test_one_with_anything_on_it_never_is(place: Place, kind: str) -> None:
    device = place.device(kind)
    found = await place.on(lambda: place.system.contents(device))
    assert found
    asked = Mount(device, f"{place.base}/data", "btrfs", create_target=True, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == errno.EINVAL
    assert await place.on(lambda: place.system.contents(device)) == found


async def test_only_a_btrfs_is_ever_made(place: Place) -> None:
    device = place.device("")
    asked = Mount(device, f"{place.base}/data", "ext4", create_target=True, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == errno.EINVAL
    assert await place.on(lambda: place.system.contents(device)) == ""


async def test_a_target_that_is_handled_elsewhere(place: Place) -> None:
    assert (
        await place.mounts.mount(Mount("/dev/no-such-disk", HANDLED_ELSEWHERE + "/", "btrfs", create_target=True)) == 0
    )
    assert await place.source(HANDLED_ELSEWHERE) == ""
    assert await place.mode(HANDLED_ELSEWHERE) is None


async def test_refused_requests_change_nothing(place: Place) -> None:
    with pytest.raises(InvalidRequest):
        await place.mounts.mount(Mount("s", f"{place.base}/a/../b", "tmpfs", create_target=True))
    with pytest.raises(InvalidRequest):
        await place.mounts.mount(Mount("s", f"{place.base}/a", "tmpfs", create_target=True, permissions=1 << 31))
    assert await place.mode(f"{place.base}/a") is None


async def test_permissions_that_cannot_be_given_undo_the_mount() -> None:
    place = SimPlace()

    def refuse(path: str, mode: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    place.sim.chmod = refuse  # type: ignore[method-assign]
    with pytest.raises(StoragedError, match="Read-only") as caught:
        await place.mounts.mount(Mount("s", "/mnt/a", "tmpfs", create_target=True, permissions=0o700))
    assert caught.value.kind is Kind.INTERNAL
    assert place.sim.table == []
    assert await place.mode("/mnt/a") is None


def spoil(device: str, where: int, content: bytes) -> None:
    """Write to the device."""
    with open(device, "r+b") as file:
        file.seek(where)
        file.write(content)


# --- this kernel --------------------------------------------------------------------------------------------------


@REAL
async def test_permissions_on_a_read_only_mount_undo_it_for_real(kernel: RealPlace) -> None:
    device, target = kernel.device("ext4"), f"{kernel.base}/ro"
    with pytest.raises(StoragedError, match="Read-only"):
        await kernel.mounts.mount(Mount(device, target, "ext4", 1, create_target=True, permissions=0o700))
    assert await kernel.source(target) == ""
    assert await kernel.mode(target) is None


@REAL
async def test_a_target_on_a_read_only_filesystem(kernel: RealPlace) -> None:
    asked = Mount(kernel.device("ext4"), f"{kernel.base}/ro", "ext4", 1, create_target=True)
    assert await kernel.mounts.mount(asked) == 0
    assert await kernel.mounts.mount(Mount("s", f"{kernel.base}/ro/a/b", "tmpfs", create_target=True)) == errno.EROFS


@REAL
async def test_flags_and_options_arrive(kernel: RealPlace) -> None:
    target = f"{kernel.base}/t"
    asked = Mount("t", target, "tmpfs", 1 | 2 | 4 | 8, "size=1m,mode=0700,nr_inodes=50", create_target=True)
    assert await kernel.mounts.mount(asked) == 0
    line = await kernel.on(
        lambda: next(x for x in Path("/proc/thread-self/mounts").read_text().splitlines() if target in x)
    )
    for word in ("ro,", "nosuid", "nodev", "noexec", "size=1024k", "mode=700", "nr_inodes=50"):
        assert word in line


@REAL
async def test_the_umask_does_not_make_directories_private(kernel: RealPlace) -> None:
    before = os.umask(0o077)
    try:
        assert await kernel.mounts.mount(Mount("t", f"{kernel.base}/a/b", "tmpfs", create_target=True)) == 0
    finally:
        os.umask(before)
    assert await kernel.mode(f"{kernel.base}/a") == 0o755


@REAL
@pytest.mark.parametrize("where", [0, 65536 + 64, MIB - 1, 64 * MIB + 64, 256 * MIB - 1])
async def test_one_byte_in_a_telling_place_keeps_a_device_from_being_formatted(kernel: RealPlace, where: int) -> None:
    device = kernel.device("")
    assert kernel.system.contents(device) == ""
    spoil(device, where, b"\x01")
    assert str(where) in kernel.system.contents(device)
    asked = Mount(device, f"{kernel.base}/d", "btrfs", create_target=True, mkfs_if_needed=True)
    assert await kernel.mounts.mount(asked) == errno.EINVAL


@REAL
async def test_a_btrfs_whose_first_superblock_is_gone_is_not_blank(kernel: RealPlace) -> None:
    device = kernel.device("btrfs")
    spoil(device, 0, bytes(MIB))
    asked = Mount(device, f"{kernel.base}/d", "btrfs", create_target=True, mkfs_if_needed=True)
    assert await kernel.mounts.mount(asked) == errno.EINVAL
    assert "64" in run("btrfs", "inspect-internal", "dump-super", "-s1", device), "the mirror is still there"


@REAL
async def test_a_file_or_a_pipe_is_no_device(kernel: RealPlace) -> None:
    path = f"{kernel.base}/f"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    assert kernel.system.contents(path) == "it is no block device"
    os.unlink(path)
    os.mkfifo(path)
    assert kernel.system.contents(path) == "it is no block device"


@REAL
async def test_odd_names_are_found_in_the_mount_table(kernel: RealPlace) -> None:
    target = f"{kernel.base}/a b\\040c\td"
    assert await kernel.mounts.mount(Mount("odd name", target, "tmpfs", create_target=True)) == 0
    assert await kernel.source(target) == "odd name"


@REAL
async def test_nothing_of_it_is_seen_outside_of_the_namespace(kernel: RealPlace) -> None:
    assert await kernel.mounts.mount(Mount("t", f"{kernel.base}/t", "tmpfs", create_target=True)) == 0
    assert kernel.base in await kernel.on(lambda: Path("/proc/thread-self/mounts").read_text())
    assert kernel.base not in Path("/proc/self/mounts").read_text()  # noqa: ASYNC240  # made in memory


# --- 9p -----------------------------------------------------------------------------------------------------------


class Host(KernelMounts):
    """This kernel, and a host's server at the other end of a socket pair instead of vsock."""

    def __init__(self) -> None:
        self.server: socket.socket
        self.client = -1

    def connect_host(self, port: int, within_s: float) -> int:
        client, self.server = socket.socketpair()
        client.setblocking(False)
        self.client = client.detach()
        return self.client


async def test_a_9p_mount() -> None:
    place = SimPlace()
    place.sim.ports.add(9999)
    await place.mounts.mount_9p(Mount9P(9999, "/mnt/shared"))
    ((source, target, fstype, options),) = place.sim.table
    assert (source, target, fstype) == ("none", "/mnt/shared", "9p")
    assert options.startswith("trans=fd,rfdno=10999,wfdno=10999,")
    assert "msize=65536" in options
    assert place.sim.open_fds == set(), "the descriptor is closed after the mount"


async def test_a_9p_server_that_is_not_there() -> None:
    place = SimPlace()
    with pytest.raises(StoragedError, match="port 9999") as caught:
        await place.mounts.mount_9p(Mount9P(9999, "/mnt/shared"))
    assert caught.value.kind is Kind.INTERNAL
    assert await place.mode("/mnt/shared") is None


@REAL
@pytest.mark.skipif(not Path("/dev/vsock").exists(), reason="9p: needs AF_VSOCK")
async def test_no_host_answers_this_machine(kernel: RealPlace) -> None:
    before = len(os.listdir("/proc/self/fd"))
    mounts = Mounts(kernel.system, MountSettings(connect_s=0.5), threads=kernel.threads)
    with pytest.raises(StoragedError, match="port 54321"):
        await mounts.mount_9p(Mount9P(54321, f"{kernel.base}/shared"))
    assert len(os.listdir("/proc/self/fd")) == before
    assert await kernel.mode(f"{kernel.base}/shared") is None


def has_9p() -> bool:
    """True when this kernel knows 9p."""
    return "\t9p\n" in Path("/proc/filesystems").read_text()


@REAL
@pytest.mark.skipif(has_9p(), reason="this kernel knows 9p")
async def test_a_kernel_without_9p_says_so_and_the_connection_is_closed(kernel: RealPlace) -> None:
    host = Host()
    mounts = Mounts(host, threads=kernel.threads)
    with pytest.raises(StoragedError, match="No such device"):
        await mounts.mount_9p(Mount9P(9999, f"{kernel.base}/shared"))
    host.server.settimeout(5)
    assert host.server.recv(1) == b"", "our end is closed"
    host.server.close()
    assert await kernel.mode(f"{kernel.base}/shared") is None


@REAL
async def test_a_failed_9p_mount_leaves_an_older_target_alone(kernel: RealPlace) -> None:
    os.mkdir(f"{kernel.base}/shared")
    host = Host()

    def refuse(*_: object) -> None:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))

    host.mount = refuse  # type: ignore[assignment]
    with pytest.raises(StoragedError, match="Protocol error"):
        await Mounts(host, threads=kernel.threads).mount_9p(Mount9P(9999, f"{kernel.base}/shared"))
    host.server.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(host.client)
    assert await kernel.mode(f"{kernel.base}/shared") == 0o755


async def test_a_call_that_is_given_up_is_still_done_to_its_end() -> None:
    place = SimPlace()
    threads = ThreadPoolExecutor(1)
    mounts = Mounts(place.sim, threads=threads)
    go = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(source: str, target: str, fstype: str, flags: int, options: str) -> None:
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        SimMounts.mount(place.sim, source, target, fstype, flags, options)

    mounts.system.mount = slow  # type: ignore[method-assign]
    call = asyncio.create_task(mounts.mount(Mount("s", "/mnt/a", "tmpfs", create_target=True, permissions=0o700)))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go.set()
    await loop.run_in_executor(threads, int)
    assert place.sim.mounted("/mnt/a") == "s"
    assert await place.mode("/mnt/a") == 0o700
