"""One watch of the host, whatever the number of pages: keeps what is true, tells each page what has changed.

A page gets everything at first, and then only what differs. One that does not keep up misses nothing: what waits for
it is a set of names, and it is told what is true of them when it comes to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from storaged.errors import StoragedError
from storaged.host.console import view
from storaged.host.console.backend import Backend
from storaged.host.console.view import Json
from storaged.rpc.proto import storaged_host_v1_pb2 as pb

log = logging.getLogger(__name__)

INTERVAL_S = 0.5
AGAIN_FIRST_S, AGAIN_MOST_S = 0.5, 5.0
HISTORY_EVERY_S = 1.0
HISTORY_MOST = 900
BEAT_S = 5.0
"""A page that hears nothing for a few of these knows that the line is dead, not that nothing happens."""


@dataclass(slots=True, eq=False)
class _Page:
    """Whom to tell. `guests`: the names of those it does not know yet as they are now."""

    guests: set[str] = field(default_factory=set)
    whole: bool = True
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Hub:
    """What the host last said, from `run` until that is cancelled."""

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.time) -> None:
        self._backend = backend
        self._clock = clock
        self._pages: set[_Page] = set()
        self._guests: dict[str, Json] = {}
        self._pools: list[Json] = []
        self._resizes: list[Json] = []
        self._history: dict[str, deque[list[float | str]]] = {}
        self._said: Json = {"time": None, "version": "", "lost": "nothing has been heard of storaged-host yet"}
        self._closed = False

    @property
    def lost(self) -> str:
        """Why what is known is old; empty when it is not."""
        return str(self._said["lost"])

    def state(self) -> Json:
        """Everything."""
        history = {name: list(points) for name, points in self._history.items()}
        return self._frame() | {"whole": True, "guests": list(self._guests.values()), "history": history}

    async def run(self) -> None:
        """Watch for ever; when the host goes away, say so and look for it."""
        wait_s = AGAIN_FIRST_S
        try:
            while True:
                try:
                    async for report in self._backend.watch(INTERVAL_S):
                        wait_s = AGAIN_FIRST_S
                        self.saw(report)
                except StoragedError as error:
                    self._lose(error.message)
                except Exception as error:  # whatever it is, a page that says nothing would be worse
                    log.exception("watching failed")
                    self._lose(f"watching storaged-host failed: {type(error).__name__}")
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, AGAIN_MOST_S)
        finally:
            self._closed = True
            self._tell()

    def saw(self, report: pb.Report) -> None:
        """A report has come."""
        now = view.seconds(report.time)
        guests = {
            guest.name: view.carried(view.guest(guest, now), self._guests.get(guest.name)) for guest in report.guests
        }
        names = self._guests.keys() | guests.keys()
        changed = {name for name in names if self._guests.get(name) != guests.get(name)}
        self._guests = guests
        self._pools = [view.pool(pool, now) for pool in report.pools]
        self._resizes = [view.resize(resize) for resize in report.resizes]
        for pool in report.pools:
            self._remember(pool, now)
        self._said = {"time": now, "version": report.version, "lost": ""}
        self._tell(changed)

    def _remember(self, pool: pb.Pool, now: float) -> None:
        if pool.history:
            self._history[pool.name] = deque((view.point(each) for each in pool.history), HISTORY_MOST)
        history = self._history.setdefault(pool.name, deque(maxlen=HISTORY_MOST))
        point = view.present(pool, now)
        if point is None or (history and now - float(history[-1][0]) < HISTORY_EVERY_S):
            return
        if len(history) == HISTORY_MOST:  # the older half at half the grain: an hour fits beside the last minutes
            old = list(history)
            half = len(old) // 2
            history = self._history[pool.name] = deque(old[:half:2] + old[half:], HISTORY_MOST)
        history.append(point)

    def _lose(self, why: str) -> None:
        if why != self._said["lost"]:
            log.warning("console: %s", why)
        self._said = self._said | {"lost": why}
        self._tell()

    def _tell(self, changed: set[str] | None = None) -> None:
        for page in self._pages:
            page.guests |= changed or set()
            page.news.set()

    def _frame(self) -> Json:
        return self._said | {"sent": self._clock(), "pools": self._pools, "resizes": self._resizes}

    async def events(self) -> AsyncIterator[str]:
        """What one page is told, as server-sent events."""
        page = _Page()
        self._pages.add(page)
        try:
            page.news.set()
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_S):
                        await page.news.wait()
                if self._closed:
                    return
                yield _event(self._news(page))
                await asyncio.sleep(INTERVAL_S / 2)
        finally:
            self._pages.discard(page)

    def _news(self, page: _Page) -> Json:
        if page.whole:
            page.whole = False
            news = self.state()
        elif page.news.is_set():
            known = [self._guests[name] for name in sorted(page.guests) if name in self._guests]
            gone = sorted(page.guests - self._guests.keys())
            news = self._frame() | {"whole": False, "guests": known, "gone": gone}
        else:
            news = {"beat": True, "sent": self._clock()}
        page.news.clear()
        page.guests.clear()
        return news


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
