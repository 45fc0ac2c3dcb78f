"""Programs that exist in memory alone: `true`, `false`, `sleep` and a container guest's services."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal

from storaged.guest.processes import Child, Launch, Outcome, Status

SERVICES = {"lxcfs", "tremplin", "ndproxyd", "mcastd"}
"""What a container guest runs, for ever."""


class SimSpawner:
    """Starts nothing on this machine."""

    def __init__(self) -> None:
        self._pids = itertools.count(1000)
        self._children: dict[int, Child] = {}
        self.started: list[Launch] = []
        """Every start, in order."""

    async def start(self, launch: Launch) -> Child:
        await asyncio.sleep(0)
        lasts = self._seconds(launch)
        child = Child(next(self._pids), asyncio.get_running_loop().create_future())
        self.started.append(launch)
        self._children[child.pid] = child
        code = 1 if launch.name == "false" else 0
        timer = asyncio.get_running_loop().call_later(lasts, self._end, child.pid, Outcome(Status.EXITED, code))
        child.ended.add_done_callback(lambda _: timer.cancel())
        return child

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """As kill(2). Raises ProcessLookupError."""
        if pid not in self._children:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        self._end(pid, Outcome(Status.SIGNALED, number))

    def close(self) -> None:
        self._children.clear()

    def _end(self, pid: int, outcome: Outcome) -> None:
        child = self._children.pop(pid, None)
        if child is not None and not child.ended.done():
            child.ended.set_result(outcome)

    @staticmethod
    def _seconds(launch: Launch) -> float:
        match launch.name, launch.argv[1:]:
            case (("true" | "false"), _):
                return 0.0
            case "sleep", (seconds,):
                return float(seconds)
            case _ if launch.name in SERVICES:
                return 1e9
            case _:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), launch.name)
