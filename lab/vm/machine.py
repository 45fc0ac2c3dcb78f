"""A virtual machine: QEMU without hardware help, from a saved state or from power on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.vm import image
from lab.vm.parts import VSOCK, kernel
from lab.vm.qmp import Qmp

MEMORY_MIB = 1024
BOOT_S, AGENT_S, END_S = 90.0, 60.0, 60.0
COMMAND_LINE = "console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off"


async def until(condition: Callable[[], bool], within_s: float, what: str) -> None:
    """Returns once the condition holds. Raises AssertionError when it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.02)


class Machine:
    """One QEMU process, what it prints, and the agent in its guest."""

    def __init__(self, directory: Path, cid: int) -> None:
        self.directory = directory
        self.cid = cid
        self.console_path = directory / "console"
        self.uds = directory / "vsock"
        self.control = directory / "control"
        """QMP for a host; a monitor serves one caller at a time."""
        self.pid_file = directory / "pid"
        self.qmp: Qmp
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ready = asyncio.Event()
        self._agent: asyncio.StreamWriter
        self._listening: asyncio.Task[None] | None = None
        self._disks = itertools.count()
        self.records = 0
        """How many records the guest made durable, from `keep_writing`."""
        self.stopped_by = 0
        """The errno that ended `keep_writing`."""

    # --- life ---

    async def power_on(self, command_line: str = "") -> None:
        """Boot from nothing."""
        await self._start(
            "-kernel",
            str(kernel()),
            "-initrd",
            str(image.initramfs()),
            "-append",
            f"{COMMAND_LINE} {command_line}",
        )
        await self.qmp("cont")

    async def wake(self, state: Path) -> None:
        """Begin where the state was saved; stopped until `go`."""
        await self._start("-incoming", f"exec:cat {state}")
        deadline = time.monotonic() + BOOT_S
        while (await self.qmp("query-status"))["status"] == "inmigrate":
            assert time.monotonic() < deadline, "the saved state was not read"
            await asyncio.sleep(0.02)
        self._ready.set()

    async def _start(self, *how: str) -> None:
        qemu = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "pc,memory-backend=mem"),
            *("-smp", "1", "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-object", f"memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on"),
            *("-drive", f"file={image.disk()},if=none,id=image,format=raw,readonly=on"),
            *("-device", "virtio-blk-pci,drive=image"),
            *("-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-chardev", f"file,id=console,path={self.console_path},append=on", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,path={self.directory}/agent,server=on,wait=off"),
            *("-serial", "chardev:agent", "-qmp", f"unix:{self.directory}/qmp,server=on,wait=off", "-S"),
            *("-qmp", f"unix:{self.control},server=on,wait=off", "-pidfile", str(self.pid_file)),
        ]
        self.qemu = self._spawn("qemu", *qemu, *how)
        await until((self.directory / "agent").exists, BOOT_S, "QEMU's sockets")
        self.qmp = await self._connected(self.directory / "qmp")
        reader, self._agent = await asyncio.open_unix_connection(str(self.directory / "agent"), limit=1 << 22)
        self._listening = asyncio.create_task(self._listen(reader))

    async def _connected(self, path: Path) -> Qmp:
        deadline = time.monotonic() + BOOT_S
        while True:
            try:
                return await Qmp.connect(str(path))
            except (ConnectionError, FileNotFoundError):
                if self.qemu.poll() is not None or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.02)

    def _spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    async def save(self, state: Path) -> None:
        """Write the whole machine to a file; it goes no further."""
        await self.qmp("stop")
        await self.qmp("migrate", uri=f"exec:cat >{state}")
        deadline = time.monotonic() + BOOT_S
        while (found := await self.qmp("query-migrate"))["status"] != "completed":
            assert found["status"] != "failed", found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)

    async def go(self) -> None:
        """The guest runs."""
        await self.qmp("cont")

    async def ended(self, within_s: float = END_S) -> int:
        """QEMU's exit code once the guest has turned its power off."""
        await until(lambda: self.qemu.poll() is not None, within_s, "the machine's end")
        return self.qemu.wait()

    def stand_still(self) -> None:
        """Nothing in the machine moves. Not QMP's stop: the vsock device would forget its connections."""
        self.qemu.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """It moves again."""
        self.qemu.send_signal(signal.SIGCONT)

    def cut_power(self) -> None:
        """The end of the process, at once."""
        self.qemu.send_signal(signal.SIGKILL)
        self.qemu.wait()

    async def close(self) -> None:
        """Nothing of it is left."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._agent.close()
            self.qmp.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def says(self) -> str:
        """What a person needs when a test failed: the guest's console with the daemon's log, and QEMU's words."""
        return "\n".join(
            f"---- {path.name} of guest {self.cid}\n{text[-12000:]}"
            for path in (self.console_path, self.directory / "qemu.log", self.directory / "vsock.log")
            if path.exists() and (text := path.read_bytes().decode(errors="replace").strip())
        )

    # --- devices ---

    async def add_vsock(self) -> None:
        """A vsock device; the host's end is a socket of this directory."""
        server = self.directory / "vhost"
        self._spawn(
            "vsock", str(VSOCK), "--guest-cid", str(self.cid), "--socket", str(server), "--uds-path", str(self.uds)
        )
        await until(server.exists, 10, "vhost-device-vsock")
        backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": str(server)}}, "server": False}}
        await self.qmp("chardev-add", id="vsock", backend=backend)
        await self.qmp("device_add", driver="vhost-user-vsock-pci", id="vsock", chardev="vsock")

    async def add_disk(self, path: Path, werror: str = "report", serial: str = "") -> str:
        """A disk that gives what the guest discards back to its file; QEMU's name of it.

        `werror`: what QEMU does when the host cannot write, `report` it to the guest or, on `enospc`, stop.
        """
        name = f"disk{next(self._disks)}"
        await self.qmp(
            "blockdev-add",
            driver="raw",
            node_name=name,
            discard="unmap",
            detect_zeroes="unmap",
            file={"driver": "file", "filename": str(path), "discard": "unmap"},
        )
        await self.qmp(
            "device_add", driver="virtio-blk-pci", id=f"{name}-dev", drive=name, werror=werror, serial=serial
        )
        return name

    async def resize_disk(self, name: str, size: int) -> None:
        """Cut or extend the file; the guest hears of it."""
        await self.qmp("block_resize", node_name=name, size=size)

    async def throttle(self, name: str, rate: int = 0, iops: int = 0) -> None:
        """So many bytes and requests a second are read and written; 0: as many as can be."""
        limits = {"iops": iops, **dict.fromkeys(("bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)}
        await self.qmp.ask(
            "block_set_io_throttle", {"id": f"/machine/peripheral/{name}-dev/virtio-backend", "bps": rate, **limits}
        )

    async def io_status(self, name: str) -> str:
        """What QEMU itself says of the disk: `ok`, `nospace` or `failed`."""
        for block in await self.qmp("query-block"):
            if f"/{name}-dev" in block.get("qdev", ""):
                return str(block.get("io-status", "not kept"))
        raise AssertionError(f"QEMU has no disk {name}")

    # --- the agent ---

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if answer["id"] == 0:
                    self._ready.set()
                elif answer["id"] == -1:
                    self.records = answer.get("record", self.records - 1) + 1
                    self.stopped_by = answer.get("stopped", 0)
                elif (waiting := self._waiting.pop(answer["id"], None)) is not None and not waiting.done():
                    waiting.set_result(answer)

    async def booted(self) -> None:
        """Returns once the agent answers."""
        async with asyncio.timeout(BOOT_S):
            await self._ready.wait()

    async def _ask(self, within_s: float, **asked: str) -> dict[str, Any]:
        number = next(self._ids)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._agent.write(json.dumps({"id": number, **asked}).encode() + b"\n")
        async with asyncio.timeout(within_s):
            answer: dict[str, Any] = await waiting
            return answer

    def keep_writing(self, directory: str) -> None:
        """The guest writes record after record from now on, each durable before it is told."""
        self.records = self.stopped_by = 0
        self._agent.write(json.dumps({"id": next(self._ids), "keep_writing": directory}).encode() + b"\n")

    async def intact(self, directory: str) -> set[int]:
        """The records that are there as they were written."""
        return set((await self._ask(AGENT_S, intact=directory))["found"])

    async def run(self, script: str, *, within_s: float = AGENT_S, check: bool = True) -> str:
        """What a shell script in the guest printed. Raises AssertionError when it failed."""
        answer = await self._ask(within_s, run=script)
        text: str = answer["out"]
        assert not check or answer["code"] == 0, f"{script}\nexit code {answer['code']}: {text}"
        return text.strip()

    async def exec_first(self, *command: str) -> None:
        """Process 1 becomes this program."""
        await self.run(f"echo {' '.join(command)} >/run/next")


def free_directory(base: Path, name: str) -> Path:
    """A directory whose sockets have short names."""
    path = base / name
    path.mkdir()
    os.chmod(path, 0o700)
    return path
