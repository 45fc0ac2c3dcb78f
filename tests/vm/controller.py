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

from tests.vm.guests import VirtualGuest

KNOWN_S = 60.0


class Controller:
    """One pool with the guest `vm`, reached over its vsock device."""

    def __init__(self, guest: VirtualGuest, disk: Path, *, sharing: str = "") -> None:
        self._directory = guest.machine.directory
        self._address = f"unix:{self._directory}/host.sock"
        self._settings = self._directory / "host.toml"
        self._settings.write_text(f"""
[serve]
listen = ["{self._address}"]
[resize]
state_dir = "{self._directory}/host-state"
[sharing]
{sharing}
[pool.p]
path = "{disk.parent}"
[guest.vm]
address = "unix:{guest.host.relayed}"
image = "{disk}"
control = "qmp:{guest.machine.control}"
pid_file = "{guest.machine.pid_file}"
""")
        self._process: subprocess.Popen[bytes] | None = None
        self.log = self._directory / "host.log"

    async def start(self) -> None:
        """Returns once it knows its guest's filesystem."""
        command = [sys.executable, "-m", "storaged.host", "serve", "--config", str(self._settings)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + KNOWN_S
        while not (guest := await self.guest()).get("filesystem_bytes"):
            assert time.monotonic() < deadline, (guest, self.log.read_text())
            await asyncio.sleep(0.2)

    async def guest(self) -> dict[str, Any]:
        """What `storagectl guests --json` says of the guest; empty while nobody answers."""
        code, out, _ = await self.ctl("guests", "--json")
        return json.loads(out)["guests"][0] if code == 0 else {}

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
