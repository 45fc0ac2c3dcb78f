"""The host's side as its administrator has it: `storaged-host serve` and `storagectl` as processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lab.vm.guests import VirtualGuest
from lab.vm.host import GUEST_PORT, READY_PORT

KNOWN_S = 60.0


class Controller:
    """One pool with the disks of some guests, who are reached over their vsock devices.

    By a relay that says CONNECT, or `hybrid`: it does so itself, and listens where they call.
    """

    def __init__(
        self,
        directory: Path,
        guests: dict[str, tuple[VirtualGuest, Path]],
        *,
        sharing: str = "",
        hybrid: bool = False,
    ) -> None:
        self._count = len(guests)
        self._address = f"unix:{directory}/host.sock"
        self._settings, self.log = directory / "host.toml", directory / "host.log"
        (pool,) = {disk.parent for _, disk in guests.values()}
        tables = [
            f"""
[guest.{name}]
{_reached(guest, hybrid=hybrid)}
image = "{disk}"
control = "qmp:{guest.machine.control}"
pid_file = "{guest.machine.pid_file}"
"""
            for name, (guest, disk) in guests.items()
        ]
        self._settings.write_text(f"""
[serve]
listen = ["{self._address}"]
[resize]
state_dir = "{directory}/host-state"
[sharing]
{sharing}
[pool.p]
path = "{pool}"
{"".join(tables)}""")
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Returns once it knows every guest's filesystem."""
        self.begin_serving()
        await self.knows()

    def begin_serving(self) -> None:
        """Start it."""
        command = [sys.executable, "-m", "storaged.host", "serve", "--config", str(self._settings)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def knows(self) -> None:
        """Returns once every guest has told of its filesystem."""
        deadline = time.monotonic() + KNOWN_S
        while True:
            found = await self.guests()
            if sum(bool(guest.get("filesystem_bytes")) for guest in found) == self._count:
                return
            assert time.monotonic() < deadline, (found, self.log.read_text())
            await asyncio.sleep(0.2)

    async def guests(self) -> list[dict[str, Any]]:
        """What `storagectl guests --json` says; nothing while nobody answers."""
        code, out, _ = await self.ctl("guests", "--json")
        return list(json.loads(out)["guests"]) if code == 0 else []

    async def begin(self, *arguments: str) -> asyncio.subprocess.Process:
        """Run `storagectl`; its output can be read as it comes."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "storaged.ctl.main", "--host", self._address, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"},
        )

    async def ctl(self, *arguments: str) -> tuple[int, str, str]:
        """`storagectl` from its beginning to its end: exit code, stdout, stderr."""
        process = await self.begin(*arguments)
        out, err = await process.communicate()
        return await process.wait(), out.decode(), err.decode()

    def close(self) -> None:
        """End it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        if self._process is not None:
            self._process.wait()


def _reached(guest: VirtualGuest, *, hybrid: bool) -> str:
    if not hybrid:
        return f'address = "unix:{guest.host.relayed}"'
    return f'address = "hybrid:{guest.machine.uds}:{GUEST_PORT}"\npeer = "hybrid:{guest.machine.uds}_{READY_PORT}"'
