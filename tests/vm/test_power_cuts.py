"""The plug is pulled in the middle of a shrink, a grow, an inflate; then the disk is looked at, and the guest boots."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from lab.loop import run
from storaged.rpc.proto import storaged_v1_pb2 as v1
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB, MIB
from tests.vm.conftest import MakeGuest
from tests.vm.disks import Base, check, make_base
from tests.vm.guests import VirtualGuest
from tests.vm.host import EMPTY

pytestmark = pytest.mark.vm
AT_ONCE = 2
SIZE, LARGER, TOLD = 3 * GIB, 4 * GIB, 2 * GIB
SHRINK_TAKES_S, GROW_TAKES_S, INFLATE_TAKES_S = 2.0, 0.3, 0.5
"""About; moments are chosen from the call to a little after this."""
RECORDS = "/mnt/stateful/records"


class Cuts:
    """Rounds of three cuts on one disk after the other: a shrink, a grow, an inflate."""

    def __init__(self, make_guest: MakeGuest, place: Path, base: Base, seed: int) -> None:
        self._make = make_guest
        self._place = place
        self._base = base
        self._chance = random.Random(seed)
        self._seed = seed
        self._bound = 0
        self.found: Counter[str] = Counter()

    async def rounds(self, count: int) -> None:
        for number in range(count):
            disk = self._place / f"disk-{self._seed}-{number}"
            await asyncio.to_thread(run, "cp", "--sparse=always", self._base.path, disk)
            try:
                await self._round(disk)
            except BaseException:
                print(f"seed {self._seed}, round {number}")
                print(await self._guest.host.storage.GetReport(v1.GetReportRequest(), timeout=20))
                print(
                    await self._guest.machine.run(
                        "btrfs filesystem usage -b /mnt/stateful; btrfs balance status /mnt/stateful", check=False
                    )
                )
                raise
            disk.unlink()

    async def _round(self, disk: Path) -> None:
        guest = await self._boot(disk)
        self._bound = (await guest.host.maitred.GetResizeBounds(EMPTY, timeout=60)).minimum_size
        target = (self._bound + 96 * MIB) // MIB * MIB
        assert target < SIZE - 512 * MIB
        await guest.resize(target)
        durable = await self._cut(guest, disk, "shrink", SHRINK_TAKES_S)

        guest = await self._boot(disk)
        await self._settled(guest, "shrink", durable, target, SIZE)
        await guest.resize(target)
        await guest.resized(target)
        await guest.machine.resize_disk(guest.disk, LARGER)
        await guest.resize(LARGER)
        durable = await self._cut(guest, disk, "grow", GROW_TAKES_S)

        guest = await self._boot(disk)
        await self._settled(guest, "grow", durable, target, LARGER)
        await guest.resize(LARGER)
        await guest.resized(LARGER)
        telling = asyncio.create_task(guest.tell_free(TOLD))
        durable = await self._cut(guest, disk, "inflate", INFLATE_TAKES_S)
        await asyncio.gather(telling, return_exceptions=True)

        guest = await self._boot(disk)
        await self._settled(guest, "inflate", durable, LARGER, LARGER)
        balloon = (await guest.host.storage.GetReport(v1.GetReportRequest(), timeout=20)).balloon
        self.found[f"inflate: {'nothing' if not balloon.size_bytes else 'balloon'} there after the boot"] += 1
        # A balance that the cut interrupted is taken up again by the kernel at mount, and the balloon waits for it.
        async with asyncio.timeout(60):
            while not await guest.tell_free(TOLD):
                self.found["inflate: had to be told again after the boot"] += 1
                await asyncio.sleep(1)
        # Such a balance also gives back a chunk that was out of use, which may be one too many, for a moment.
        chunk = (await guest.host.storage.GetReport(v1.GetReportRequest(), timeout=20)).filesystem.data_chunk_bytes
        async with asyncio.timeout(30):
            while (available := await guest.available()) > TOLD - GIB + MIB:
                assert available <= TOLD - GIB + chunk + MIB, (available, chunk)
                self.found["inflate: a chunk too many for a moment"] += 1
                await asyncio.sleep(1)
        await guest.cut_power()

    async def _boot(self, disk: Path) -> VirtualGuest:
        guest = self._make()
        self._guest = guest
        await guest.begin_serving(disk)
        started = await guest.start_termina()
        assert started.mount_result == vm.StartTerminaResponse.SUCCESS
        return guest

    async def _cut(self, guest: VirtualGuest, disk: Path, what: str, takes_s: float) -> int:
        """How many records were durable by then."""
        guest.machine.keep_writing(RECORDS)
        await asyncio.sleep(self._chance.uniform(0, takes_s))
        durable = guest.machine.records
        if what != "inflate":
            self.found[f"{what}: {'running' if (await guest.status()).resize_in_progress else 'over'} at the cut"] += 1
            durable = guest.machine.records
        await guest.cut_power()
        await asyncio.to_thread(check, disk, self._base)
        return durable

    async def _settled(self, guest: VirtualGuest, what: str, durable: int, least: int, most: int) -> None:
        """No job hangs, the size is one that the filesystem may have, nothing durable is lost."""
        async with asyncio.timeout(30):
            while (status := await guest.status()).resize_in_progress:
                await asyncio.sleep(0.1)
        assert least <= status.current_size <= most, (what, status)
        report = await guest.host.storage.GetReport(v1.GetReportRequest(), timeout=20)
        assert status.current_size in {report.filesystem.size_bytes, least}
        assert not report.filesystem.read_only
        if durable:
            lost = set(range(durable)) - await guest.machine.intact(RECORDS)
            assert not lost, f"{what}: of {durable} durable records {sorted(lost)} are lost"
        self.found["records checked"] += durable
        await guest.machine.run(f"rm -rf {RECORDS}")


async def cuts(make_guest: MakeGuest, place: Path, rounds: int) -> None:
    began = time.monotonic()
    base = await asyncio.to_thread(make_base, place / "base", SIZE)
    seed = int(os.environ.get("VM_SEED", "1"))
    chains = [Cuts(make_guest, place, base, seed * 100 + number) for number in range(AT_ONCE)]
    async with asyncio.TaskGroup() as all_of_them:
        for chain in chains:
            all_of_them.create_task(chain.rounds(rounds // AT_ONCE))
    found = sum((chain.found for chain in chains), Counter[str]())
    print(f"{rounds} cuts of each kind in {time.monotonic() - began:.0f} s: {dict(sorted(found.items()))}")
    assert found["shrink: running at the cut"] >= rounds // 3, "the moments miss what they are about"


@pytest.mark.timeout(900)
async def test_cuts_of_each_kind(make_guest: MakeGuest, place: Path) -> None:
    await cuts(make_guest, place, int(os.environ.get("VM_CUTS", "10")))


@pytest.mark.slow
@pytest.mark.timeout(9000)
async def test_two_hundred_cuts_of_each_kind(make_guest: MakeGuest, place: Path) -> None:
    assert shutil.disk_usage(place).free > 8 * GIB
    await cuts(make_guest, place, 200)
