"""A resize from the host's command line: image, the kernel's disk and filesystem of a virtual machine."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lab.loop import run
from lab.vm.controller import Controller
from lab.vm.disks import Base, check, host_bytes, make_base, small_host
from lab.vm.guests import VirtualGuest
from lab.vm.host import EMPTY
from storaged.host import superblock
from storaged.units import GIB, MIB
from tests.vm.conftest import MakeGuest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]
HOST, SIZE, LARGE = 24 * GIB, 6 * GIB, 12 * GIB
SMALL = 3 * GIB
SHARING = 'reserve_least = "256MiB"\nbase = "64MiB"'
SLOW = 24 * MIB
"""Bytes a second while somebody wants to catch a shrink in its middle."""


@pytest.fixture
async def site(make_guest: MakeGuest) -> AsyncIterator[tuple[VirtualGuest, Base, Controller]]:
    """A guest on a used disk in a small host filesystem, with the host's daemon."""
    with small_host(HOST) as pool:
        base = await asyncio.to_thread(make_base, pool / "stateful", SIZE, above=7 * GIB // 2)
        guest = make_guest()
        await guest.begin_serving(base.path, werror="enospc")
        await guest.start_termina()
        controller = Controller(guest.machine.directory, {"vm": (guest, base.path)}, sharing=SHARING)
        try:
            await controller.start()
            yield guest, base, controller
        finally:
            controller.close()
            print(controller.log.read_text())
            await guest.close()


def sizes(disk: Path) -> tuple[int, int]:
    """Image and filesystem, as they are on the host's disk."""
    return disk.stat().st_size, superblock.read(str(disk)).size


async def device(guest: VirtualGuest) -> int:
    """What the guest's kernel says its disk has."""
    return int(await guest.machine.run("cat /sys/class/block/vdb/size")) * 512


async def test_grow_and_shrink_by_the_command_line(site: tuple[VirtualGuest, Base, Controller]) -> None:
    guest, base, controller = site
    disk = base.path

    # Up: the image first, then the guest's disk, then its filesystem.
    began = time.monotonic()
    code, out, err = await controller.ctl("resize", "vm", "12G")
    print(f"12G in {time.monotonic() - began:.1f} s:\n{out}{err}")
    assert (code, err) == (0, "")
    assert sizes(disk) == (LARGE, LARGE)
    assert await device(guest) == LARGE
    assert (await guest.status()).current_size == LARGE

    # Down, interrupted once on the way: everything is as it was.
    await guest.machine.throttle(guest.disk, SLOW)
    shown = await interrupted(controller, "3G", at=5)
    print(f"interrupted:\n{shown}")
    assert sizes(disk) == (LARGE, LARGE)
    assert (await guest.status()).current_size == LARGE

    # Down to the end: filesystem, the guest's disk, image; slow enough to be watched.
    await guest.machine.throttle(guest.disk, 2 * SLOW)
    began = time.monotonic()
    code, out, err = await controller.ctl("resize", "vm", "3G", "--yes")
    print(f"3G in {time.monotonic() - began:.1f} s:\n{out}{err}")
    assert (code, err) == (0, "")
    assert len(set(re.findall(r"\b(\d+) %", out))) >= 2, "its progress is shown on the way"
    assert sizes(disk) == (SMALL, SMALL)
    assert await device(guest) == SMALL
    assert (await guest.status()).current_size == SMALL

    # Below what is possible: refused with what is, and nothing is touched.
    least = (await guest.host.maitred.GetResizeBounds(EMPTY, timeout=60)).minimum_size
    code, out, err = await controller.ctl("resize", "vm", "300M", "--yes")
    print(f"300M: exit code {code}: {err}")
    assert code == 1
    assert "the minimum is" in err or "below the least" in err
    named = max(
        int(number) for number in re.findall(r"\((\d+) bytes\)|\b(\d{8,})\b", err) for number in number if number
    )
    assert least <= named < SMALL or named >= 300 * MIB
    assert sizes(disk) == (SMALL, SMALL)

    assert await guest.machine.io_status(guest.disk) == "ok"
    # Once, for the cut of its image, the machine was stopped; it runs again.
    events = [event for event in guest.machine.qmp.events if event in {"BLOCK_IO_ERROR", "STOP", "RESUME"}]
    assert events[-2:] == ["STOP", "RESUME"], events
    assert events.count("STOP") == 1, events
    assert "BLOCK_IO_ERROR" not in events
    await guest.host.maitred.Shutdown(EMPTY, timeout=30)
    assert await guest.machine.ended() == 0
    assert sizes(disk) == (SMALL, SMALL)
    await asyncio.to_thread(check, disk, base)
    print(f"the image has {disk.stat().st_size} bytes, and costs the host {host_bytes(disk) // MIB} MiB")
    run("btrfs", "check", "--readonly", disk)


async def interrupted(controller: Controller, size: str, at: int) -> str:
    """What `storagectl resize` says when Ctrl-C comes at so many percent; it ends as cancelled."""
    process = await controller.begin("resize", "vm", size, "--yes")
    assert process.stdout is not None
    shown = ""
    async with asyncio.timeout(120):
        while line := (await process.stdout.readline()).decode():
            shown += line
            if any(int(percent) >= at for percent in re.findall(r"\b(\d+) %", line)) and "Ctrl-C" not in shown:
                process.send_signal(signal.SIGINT)
        rest, err = await process.communicate()
    shown += rest.decode() + err.decode()
    assert await process.wait() == 1, shown
    assert "asking storaged-host to cancel" in shown
    assert "cancelled" in shown
    return shown
