"""The host's disk fills up while the guest writes as fast as it can, with the host's controller and without."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab.loop import run
from lab.vm.controller import Controller
from lab.vm.disks import blank, free, host_bytes, mounted, small_host
from lab.vm.guests import VirtualGuest
from storaged.units import MIB
from tests.vm.conftest import MakeGuest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

METADATA = 512 * MIB
"""Two copies of a chunk of 256 MiB: room that the host keeps for the guest's metadata."""
HOST, DISK = 1664 * MIB + METADATA, 2560 * MIB
RESERVE = 448 * MIB
OTHERS = 640 * MIB
"""What others on the host write in the meantime."""
WRITES_S = 40
FOLDER = "/mnt/stateful/files"
FILE = 4 * MIB
WRITER = f"""
import hashlib, json, os, sys, time

def content(number):
    return hashlib.sha256(str(number).encode()).digest() * ({FILE} // 32)

os.makedirs("{FOLDER}")
where = os.open("{FOLDER}", os.O_RDONLY)
kept, number, errors, full, ends = [], 0, [], 0, time.monotonic() + {WRITES_S}
while time.monotonic() < ends and len(errors) < 3:
    number += 1
    path, left, taken = f"{FOLDER}/{{number}}", memoryview(content(number)), False
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            while left:
                left = left[os.write(fd, left):]
            taken = True
            os.fsync(fd)
        finally:
            os.close(fd)
        os.fsync(where)
        kept.append(number)
    except OSError as error:
        # An honest ENOSPC comes before a write was taken, never after.
        if error.errno != {errno.ENOSPC} or taken:
            errors.append(error.errno)
            continue
        full += 1
        os.unlink(path)
        if full % 4 == 0:
            for old in kept[::2]:
                os.unlink(f"{FOLDER}/{{old}}")
            kept = kept[1::2]
        time.sleep(0.3)
print(json.dumps(dict(written=number, kept=kept, errors=errors, full=full)))
"""
IO_ERRORS = "dmesg | grep -cE 'I/O error|BTRFS.*(error|forced readonly|aborted)'; true"


@pytest.fixture
async def guest(make_guest: MakeGuest) -> AsyncIterator[tuple[VirtualGuest, Path]]:
    """A guest whose sparse disk lies in a host filesystem that is smaller than the disk."""
    with small_host(HOST) as pool:
        guest = make_guest()
        yield guest, blank(pool / "stateful", DISK)
        await guest.close()


@dataclass
class Seen:
    """What came of it."""

    written: int = 0
    kept: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    full: int = 0
    least: int = HOST
    others: int = 0


async def others(pool: Path, seen: Seen, most: int) -> None:
    """Others who write on the host, in steps."""
    with (pool / "others").open("wb") as file:
        while seen.others < most:
            await asyncio.to_thread(os.posix_fallocate, file.fileno(), seen.others, 8 * MIB)
            seen.others += 8 * MIB
            await asyncio.sleep(0.2)


async def look(pool: Path, seen: Seen) -> None:
    """How little the host ever had left."""
    while True:
        seen.least = min(seen.least, free(pool))
        await asyncio.sleep(0.02)


async def fill(guest: VirtualGuest, pool: Path, most: int) -> Seen:
    """The guest writes files for a while, the others fill the host."""
    seen = Seen()
    await guest.machine.run(f"cat >/tmp/writer.py <<'END'\n{WRITER}\nEND")
    tasks = [asyncio.create_task(others(pool, seen, most)), asyncio.create_task(look(pool, seen))]
    try:
        said = json.loads((await guest.machine.run("python3 /tmp/writer.py", within_s=200)).split("\n")[-1])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    seen.written, seen.kept, seen.errors, seen.full = said["written"], said["kept"], said["errors"], said["full"]
    return seen


def damaged(disk: Path, seen: Seen) -> list[int]:
    """The durable files that a host does not find whole, after the power was cut."""
    lost = []
    with mounted(disk) as target:
        for number in seen.kept:
            path = target / Path(FOLDER).name / str(number)
            if not path.exists() or path.read_bytes() != hashlib.sha256(str(number).encode()).digest() * (FILE // 32):
                lost.append(number)
    return lost


async def test_with_the_controller_the_guest_meets_no_space_and_never_an_error(
    guest: tuple[VirtualGuest, Path],
) -> None:
    machine, disk = guest
    pool = disk.parent
    # QEMU's own default: at the first write that finds the host full it would stop.
    await machine.begin_serving(disk, werror="enospc")
    await machine.start_termina()
    controller = Controller(
        machine.machine.directory, {"vm": (machine, disk)}, sharing=f'reserve_least = "{RESERVE}"\nbase = "64MiB"'
    )
    try:
        await controller.start()
        seen = await fill(machine, pool, OTHERS)
        print(
            f"{seen.written} files of {FILE // MIB} MiB begun, ENOSPC {seen.full} times, errors {seen.errors};"
            f" others wrote {seen.others // MIB} MiB; least free on the host {seen.least // MIB} MiB,"
            f" reserve {RESERVE // MIB} MiB"
        )
        assert seen.others == OTHERS
        assert not seen.errors
        assert seen.full > 0, "the guest met its bound"
        assert await machine.machine.run(IO_ERRORS) == "0"
        assert await machine.machine.io_status(machine.disk) == "ok"
        events = machine.machine.qmp.events
        assert not {"BLOCK_IO_ERROR", "STOP"} & set(events), events
        # Room in metadata's chunks is the guest's whenever it wants it: no balloon takes it, so the host keeps it.
        kept = (await machine.report()).balloon.may_write_bytes
        print(f"{kept // MIB} MiB may still be written, most of it metadata")
        assert 0 < seen.least <= RESERVE + kept + 128 * MIB, "close to its reserve, and never to its end"

        assert len(seen.kept) >= 8, "it could write, until the host was nearly full"
        # What is deleted in the guest comes back to the host.
        gone, seen.kept = seen.kept[::2], seen.kept[1::2]
        before, began = host_bytes(disk), time.monotonic()
        await machine.machine.run("cd " + FOLDER + "; rm " + " ".join(map(str, gone)) + "; sync")
        async with asyncio.timeout(60):
            while before - host_bytes(disk) < len(gone) * FILE * 0.9:
                await asyncio.sleep(0.2)
        print(
            f"{len(gone) * FILE // MIB} MiB deleted in the guest gave the host {(before - host_bytes(disk)) // MIB} MiB"
            f" back within {time.monotonic() - began:.1f} s: {before // MIB} before, {host_bytes(disk) // MIB} after"
        )
    finally:
        controller.close()
        print(controller.log.read_text())
    await machine.cut_power()
    await asyncio.to_thread(run, "btrfs", "check", "--readonly", disk)
    assert not await asyncio.to_thread(damaged, disk, seen)
    print(f"{len(seen.kept)} durable files, all whole")


@pytest.mark.vm_more
async def test_without_the_controller_the_same_is_damage(guest: tuple[VirtualGuest, Path]) -> None:
    machine, disk = guest
    await machine.begin_serving(disk)
    await machine.start_termina()
    seen = await fill(machine, disk.parent, OTHERS + METADATA)
    errors = int(await machine.machine.run(IO_ERRORS))
    await machine.machine.io_status(machine.disk)  # with its answer come the events before it
    failed = machine.machine.qmp.events.count("BLOCK_IO_ERROR")
    print(
        f"{seen.written} files begun, ENOSPC {seen.full} times, then errors {seen.errors}; {errors} errors in the"
        f" kernel's log, {failed} writes that QEMU could not do; least free on the host {seen.least // MIB} MiB"
    )
    assert set(seen.errors) <= {errno.EIO, errno.EROFS}
    assert seen.errors
    assert errors > 0
    assert failed > 0
    assert seen.least < 16 * MIB
