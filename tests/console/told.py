"""A host that says what a test tells it to, and a real console in front of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, Self

from storaged.addresses import TcpAddress
from storaged.errors import Kind, StoragedError
from storaged.host.console.limits import Limits
from storaged.host.console.server import Console
from storaged.host.console.settings import ConsoleSettings
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.units import GIB, MIB

WITHIN_S = 20.0


def guest(name: str = "web", **fields: Any) -> pb.Guest:
    """A plausible guest of 40 GiB that can be made as small as 12."""
    known: dict[str, Any] = {
        "pool": "vms",
        "state": pb.GUEST_UP,
        "logical_bytes": 40 * GIB,
        "allocated_bytes": 14 * GIB,
        "resizable": True,
        "filesystem_bytes": 40 * GIB,
        "balloon_bytes": 20 * GIB,
        "available_bytes": 10 * GIB,
        "minimum_bytes": 12 * GIB,
        "guaranteed_bytes": 24 * GIB,
        "report_age_s": 0.0,
    }
    return pb.Guest(name=name, **(known | fields))


def pool(**fields: Any) -> pb.Pool:
    """A plausible pool, with a history of which a part was LOW."""
    known: dict[str, Any] = {
        "name": "vms",
        "path": "/var/lib/vms",
        "total_bytes": 100 * GIB,
        "free_bytes": 30 * GIB,
        "reserve_bytes": 2 * GIB,
        "promised_bytes": 10 * GIB,
        "promise_holds": True,
        "level": pb.LEVEL_NORMAL,
        "age_s": 0.2,
        "guest_count": 1,
    }
    found = pb.Pool(**(known | fields))
    if not found.history:
        now = time.time()
        for age in range(60, 0, -1):
            low = 20 < age < 40
            point = found.history.add(
                free_bytes=2 * GIB if low else 30 * GIB,
                reserve_bytes=2 * GIB,
                level=pb.LEVEL_LOW if low else pb.LEVEL_NORMAL,
            )
            point.time.FromNanoseconds(int((now - age) * 1e9))
    return found


def running(name: str = "web", **fields: Any) -> pb.Resize:
    """A shrink under way."""
    known: dict[str, Any] = {
        "id": f"r-{name}",
        "from_bytes": 40 * GIB,
        "to_bytes": 20 * GIB,
        "state": pb.RESIZE_RUNNING,
        "stage": pb.STAGE_FILESYSTEM,
        "progress": 0.25,
        "rate_bytes_per_s": 200 * MIB,
        "eta_s": 75.0,
    }
    return pb.Resize(guest=name, **(known | fields))


class ToldHost:
    """The backend. `calls` is what was asked of it; `refuses` what it answers; `down` why it cannot be watched."""

    def __init__(self) -> None:
        self.pools = [pool()]
        self.guests = [guest()]
        self.resizes: list[pb.Resize] = []
        self.calls: list[tuple[str, str, int | str]] = []
        self.refuses: StoragedError | None = None
        self.down = ""

    def report(self) -> pb.Report:
        report = pb.Report(version="1.2.3", pools=self.pools, guests=self.guests, resizes=self.resizes)
        report.time.GetCurrentTime()
        return report

    async def watch(self, interval_s: float) -> AsyncIterator[pb.Report]:
        while not self.down:
            yield self.report()
            await asyncio.sleep(min(interval_s, 0.1))
        raise StoragedError(self.down, Kind.UNAVAILABLE)

    async def resize(self, guest: str, size: int, *, allow_overcommit: bool = False) -> pb.Resize:
        self.calls.append(("overcommit" if allow_overcommit else "resize", guest, size))
        if self.refuses is not None:
            raise self.refuses
        self.resizes = [running(guest, to_bytes=size)]
        return self.resizes[0]

    async def cancel(self, guest: str, resize: str) -> pb.Resize:
        self.calls.append(("cancel", guest, resize))
        if self.refuses is not None:
            raise self.refuses
        to = self.resizes[0].to_bytes if self.resizes else 20 * GIB
        self.resizes = [
            running(
                guest,
                to_bytes=to,
                state=pb.RESIZE_CANCELLED,
                stage=pb.STAGE_ENDED,
                filesystem_bytes=40 * GIB,
                progress=0.25,
            )
        ]
        return self.resizes[0]

    async def close(self) -> None:
        pass


class Served:
    """A console in a thread of its own. `port`: where, on 127.0.0.1. `cookie`: of one who has signed in by a link."""

    def __init__(self, host: ToldHost, settings: ConsoleSettings | None = None, limits: Limits | None = None) -> None:
        self.host = host
        self._settings = settings or ConsoleSettings("tcp:127.0.0.1:0")
        self.console = Console(self._settings, host, limits)
        self.console.bind()
        assert isinstance(self.console.address, TcpAddress)
        self.port = self.console.address.port
        self.url = self.console.url
        self.cookie = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self.console.run())
        self._ready.set()
        await asyncio.gather(self._task, return_exceptions=True)

    def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        """One request: status, headers, JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WITHIN_S)
        try:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            if self.cookie:
                sent.setdefault("cookie", self.cookie)
            data = None
            if body is not None:
                data = json.dumps(body)
                sent.setdefault("content-type", "application/json")
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            text = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            kind = found.get("content-type", "")
            return answer.status, found, json.loads(text) if kind == "application/json" else {"text": text.decode()}
        finally:
            connection.close()

    def sign_in(self) -> str:
        """Follow a link as a browser does; the cookie."""
        status, headers, _ = self.ask("GET", "/" + self.console.link().removeprefix(self.url))
        assert status == 303
        return headers["set-cookie"].partition(";")[0]

    def token(self) -> str:
        """What only our own page can read."""
        return str(self.ask("GET", "/api/session")[2]["token"])

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(WITHIN_S)
        until = time.monotonic() + WITHIN_S
        while True:
            try:
                self.ask("GET", "/api/session")
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.02)
            else:
                break
        if not self._settings.token_file:
            self.cookie = self.sign_in()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(WITHIN_S)
        assert not self._thread.is_alive()
