"""The host's disk fills up while the guest writes as fast as it can."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.loop import run, workspace
from storaged.units import GIB, MIB
from tests.vm.conftest import MakeGuest
from tests.vm.guests import VirtualGuest, blank, host_bytes

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

POOL, DISK = 3 * GIB, 4 * GIB
OTHERS = 1536 * MIB
"""What somebody else on the host writes in the meantime."""
WRITTEN = "/mnt/stateful/written"
CHUNK = 4 * MIB
WRITER = f"""
import os, sys
# Random content, so that it costs the host what it costs the guest.
seen, chunk = 0, os.urandom({CHUNK})
fd = os.open("{WRITTEN}", os.O_WRONLY | os.O_CREAT, 0o600)
try:
    while True:
        os.write(fd, seen.to_bytes(8, "big") + chunk[8:])
        os.fsync(fd)
        seen += 1
except OSError as error:
    print(error.errno, seen)
"""
IO_ERRORS = "dmesg | grep -cE 'I/O error|BTRFS.*(error|forced readonly|aborted)'; true"


@pytest.fixture
def pool() -> Iterator[Path]:
    """A small filesystem on the host, for the guest's sparse disk and for others."""
    with workspace() as directory:
        image = blank(directory / "pool.img", POOL)
        run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        mounted = directory / "pool"
        mounted.mkdir()
        run("mount", "-o", "loop", image, mounted)
        yield mounted


def free(pool: Path) -> int:
    """What a host's own disk watcher would say."""
    found = os.statvfs(pool)
    return found.f_bavail * found.f_frsize


class Filler:
    """Somebody else who writes on the host, in steps, for as long as there is room for the steps to come."""

    def __init__(self, pool: Path) -> None:
        self._pool = pool
        self.written = 0

    async def run(self) -> None:
        with (self._pool / "others").open("wb") as file:
            while self.written < OTHERS and free(self._pool) > 64 * MIB:
                await asyncio.to_thread(self._step, file.fileno())
                await asyncio.sleep(0.25)

    def _step(self, fd: int) -> None:
        os.posix_fallocate(fd, self.written, 32 * MIB)
        self.written += 32 * MIB


async def write_until_it_stops(guest: VirtualGuest) -> tuple[int, int]:
    """The errno that ended the guest's writer, and the bytes that it made durable before."""
    await guest.machine.run(f"cat >/tmp/writer.py <<'END'\n{WRITER}\nEND")
    number, chunks = (await guest.machine.run("python3 /tmp/writer.py", within_s=300)).split()[-2:]
    return int(number), int(chunks) * CHUNK


async def drive_balloon(guest: VirtualGuest, pool: Path) -> None:
    """The host's watcher: more often the less is left, as the contract has it."""
    while True:
        left = free(pool)
        await guest.tell_free(left)
        await asyncio.sleep(2 if left > 2 * GIB else 1 if left > GIB else 0.5)


async def test_with_the_balloon_the_guest_meets_no_space_and_never_an_error(make_guest: MakeGuest, pool: Path) -> None:
    guest = make_guest()
    disk = blank(pool / "stateful", DISK)
    await guest.begin_serving(disk)
    await guest.start_termina()
    driving = asyncio.create_task(drive_balloon(guest, pool))
    filler = Filler(pool)
    filling = asyncio.create_task(filler.run())
    try:
        ended_by, durable = await write_until_it_stops(guest)
        left = free(pool)
        print(
            f"the writer got errno {ended_by} after {durable // MIB} MiB; others wrote {filler.written // MIB} MiB,"
            f" the host has {left // MIB} MiB left, the disk costs it {host_bytes(disk) // MIB} MiB"
        )
        assert ended_by == errno.ENOSPC
        assert not driving.done(), "the host's calls all passed"
    finally:
        for task in (driving, filling):
            task.cancel()
        await asyncio.gather(driving, filling, return_exceptions=True)
    assert left > 0
    assert await guest.machine.run(IO_ERRORS) == "0"
    assert int(await guest.machine.run(f"stat -c %s {WRITTEN}")) >= durable
    # Room given back is room to write, and nothing went read-only.
    await guest.machine.run(f"rm {WRITTEN}; sync; echo alive >/mnt/stateful/alive; sync")
    await guest.cut_power()
    await asyncio.to_thread(run, "btrfs", "check", "--readonly", disk)


async def test_without_the_balloon_the_same_is_damage(make_guest: MakeGuest, pool: Path) -> None:
    guest = make_guest()
    disk = blank(pool / "stateful", DISK)
    await guest.begin_serving(disk)
    await guest.start_termina()
    filling = asyncio.create_task(Filler(pool).run())
    try:
        ended_by, durable = await write_until_it_stops(guest)
    finally:
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)
    errors = int(await guest.machine.run(IO_ERRORS))
    print(f"the writer got errno {ended_by} after {durable // MIB} MiB; {errors} errors in the kernel's log")
    assert ended_by in {errno.EIO, errno.EROFS}
    assert errors > 0
