"""An image that crosvm holds: its control socket takes what `crosvm disk resize INDEX SIZE SOCKET` sends.

A packet socket (SOCK_SEQPACKET): one JSON text per packet, one answer per request. crosvm has no request that tells
a disk's size; it sets the length of the file, which says it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket

from storaged.errors import Kind
from storaged.host.images import WITHIN_S, ImageError, RawImage, within

_LONGEST = 65536


class CrosvmImage(RawImage):
    """The disk number `index`, counted as on crosvm's command line."""

    def __init__(self, path: str, control: str, index: int) -> None:
        super().__init__(path)
        self._control = control
        self._index = index

    async def check(self) -> None:
        await super().check()
        await self._tell()  # the size that it has: a harmless request that shows who is there

    async def _set(self, size: int) -> None:
        request = {"DiskCommand": {"disk_index": self._index, "command": {"Resize": {"new_size": size}}}}
        answer: object = None

        async def call() -> None:
            nonlocal answer
            answer = await asyncio.to_thread(_ask, self._control, request)

        await within(call, f"crosvm at {self._control}")
        if answer != "Ok":
            raise ImageError(f"crosvm refuses to resize disk {self._index}: {_why(answer)}", Kind.PRECONDITION)

    async def _tell(self) -> None:
        await self._set(await self.size())


def _ask(control: str, request: object) -> object:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(WITHIN_S)
        peer.connect(control)
        peer.send(json.dumps(request, separators=(",", ":")).encode())
        packet = peer.recv(_LONGEST)
    if not packet:
        raise ImageError(f"crosvm at {control} hung up")
    try:
        return json.loads(packet)
    except ValueError as error:
        raise ImageError(f"crosvm at {control} answers what is not understood") from error


def _why(answer: object) -> str:
    """`{"Err": 22}` is an errno, `{"ErrString": "..."}` a text."""
    if isinstance(answer, dict) and len(answer) == 1:
        (value,) = answer.values()
        return os.strerror(value) if isinstance(value, int) else str(value)[:200]
    return str(answer)[:200]
