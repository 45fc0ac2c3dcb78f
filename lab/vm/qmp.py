"""QEMU's own control socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

CALL_S = 60.0


class Qmp:
    """One connection: a command at a time; the names of events are kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._one = asyncio.Lock()
        self.events: list[str] = []
        """What had happened by the end of the last command."""

    @classmethod
    async def connect(cls, path: str) -> Qmp:
        """Connect to a QEMU that listens already."""
        qmp = cls(*await asyncio.open_unix_connection(path, limit=1 << 22))
        await qmp._reader.readline()
        await qmp("qmp_capabilities")
        return qmp

    async def __call__(self, command: str, **arguments: object) -> Any:
        """The command's answer. Raises AssertionError with QEMU's words."""
        return await self.ask(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def ask(self, command: str, named: dict[str, object]) -> Any:
        """The same for a command whose arguments have names of another kind."""
        async with self._one, asyncio.timeout(CALL_S):
            self._writer.write(json.dumps({"execute": command, "arguments": named}).encode())
            await self._writer.drain()
            while True:
                line = await self._reader.readline()
                if not line:
                    raise ConnectionError(f"QEMU ended during {command}")
                answer = json.loads(line)
                if "event" in answer:
                    self.events.append(answer["event"])
                if "error" in answer:
                    raise AssertionError(f"{command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]

    def close(self) -> None:
        """Let go of the connection."""
        self._writer.close()
