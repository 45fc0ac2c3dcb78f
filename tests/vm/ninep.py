"""The host's 9p server: diod, on a connection that came from the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
from pathlib import Path

from tests.guest.uml import UNPACKED, found

TATTACH = 104
HEADER = struct.Struct("<IBH")


def why_not() -> str:
    """Why there is no 9p server here; empty when there is."""
    return "" if found("diod") else "needs diod (tools/beside.sh unpacks it)"


def named(message: bytes, name: str) -> bytes:
    """The message; an attach that names nothing now names `name`: a host's server has one thing to serve, diod many."""
    _, kind, tag = HEADER.unpack_from(message)
    if kind != TATTACH:
        return message
    user = struct.unpack_from("<H", message, 15)[0]
    at = 17 + user
    assert struct.unpack_from("<H", message, at)[0] == 0, "the guest named what it wants"
    rest = message[at + 2 :]
    what = name.encode()
    body = message[7:at] + struct.pack("<H", len(what)) + what + rest
    return HEADER.pack(7 + len(body), kind, tag) + body


class Export:
    """A directory, served to whoever connects to `path`."""

    def __init__(self, directory: Path, path: str) -> None:
        self.directory = directory
        self.path = path
        self.connections = 0
        self.ended = asyncio.Event()
        self._server: asyncio.Server
        self._running: list[subprocess.Popen[bytes]] = []

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=1 << 20)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        ours, theirs = socket.socketpair()
        number = str(theirs.fileno())
        libraries = ":".join(str(UNPACKED / place / "x86_64-linux-gnu") for place in ("usr/lib", "lib"))
        self._running.append(
            subprocess.Popen(
                [str(found("diod")), "-f", "-n", "-e", self.directory, "-S", "-U", "root", "-r", number, "-w", number],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "LD_LIBRARY_PATH": libraries},
            )
        )
        theirs.close()
        from_diod, to_diod = await asyncio.open_connection(sock=ours, limit=1 << 20)
        try:
            back = asyncio.create_task(self._pump(from_diod, writer))
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    size = await reader.readexactly(4)
                    message = size + await reader.readexactly(struct.unpack("<I", size)[0] - 4)
                    to_diod.write(named(message, str(self.directory)))
                    await to_diod.drain()
            back.cancel()
        finally:
            to_diod.close()
            writer.close()
            self.ended.set()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def close(self) -> None:
        """End every server."""
        self._server.close()
        for process in self._running:
            process.kill()
            process.wait()
