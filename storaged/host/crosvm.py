"""An image that crosvm holds: its control socket takes what `crosvm disk resize INDEX SIZE SOCKET` sends.

A packet socket (SOCK_SEQPACKET): one JSON text per packet, one answer per request. crosvm has no request that tells
a disk's size; it sets the length of the file, which says it.

While the image is cut the machine's processors are suspended (crosvm of August 2026, vm_control/src/lib.rs: VmRequest
SuspendVcpus and ResumeVcpus; `crosvm suspend` sends the same). No request tells whether they are, so a machine that an
administrator suspended right before a cut runs again after it. One with --force-s2idle answers and is not suspended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator

from storaged.errors import Kind
from storaged.host.images import WITHIN_S, Between, ImageError, RawImage, nothing, undone, within

_LONGEST = 65536


class CrosvmImage(RawImage):
    """The disk number `index`, counted as on crosvm's command line."""

    def __init__(self, path: str, control: str, index: int, between: Between = nothing) -> None:
        super().__init__(path, between)
        self._control = control
        self._index = index

    async def check(self) -> None:
        await super().check()
        await self._tell()  # the size that it has: a harmless request that shows who is there

    async def recover(self, *, cutting: bool) -> None:
        if cutting:
            await self._resume()

    @contextlib.asynccontextmanager
    async def _held(self, size: int) -> AsyncIterator[None]:  # noqa: ARG002  # the machine stops, whatever the size
        await super()._flush()  # as much as can be before the guest waits for it
        async with undone(self._resume):
            await self._ask("SuspendVcpus", "suspend the machine")
            yield

    async def _flush(self) -> None:
        await self._tell()  # crosvm resizes between two requests of the disk: those that were under way have ended
        await super()._flush()

    async def _resume(self) -> None:
        try:
            await self._ask("ResumeVcpus", "resume the machine")
        except ImageError as error:
            raise ImageError(
                f"{error.message}; its machine may still be suspended: crosvm resume {self._control}", error.kind
            ) from error

    async def _set(self, size: int) -> None:
        request = {"DiskCommand": {"disk_index": self._index, "command": {"Resize": {"new_size": size}}}}
        await self._ask(request, f"resize disk {self._index}")

    async def _ask(self, request: object, what: str) -> None:
        answer: object = None

        async def call() -> None:
            nonlocal answer
            answer = await asyncio.to_thread(_ask, self._control, request)

        await within(call, f"crosvm at {self._control}")
        if answer != "Ok":
            raise ImageError(f"crosvm refuses to {what}: {_why(answer)}", Kind.PRECONDITION)

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
