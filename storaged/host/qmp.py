"""An image that QEMU holds: its monitor is asked over QMP (query-block, query-named-block-nodes, block_resize).

While the image is cut the machine is stopped (`stop`, which also flushes its disks; `cont`). One that was not running
is left as it is. That we stopped it is written down in QEMU itself, as an object named MARK: a process that finds it
after a crash knows that the machine is to run again, and one that an administrator stopped stays stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from storaged.errors import Kind
from storaged.host.images import Between, ImageError, RawImage, nothing, undone, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qemu.qmp import QMPClient

log = logging.getLogger(__name__)

MARK = "storaged-host-cuts"
_RUNS = {"running", "suspended"}
"""States (QEMU: qapi/run-state.json, RunState) in which the guest runs or may wake up by itself."""
_RETRY_S = 1.0
_RESUMING: set[asyncio.Task[None]] = set()
"""Machines that could not be resumed yet."""


class QmpImage(RawImage):
    """The disk `disk` (a node-name, a qdev id or a drive's name; empty: the one that holds the image)."""

    def __init__(self, path: str, socket: str, disk: str, between: Between = nothing) -> None:
        super().__init__(path, between)
        self._socket = socket
        self._disk = disk

    async def size(self) -> int:
        found = 0

        async def call() -> None:
            nonlocal found
            async with self._connected() as client:
                found = (await self._node(client))[1]

        await within(call, self._who)
        return found

    async def _set(self, size: int) -> None:
        async def call() -> None:
            async with self._connected() as client:
                name, _ = await self._node(client)
                await self._execute(client, "block_resize", {"node-name": name, "size": size})

        await within(call, self._who)

    async def check(self) -> None:
        await self.recover(cutting=False)
        await super().check()
        await self.size()

    async def recover(self, *, cutting: bool) -> None:  # noqa: ARG002  # the mark says it
        if await self._unmark():
            log.warning("%s: the machine that an interrupted cut had stopped runs again", self._who)

    @contextlib.asynccontextmanager
    async def _held(self, size: int) -> AsyncIterator[None]:  # noqa: ARG002  # the machine stops, whatever the size
        await self._flush()  # as much as can be before the guest waits for it
        async with undone(self._resume):
            await self._stop()
            yield

    async def _stop(self) -> None:
        async def call() -> None:
            async with self._connected() as client:
                if await self._state(client) not in _RUNS:
                    return
                await self._execute(client, "object-add", {"qom-type": "secret", "id": MARK, "data": "stopped"})
                await self._execute(client, "stop")
                if (state := await self._state(client)) in _RUNS:
                    raise ImageError(f"{self._who}: the machine is {state} after stop", Kind.PRECONDITION)

        await within(call, self._who)

    async def _resume(self) -> None:
        """Have the machine run that `_stop` stopped; goes on trying in the background when the monitor hangs."""
        try:
            await self._unmark()
        except ImageError as error:
            task = asyncio.create_task(self._keep_resuming(), name=f"resume {self._socket}")
            _RESUMING.add(task)
            task.add_done_callback(_RESUMING.discard)
            raise ImageError(
                f"{error.message}; the machine may still be stopped, which is tried again until it runs", error.kind
            ) from error

    async def _keep_resuming(self) -> None:
        from qemu.qmp import ConnectError

        while True:
            await asyncio.sleep(_RETRY_S)
            try:
                return await self.recover(cutting=True)
            except ImageError as error:
                # Others (EAGAIN, EINVAL) come from a monitor whose queue is full because it hangs.
                cause = error.__cause__
                ended = (ConnectionRefusedError, FileNotFoundError)
                if isinstance(cause, ConnectError) and isinstance(cause.exc, ended):
                    return None  # QEMU has ended

    async def _unmark(self) -> bool:
        """Have a machine run that carries our mark; whether it did."""
        marked = False

        async def call() -> None:
            nonlocal marked
            async with self._connected() as client:
                objects = await self._execute(client, "qom-list", {"path": "/objects"})
                if marked := any(each.get("name") == MARK for each in objects):
                    if await self._state(client) == "paused":
                        await self._execute(client, "cont")
                    await self._execute(client, "object-del", {"id": MARK})

        await within(call, self._who)
        return marked

    async def _state(self, client: QMPClient) -> str:
        return str((await self._execute(client, "query-status")).get("status"))

    @property
    def _who(self) -> str:
        return f"QEMU's monitor at {self._socket}"

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[QMPClient]:
        # Here, not above: only hosts with QEMU guests pay for it.
        from qemu.qmp import ConnectError, QMPClient

        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what fails is raised, too
        client = QMPClient("storaged-host")
        try:
            await client.connect(self._socket)
        except ConnectError as error:
            raise ImageError(f"{self._who}: {error.exc}") from error
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):  # it may be gone; that was said where it mattered
                await client.disconnect()

    async def _execute(self, client: QMPClient, command: str, arguments: dict[str, Any] | None = None) -> Any:
        from qemu.qmp import ExecuteError, QMPError

        try:
            return await client.execute(command, arguments)
        except ExecuteError as error:
            raise ImageError(f"QEMU refuses {command}: {error}", Kind.PRECONDITION) from error
        except QMPError as error:
            raise ImageError(f"{self._who}: {error}") from error

    async def _node(self, client: QMPClient) -> tuple[str, int]:
        """(node-name, size) of the raw node in front of our file."""
        wanted = self._disk
        for block in await self._execute(client, "query-block"):
            names = {block.get("device"), _without_path(block.get("qdev", ""))} - {""}
            if wanted and wanted in names and "inserted" in block:
                wanted = block["inserted"].get("node-name", "")
        nodes = await self._execute(client, "query-named-block-nodes", {"flat": True})
        for node in nodes:
            name = node.get("node-name", "")
            if node.get("drv") == "file" and name != wanted:
                continue  # the protocol below the format
            if (name == wanted) if wanted else await asyncio.to_thread(_same, node.get("file", ""), self.path):
                await self._ours(node)
                return name, int(node["image"]["virtual-size"])
        raise ImageError(f"QEMU at {self._socket} has no disk {wanted or self.path}", Kind.PRECONDITION)

    async def _ours(self, node: dict[str, Any]) -> None:
        if node.get("drv") not in {"raw", "file"}:
            raise ImageError(f"image {self.path} is {node.get('drv')}: only raw ones are resized", Kind.UNSUPPORTED)
        if not await asyncio.to_thread(_same, node.get("file", ""), self.path):
            raise ImageError(
                f"QEMU's disk {node.get('node-name')} is in {node.get('file')}, not in {self.path}", Kind.PRECONDITION
            )


def _without_path(qdev: str) -> str:
    """`/machine/peripheral/disk0/virtio-backend` is the device `disk0`."""
    parts = qdev.split("/")
    return parts[3] if len(parts) > 3 and parts[1:3] == ["machine", "peripheral"] else qdev


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
