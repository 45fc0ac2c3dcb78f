"""Two worlds for mounts: memory, and this kernel with loop devices in the mount namespace of one thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from lab.loop import run
from storaged.guest.kernel_mounts import KernelMounts, _unescaped
from storaged.guest.mounts import (
    Mounts,
    MountSystem,
)
from storaged.sim.mounts import SimMounts
from tests.guest.private_mounts import private_thread, why_not

Answer = TypeVar("Answer")
MIB = 1 << 20


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


def spoil(device: str, where: int, content: bytes) -> None:
    """Write to the device."""
    with open(device, "r+b") as file:
        file.seek(where)
        file.write(content)
