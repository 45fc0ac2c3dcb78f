"""What mounts do on this kernel alone, and 9p as far as it goes without a kernel that knows it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab.loop import run, workspace
from storaged.errors import Kind, StoragedError
from storaged.guest.kernel_mounts import KernelMounts
from storaged.guest.mounts import (
    Mount,
    Mount9P,
    Mounts,
    MountSettings,
)
from storaged.sim.mounts import SimMounts
from tests.guest.places import REAL, RealPlace, SimPlace, spoil

MIB = 1 << 20


@pytest.fixture
async def kernel() -> AsyncIterator[RealPlace]:
    """This kernel alone."""
    with workspace() as directory:
        real = RealPlace(directory)
        try:
            yield real
        finally:
            await real.close()


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
