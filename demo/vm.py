"""`make demo-vm`: the main job with two true virtual machines, each with a kernel of its own, over vsock.

A host's disk of 5 GiB carries the sparse disks of two machines that were promised 4 GiB each. `storaged-host` shares it
out; the host fills up, one guest writes at full speed, files are deleted, a guest is resized. Every claim is checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.screen import Bar, Screen, gib
from lab.loop import memory, run, sweep
from lab.vm import parts
from lab.vm.controller import Controller
from lab.vm.disks import blank, free, host_bytes, small_host
from lab.vm.guests import VirtualGuest
from lab.vm.host import EMPTY
from lab.vm.saved import Saved, save
from storaged.host import superblock
from storaged.units import GIB, MIB

HOST, PROMISED, RESERVE = 5 * GIB, 4 * GIB, 512 * MIB
OTHERS = 2400 * MIB
FILES = "/mnt/stateful/files"
WRITE = f"""mkdir {FILES}; n=0
while dd if=/dev/urandom of={FILES}/$n bs=1M count=8 conv=fsync 2>/tmp/said; do n=$((n+1)); done
rm {FILES}/$n; echo $n; grep -c 'No space left' /tmp/said"""
IO_ERRORS = "dmesg | grep -cE 'I/O error|BTRFS.*(error|forced readonly|aborted)'; true"
SHARING = f'reserve_least = "{RESERVE}"\nbase = "128MiB"'


@dataclass
class Play:
    """Two machines, their disks, and who looks after them."""

    screen: Screen
    pool: Path
    guests: dict[str, VirtualGuest]
    disks: dict[str, Path]
    controller: Controller
    failed: list[str] = field(default_factory=list)

    def check(self, claim: str, held: bool) -> None:
        """Say whether a claim held; a broken one fails the demo."""
        self.screen.say(("✓ " if held else "✗ ") + claim, "green" if held else "bold red")
        if not held:
            self.failed.append(claim)

    async def draw(self) -> None:
        """Keep the bars up to date."""
        while True:
            left = free(self.pool)
            costs = {name: host_bytes(disk) for name, disk in self.disks.items()}
            others = max(HOST - left - sum(costs.values()), 0)
            parts = [("█", "cyan", sum(costs.values())), ("▒", "blue", others)]
            bars = [Bar("host", HOST, parts, f"{gib(left)} free")]
            for name, guest in self.guests.items():
                with contextlib.suppress(Exception):
                    report = await guest.report()
                    fs, held = report.filesystem, report.balloon.size_bytes
                    used = max(fs.data_used_bytes - held, 0)
                    parts = [("█", "cyan", used), ("▓", "magenta", held), ("░", "green", fs.available_bytes)]
                    bars.append(Bar(f"guest {name}", fs.size_bytes, parts, f"costs {gib(costs[name])}"))
            self.screen.bars = bars
            await asyncio.sleep(0.25)


async def promises(play: Play) -> None:
    """What both may write is there."""
    play.screen.scene(f"1. Two machines were promised {gib(2 * PROMISED)} on a disk of {gib(HOST)}")
    before = [await guest.available() for guest in play.guests.values()]
    await play.controller.start()
    await asyncio.sleep(5)  # grants follow one another
    after = [await guest.available() for guest in play.guests.values()]
    for name, old, new in zip(play.guests, before, after, strict=True):
        play.screen.say(f"guest {name} believed in {gib(old)}, may write {gib(new)}")
    play.check(
        f"together they may write {gib(sum(after))}; the host has {gib(free(play.pool))} and keeps {gib(RESERVE)}",
        sum(after) <= free(play.pool) - RESERVE + 64 * MIB,
    )


async def fills_up(play: Play) -> None:
    """The host fills up while a guest writes at full speed."""
    play.screen.scene("3. The host fills up while guest a writes at full speed")
    least = HOST

    async def others() -> None:
        nonlocal least
        with (play.pool / "others").open("wb") as file:
            for at in range(0, OTHERS, 16 * MIB):
                await asyncio.to_thread(os.posix_fallocate, file.fileno(), at, 16 * MIB)
                least = min(least, free(play.pool))
                await asyncio.sleep(0.15)

    machine = play.guests["a"].machine
    async with asyncio.TaskGroup() as both:
        both.create_task(others())
        writing = both.create_task(machine.run(WRITE, within_s=240))
    files, full = map(int, writing.result().split()[-2:])
    least = min(least, free(play.pool))
    play.screen.say(
        f"guest a wrote {gib(files * 8 * MIB)}, others {gib(OTHERS)}; the host had {gib(least)} at the least"
    )
    play.check("it ended with “no space left on device”", full == 1)
    errors = int(await machine.run(IO_ERRORS))
    fine = await machine.io_status("disk0") == "ok" and not {"BLOCK_IO_ERROR", "STOP"} & set(machine.qmp.events)
    play.check("no I/O error in its kernel; QEMU did every write and never stopped", errors == 0 and fine)
    play.check("the host never ran out", least > 0)


async def gives_back(play: Play) -> None:
    """What is deleted returns."""
    play.screen.scene("4. Files are deleted in guest a")
    machine, disk = play.guests["a"].machine, play.disks["a"]
    before = host_bytes(disk)
    gone = int(await machine.run(f"du -sm {FILES} | cut -f1")) * MIB
    began = time.monotonic()
    await machine.run(f"rm -r {FILES}; sync")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            while before - host_bytes(disk) < gone * 0.9:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.1)
    back = before - host_bytes(disk)
    play.check(
        f"{gib(gone)} deleted gave the host {gib(back)} back in {time.monotonic() - began:.1f} s", back >= gone * 0.9
    )


async def grows(play: Play) -> None:
    """Before the host is full."""
    play.screen.scene("2. storagectl grows guest b: image, the kernel's disk, filesystem")
    await _resize(play, "6G", 6 * GIB)


async def shrinks(play: Play) -> None:
    """Whatever the host has left."""
    play.screen.scene("5. storagectl shrinks guest b")
    await _resize(play, "3G", 3 * GIB)


async def _resize(play: Play, size: str, wanted: int) -> None:
    began = time.monotonic()
    code, out, err = await play.controller.ctl("resize", "b", size, "--yes")
    play.screen.say((out + err).strip().split("\n")[-1])
    disk = play.disks["b"]
    sizes = (disk.stat().st_size, superblock.read(str(disk)).size)
    play.check(
        f"image and filesystem have {gib(wanted)} after {time.monotonic() - began:.1f} s",
        code == 0 and sizes == (wanted, wanted),
    )


async def ends(play: Play) -> None:
    """Both are turned off, and their disks looked at."""
    play.screen.scene("6. Both machines are turned off")
    for guest in play.guests.values():
        await guest.maitred.Shutdown(EMPTY, timeout=30)
    codes = [await guest.machine.ended() for guest in play.guests.values()]
    play.check("both ended by themselves", codes == [0, 0])
    play.controller.close()
    for name, disk in play.disks.items():
        try:
            await asyncio.to_thread(run, "btrfs", "check", "--readonly", disk)
            sound = True
        except RuntimeError:
            sound = False
        play.check(f"btrfs check of guest {name}'s disk is clean", sound)


async def play_all(screen: Screen, directory: Path, saved: Saved) -> list[str]:
    """The acts; the claims that did not hold."""
    with small_host(HOST) as pool:
        guests = {name: VirtualGuest(directory, saved.booted, saved.serving) for name in ("a", "b")}
        disks = {name: blank(pool / f"{name}.img", PROMISED) for name in guests}
        controller = Controller(
            directory, {name: (guest, disks[name]) for name, guest in guests.items()}, sharing=SHARING
        )
        play = Play(screen, pool, guests, disks, controller)
        painter: asyncio.Task[None] | None = None
        try:
            began = time.monotonic()
            starting: list[Coroutine[Any, Any, Any]] = [
                guest.begin_serving(disks[name], werror="enospc") for name, guest in guests.items()
            ]
            await asyncio.gather(*starting)
            for guest in guests.values():
                await guest.start_termina()
            screen.say(
                f"two machines, VmReady over vsock, StartTermina on blank disks: {time.monotonic() - began:.1f} s"
            )
            painter = asyncio.create_task(play.draw())
            for act in (promises, grows, fills_up, gives_back, shrinks, ends):
                await act(play)
        except BaseException:
            for guest in guests.values():
                print(guest.machine.says(), file=sys.stderr)
            raise
        finally:
            if painter is not None:
                painter.cancel()
            controller.close()
            for guest in guests.values():
                await guest.close()
        return play.failed


def main() -> int:
    """0 when every claim held."""
    if reason := parts.why_not():
        print(f"demo-vm: cannot be shown here: {reason}")
        return 0
    sweep()
    screen = Screen()
    directory = Path(tempfile.mkdtemp(prefix="storaged-vm-", dir=memory()))
    try:
        with screen:
            screen.scene("0. A machine is booted once, and saved")
            saved = asyncio.run(save(directory))
            failed = asyncio.run(play_all(screen, directory, saved))
    except KeyboardInterrupt:
        print("demo-vm: stopped; everything is cleaned up", file=sys.stderr)
        return 130
    finally:
        rmtree(directory, ignore_errors=True)
    for claim in failed:
        print(f"demo-vm: did not hold: {claim}", file=sys.stderr)
    screen.console.print("demo-vm: every claim held" if not failed else f"demo-vm: {len(failed)} did not hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
