"""The plug is pulled in the middle of a shrink, a grow, an inflate and a journal's writing; then everybody looks.

Each machine has a disk and a daemon for every kind, so that one cut is one of each. Between two cuts a disk moves on:
what was cut is looked at by the host, found by a daemon that starts, brought to where it was going, and is then what
the next kind begins with.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab.loop import memory, run, workspace
from lab.vm.disks import Base, check, make_base
from lab.vm.guests import VirtualGuest, mountpoint
from lab.vm.host import Calls
from storaged.units import GIB, MIB
from tests.vm.conftest import DAEMONS, MakeGuest

pytestmark = pytest.mark.vm
AT_ONCE = 2
SIZE, LARGER, TOLD = 3 * GIB, 4 * GIB, 2 * GIB
PLENTY = 64 * GIB
KINDS = ("shrink", "grow", "inflate", "journal")
WINDOW_S = {"shrink": 3.0, "grow": 1.0, "inflate": 1.5, "journal": 1.5}
"""The cut comes so long after the call at the most; with the disks slowed down most find it under way."""
SLOW = {"shrink": (12 * MIB, 0), "grow": (0, 20), "inflate": (0, 20), "journal": (0, 40)}
"""Bytes and requests a second."""
FILE, FILES = 4 * MIB, 120


@dataclass
class Disk:
    """One disk on its way through the kinds."""

    path: Path
    target: int = 0
    """What it shrinks to."""
    durable: int = 0
    records: str = ""
    told: list[int] = field(default_factory=list)
    """Limits that the journal may have: the last that was answered, and those sent since."""


class Chain:
    """Machines one after the other, with a disk for each kind, and one more whose journal is looked at."""

    def __init__(self, make_guest: MakeGuest, several: Path, place: Path, base: Base, seed: int) -> None:
        self._make, self._several, self._place, self._base = make_guest, several, place, base
        self._seed, self._chance = seed, random.Random(seed)
        self._made = 0
        self.found: Counter[str] = Counter()
        self.chunks_over = self.seconds_over = 0.0
        """The most that a balloon which had just said SUCCESS left too much, and for how long."""

    async def cuts(self, count: int) -> None:
        """So many of each kind."""
        disks = [await self._fresh() for _ in range(DAEMONS)]
        for number in range(count + 1):
            guest = self._make()
            calls = await guest.begin_several(self._several, [disk.path for disk in disks])
            try:
                async with asyncio.TaskGroup() as ready:
                    for stage, disk in enumerate(disks):
                        ready.create_task(self._ready(stage, guest, calls[stage], disk))
                if number == count:
                    return
                await self._cut(number, guest, calls, disks)
            except BaseException:
                print(f"seed {self._seed}, cut {number}")
                raise
            for disk in disks[: len(KINDS)]:
                await asyncio.to_thread(check, disk.path, self._base)
            disks.pop().path.unlink()
            disks.insert(0, await self._fresh())

    async def _fresh(self) -> Disk:
        self._made += 1
        disk = Disk(self._place / f"disk-{self._seed}-{self._made}")
        await asyncio.to_thread(run, "cp", "--sparse=always", self._base.path, disk.path)
        await asyncio.to_thread(run, "btrfstune", "-f", "-u", disk.path)  # one kernel mounts no two of the same name
        return disk

    async def _ready(self, stage: int, guest: VirtualGuest, calls: Calls, disk: Disk) -> None:
        """Nothing hangs, nothing durable is lost; what was cut comes to its end, the next can begin."""
        report = await calls.mounted()
        assert not report.filesystem.read_only
        status = await calls.quiet(30)
        assert status.current_size == report.filesystem.size_bytes
        if disk.records:
            lost = set(range(disk.durable)) - await guest.machine.intact(f"{mountpoint(stage)}/records")
            assert not lost, f"of {disk.durable} durable records {sorted(lost)} are lost after a {disk.records}"
            self.found[f"records whole after a {disk.records}"] += disk.durable
            await guest.machine.run(f"rm -rf {mountpoint(stage)}/records")
            disk.durable, disk.records = 0, ""
        if disk.told:
            assert report.balloon.limit_bytes in disk.told, "what the journal says was told"
        disk.target = disk.target or (await calls.minimum() + 64 * MIB) // MIB * MIB
        if stage in {1, 2} and status.current_size not in {disk.target, LARGER}:
            assert disk.target <= status.current_size <= SIZE
            await calls.resize(disk.target)
            await calls.resized(disk.target)
        if stage in {1, 2}:
            await guest.machine.resize_disk(f"disk{stage}", LARGER)
        if stage == 2:
            await calls.resize(LARGER)
            await calls.resized(LARGER)
        if stage in {3, 4}:
            await self._held(calls)

    async def _held(self, calls: Calls) -> None:
        """The balloon comes to where it is told; a balance that the kernel took up again may be in its way."""
        async with asyncio.timeout(60):
            while not await calls.tell_free(TOLD):
                self.found["had to be told again after the boot"] += 1
                await asyncio.sleep(0.5)
        began, chunk = time.monotonic(), (await calls.report()).filesystem.data_chunk_bytes
        async with asyncio.timeout(30):
            while (over := await calls.available() - (TOLD - GIB)) > MIB:
                self.chunks_over = max(self.chunks_over, over / chunk)
                self.seconds_over = max(self.seconds_over, time.monotonic() - began)
                await asyncio.sleep(0.2)

    async def _cut(self, number: int, guest: VirtualGuest, calls: list[Calls], disks: list[Disk]) -> None:
        """All kinds begin, each so long before the cut as chance has it."""
        for stage, kind in enumerate(KINDS):
            rate, iops = SLOW[kind]
            await guest.machine.throttle(f"disk{stage}", rate, iops)
        chosen = number % len(KINDS)
        disks[chosen].records = KINDS[chosen]
        guest.machine.keep_writing(f"{mountpoint(chosen)}/records")
        work: dict[str, Callable[[Calls, Disk], Awaitable[None]]] = {
            "shrink": lambda calls, disk: self._resize(calls, disk.target),
            "grow": lambda calls, _: self._resize(calls, LARGER),
            "inflate": lambda calls, _: self._inflate(calls),
            "journal": self._tell,
        }
        before = {kind: self._chance.uniform(0, WINDOW_S[kind]) for kind in KINDS}
        cut_at = time.monotonic() + max(before.values()) + 0.1
        tasks = {
            kind: asyncio.create_task(self._at(cut_at - before[kind], work[kind], calls[stage], disks[stage]))
            for stage, kind in enumerate(KINDS)
        }
        await asyncio.sleep(cut_at - time.monotonic())
        disks[chosen].durable = guest.machine.records
        for kind, task in tasks.items():
            self.found[f"{kind}: {'over' if task.done() else 'under way'}"] += 1
        guest.machine.cut_power()
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        await guest.cut_power()

    @staticmethod
    async def _at(when: float, work: Callable[[Calls, Disk], Awaitable[None]], calls: Calls, disk: Disk) -> None:
        await asyncio.sleep(when - time.monotonic())
        await work(calls, disk)

    @staticmethod
    async def _resize(calls: Calls, size: int) -> None:
        await calls.resize(size)
        await calls.quiet()

    @staticmethod
    async def _inflate(calls: Calls) -> None:
        while not await calls.tell_free(TOLD):
            await asyncio.sleep(0.1)

    @staticmethod
    async def _tell(calls: Calls, disk: Disk) -> None:
        """A report after the other, each a little different, so that each is written down."""
        limit, disk.told = TOLD - GIB, [TOLD - GIB]
        while True:
            limit += 64 << 10
            disk.told = [disk.told[-1], limit]
            if await calls.tell_free(limit + GIB):
                disk.told = [limit]


async def cuts(make_guest: MakeGuest, several: Path, count: int) -> None:
    """`count` of each kind; says what was hit."""
    began = time.monotonic()
    with workspace(memory()) as place:
        base = await asyncio.to_thread(make_base, place / "base", SIZE, file=FILE, files=FILES, kept_every=6)
        seed = int(os.environ.get("VM_SEED", "1"))
        chains = [Chain(make_guest, several, place, base, seed * 100 + number) for number in range(AT_ONCE)]
        async with asyncio.TaskGroup() as all_of_them:
            for chain in chains:
                all_of_them.create_task(chain.cuts(count // AT_ONCE))
    found = sum((chain.found for chain in chains), Counter[str]())
    print(f"{count} cuts of each kind in {time.monotonic() - began:.0f} s: {dict(sorted(found.items()))}")
    chunks, seconds = max(chain.chunks_over for chain in chains), max(chain.seconds_over for chain in chains)
    print(f"after the boot, once told: at most {chunks:.2f} data chunks too much, for at most {seconds:.1f} s")
    for kind in KINDS:
        assert found[f"{kind}: under way"] >= count // 3, "the moments miss what they are about"


@pytest.mark.timeout(900)
async def test_cuts_of_each_kind(make_guest: MakeGuest, several: Path) -> None:
    await cuts(make_guest, several, int(os.environ.get("VM_CUTS", "20")))


@pytest.mark.slow
@pytest.mark.timeout(9000)
async def test_two_hundred_cuts_of_each_kind(make_guest: MakeGuest, several: Path, place: Path) -> None:
    assert shutil.disk_usage(place).free > 8 * GIB
    await cuts(make_guest, several, 200)
