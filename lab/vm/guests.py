"""A guest as its host sees it: a machine from the saved state, a sparse disk, the daemon as process 1."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from lab.vm.host import GUEST_PORT, Calls, Host
from lab.vm.machine import Machine, free_directory
from storaged.rpc.proto import vm_guest_pb2

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
SERVES = b"serves what will be managed"
"""What the daemon says once it does."""


def settings_script(settings: str = SETTINGS) -> str:
    """For the agent: the daemon becomes process 1."""
    return f"cat >/etc/storaged.toml <<'END'\n{settings}\nEND\necho {SERVE} >/run/next"


def several_script(count: int) -> str:
    """For the agent: daemons of further filesystems, beside process 1."""
    return "\n".join(
        f"""mkdir -p {mountpoint(number)}
cat >/etc/storaged-{number}.toml <<'END'
[serve]
listen = ["vsock::{GUEST_PORT + number}"]
stateful = "{mountpoint(number)}"
state_dir = "{mountpoint(number)}/.storaged"
wait_for_stateful = true
END
python3 -m storaged serve --config /etc/storaged-{number}.toml </dev/null >/dev/console 2>&1 &"""
        for number in range(1, count)
    )


def mountpoint(number: int) -> str:
    """Where the filesystem of the daemon at port 8888 + `number` belongs."""
    return f"/mnt/stateful{number or ''}"


class VirtualGuest(Calls):
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
        await self.hear()

    async def begin_several(self, state: Path, disks: list[Path]) -> list[Calls]:
        """One filesystem and one daemon for each disk, in a machine that was saved with as many daemons."""
        await self.machine.wake(state)
        await self.host.listen()
        await self.machine.add_vsock()
        for number, disk in enumerate(disks):
            await self.machine.add_disk(disk, serial=f"s{number}")
        await self.machine.go()
        mounts = "\n".join(
            f"until d=$(grep -lx s{number} /sys/block/vd*/serial 2>/dev/null); do sleep 0.05; done\n"
            f"d=${{d#/sys/block/}}; mount -o discard=async /dev/${{d%/serial}} {mountpoint(number)} || exit 1"
            for number in range(len(disks))
        )
        await self.machine.run(mounts)
        return [await self.host.calls(GUEST_PORT + number) for number in range(len(disks))]

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
        await self.start_daemon(settings)
        await self.hear()

    async def start_daemon(self, settings: str = SETTINGS) -> None:
        """The daemon becomes process 1."""
        await self.machine.run(settings_script(settings))

    async def hear(self) -> None:
        """Returns once VmReady came."""
        async with asyncio.timeout(READY_S):
            await self.host.startup.ready.wait()
        await self.host.call()
        self.maitred, self.storage = self.host.maitred, self.host.storage

    async def start_termina(self) -> vm_guest_pb2.StartTerminaResponse:
        """As a host does once per start."""
        request = vm_guest_pb2.StartTerminaRequest(
            tremplin_ipv4_address=0x015C7364, lxd_ipv4_subnet="100.115.92.1/28", stateful_device="/dev/vdb"
        )
        return await self.host.maitred.StartTermina(request, timeout=150)

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
