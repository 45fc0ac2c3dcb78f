"""A guest as its host sees it: a machine from the saved state, a sparse disk, the daemon as process 1."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from tests.vm.host import EMPTY, Host
from tests.vm.machine import Machine, free_directory

READY_S = 60.0
CIDS = itertools.count(100)
SERVE = "/usr/bin/python3 -m storaged serve --config /etc/storaged.toml"
SETTINGS = """
[serve]
listen = ["vsock::8888"]
notify_host = "host"
crash_host = "host"
state_dir = "/mnt/stateful/.storaged"
[notify]
most_s = 0.5
[termina]
services = []
"""
SERVES = b"serves what will be mounted"
"""What the daemon says once it does."""


def settings_script(settings: str = SETTINGS) -> str:
    """For the agent: the daemon becomes process 1."""
    return f"cat >/etc/storaged.toml <<'END'\n{settings}\nEND\necho {SERVE} >/run/next"


class VirtualGuest:
    """One machine with its host's end."""

    def __init__(self, base: Path, booted: Path, serving: Path) -> None:
        self.cid = next(CIDS)
        self._booted = booted
        self._serving = serving
        self.machine = Machine(free_directory(base, str(self.cid)), self.cid)
        self.host = Host(self.machine.uds)
        self.disk = ""
        self._closed = False
        self.over = False
        """Its power was cut on purpose."""

    async def begin(self, disk: Path | None = None) -> None:
        """The machine runs, with its devices; no daemon yet."""
        await self._wake(self._booted, disk)

    async def begin_serving(self, disk: Path | None = None, *, werror: str = "report") -> None:
        """The same with the daemon that waits for its filesystem; returns once VmReady came."""
        await self._wake(self._serving, disk, werror)
        await self._hear()

    async def _wake(self, state: Path, disk: Path | None, werror: str = "report") -> None:
        await self.machine.wake(state)
        await self.host.listen()
        await self.machine.add_vsock()
        if disk is not None:
            self.disk = await self.machine.add_disk(disk, werror)
        await self.machine.go()
        if disk is not None:
            await self.machine.run("until test -b /dev/vdb; do sleep 0.05; done")

    async def serve(self, settings: str = SETTINGS) -> None:
        """The daemon becomes process 1; returns once VmReady came."""
        await self.machine.run(settings_script(settings))
        await self._hear()

    async def _hear(self) -> None:
        async with asyncio.timeout(READY_S):
            await self.host.startup.ready.wait()
        await self.host.call()

    async def start_termina(self) -> vm_guest_pb2.StartTerminaResponse:
        """As a host does once per start."""
        request = vm_guest_pb2.StartTerminaRequest(
            tremplin_ipv4_address=0x015C7364, lxd_ipv4_subnet="100.115.92.1/28", stateful_device="/dev/vdb"
        )
        return await self.host.maitred.StartTermina(request, timeout=150)

    async def status(self) -> vm_guest_pb2.GetResizeStatusResponse:
        """GetResizeStatus, with the host's deadline."""
        return await self.host.maitred.GetResizeStatus(EMPTY, timeout=20)

    async def resize(self, size: int) -> None:
        """ResizeFilesystem, as a host calls it."""
        await self.host.maitred.ResizeFilesystem(vm_guest_pb2.ResizeFilesystemRequest(size=size), timeout=20)

    async def resized(self, size: int, within_s: float = 90.0) -> None:
        """Returns once the host would be content. Raises AssertionError with the daemon's reason when it would not."""
        async with asyncio.timeout(within_s):
            while (status := await self.status()).resize_in_progress:
                await asyncio.sleep(0.1)
        if status.current_size != size:
            report = await self.host.storage.GetReport(storaged_v1_pb2.GetReportRequest(), timeout=20)
            raise AssertionError(f"{status.current_size} is not {size}: {report.job}")

    async def tell_free(self, free: int) -> bool:
        """UpdateStorageBalloon; true when the guest holds to it."""
        state = vm_guest_pb2.DISK_NORMAL if free > 2 << 30 else vm_guest_pb2.DISK_LOW
        if free <= 1 << 30:
            state = vm_guest_pb2.DISK_CRITICAL
        request = vm_guest_pb2.UpdateStorageBalloonRequest(state=state, free_space_bytes=free)
        answer = await self.host.maitred.UpdateStorageBalloon(request, timeout=20)
        return bool(answer.result == vm_guest_pb2.SUCCESS)

    async def available(self) -> int:
        """GetAvailableSpace."""
        return int((await self.host.maitred.GetAvailableSpace(EMPTY, timeout=20)).available_space)

    async def cut_power(self) -> None:
        """As if somebody pulled the plug."""
        self.machine.cut_power()
        await self.close()
        self.over = True

    async def close(self) -> None:
        """Nothing of it is left but files."""
        if self._closed:
            return
        self._closed = True
        await self.host.close()
        await self.machine.close()
