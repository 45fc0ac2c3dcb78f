"""The machine stands still in the middle of a resize, and wakes with its clock far off."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from lab.loop import run
from lab.vm.disks import Base, check, make_base
from lab.vm.guests import VirtualGuest
from lab.vm.host import EMPTY
from storaged.rpc.proto import storaged_v1_pb2 as v1
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB, MIB
from tests.vm.conftest import MakeGuest

pytestmark = [pytest.mark.vm, pytest.mark.vm_more, pytest.mark.timeout(300)]
YEAR = 365 * 86400
SIZE = 3 * GIB


async def shrinking(guest: VirtualGuest, base: Base) -> int:
    """A shrink that moves data is under way; where it goes."""
    await guest.begin_serving(base.path)
    await guest.start_termina()
    assert await guest.tell_free(8 * GIB)
    bound = await guest.minimum()
    target = int(bound + 96 * MIB) // MIB * MIB
    await guest.resize(target)
    async with asyncio.timeout(30):
        while (await guest.report()).job.state != v1.JOB_RUNNING:
            await asyncio.sleep(0.05)
    return target


@pytest.mark.parametrize("off_by", [20 * YEAR, -3 * YEAR])
async def test_a_standstill_in_the_middle_of_a_shrink(make_guest: MakeGuest, place: Path, off_by: int) -> None:
    base = await asyncio.to_thread(make_base, place / "stateful", SIZE)
    guest = make_guest()
    target = await shrinking(guest, base)
    guest.machine.stand_still()
    await asyncio.sleep(5)
    guest.machine.go_on()
    now = int(time.time()) + off_by
    await guest.host.maitred.SetTime(vm.SetTimeRequest(time=Timestamp(seconds=now)), timeout=20)
    assert abs(int(await guest.machine.run("date +%s")) - now) < 60
    await guest.resized(target)
    # The host's next reports count, whatever the clock said before; calls still have their deadlines.
    assert await guest.tell_free(2 * GIB)
    assert await guest.available() <= GIB + MIB
    assert await guest.tell_free(8 * GIB)
    await guest.machine.resize_disk(guest.disk, SIZE)
    await guest.resize(SIZE)
    await guest.resized(SIZE)
    await guest.host.maitred.Shutdown(EMPTY, timeout=30)
    assert await guest.machine.ended() == 0
    await asyncio.to_thread(check, base.path, base)


async def test_a_sleep_that_was_announced(make_guest: MakeGuest, place: Path) -> None:
    base = await asyncio.to_thread(make_base, place / "stateful", SIZE)
    guest = make_guest()
    target = await shrinking(guest, base)
    await guest.host.maitred.PrepareToSuspend(EMPTY, timeout=20)
    assert not (await guest.status()).resize_in_progress, "it ended at a committed step"
    guest.machine.stand_still()
    # What is on the disk now is whole: the host may as well keep the machine for ever.
    copy = place / "copy"
    await asyncio.to_thread(run, "cp", "--sparse=always", base.path, copy)
    await asyncio.to_thread(check, copy, base)
    guest.machine.go_on()
    async with asyncio.timeout(30):
        while await put_off(guest, target):
            await asyncio.sleep(1)
    await guest.resized(target)


async def put_off(guest: VirtualGuest, target: int) -> bool:
    """True while the daemon starts no resize because of a sleep."""
    try:
        await guest.resize(target)
    except grpc.aio.AioRpcError as error:
        if "sleep" in str(error.details()):
            return True
        raise
    return False
