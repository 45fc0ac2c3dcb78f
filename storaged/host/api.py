"""`storaged.host.v1.Host`: what the host knows, and its resizes, for the command line and the console."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import grpc.aio

from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.host import encode
from storaged.host.cancelling import meant
from storaged.host.controller import Controller
from storaged.host.history import History, Point
from storaged.host.links import ConsoleLinks, console_link
from storaged.host.model import State, books
from storaged.host.promises import Promises
from storaged.host.watch import capacity, logical
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc

Context = Any
LEAST_INTERVAL_S, MOST_INTERVAL_S = 0.2, 3600.0
WATCHERS_MOST = 64
"""So that watching leaves calls over for everything else (`listener` has 256)."""
BEAT_S = 1.0
"""Numbers that move all the time (free space, rates, ages) are told this often though nothing has happened."""


class HostApi(storaged_host_v1_pb2_grpc.HostServicer):
    """Serves all pools of one host. `run` keeps the history."""

    def __init__(self, controllers: Sequence[Controller]) -> None:
        self._controllers = controllers
        self._histories = {controller.pool.name: History() for controller in controllers}
        self._totals: dict[str, int] = {}
        self._logical: dict[str, int] = {}
        self._promises = Promises(controllers, self._logical_of)
        self.console: ConsoleLinks | None = None
        self._looked = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._sequence = 0
        self._watchers: set[asyncio.Event] = set()
        for controller in controllers:
            controller.observe(partial(self._seen, controller))

    def add_to(self, server: grpc.aio.Server) -> None:
        """Have `server` serve it."""
        storaged_host_v1_pb2_grpc.add_HostServicer_to_server(self, server)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if self._asking is None or self._asking.done():
                # Its own task: a pool that hangs holds up nothing but these numbers.
                self._asking = asyncio.create_task(self._ask())
            for controller in self._controllers:
                self._seen(controller, controller.state)
            await asyncio.sleep(BEAT_S)

    # --- methods

    async def ListGuests(  # noqa: N802  # named as in the contract
        self,
        request: pb.ListGuestsRequest,
        context: Context,  # noqa: ARG002  # as all methods
    ) -> pb.ListGuestsResponse:
        wanted = [self._controller(request.pool)] if request.pool else self._controllers
        return pb.ListGuestsResponse(guests=self._guests(wanted))

    async def GetPool(  # noqa: N802  # as above
        self,
        request: pb.GetPoolRequest,
        context: Context,  # noqa: ARG002  # as above
    ) -> pb.Pool:
        return self._pool(self._controller(request.name))

    async def Resize(  # noqa: N802  # as above
        self,
        request: pb.ResizeRequest,
        context: Context,  # noqa: ARG002  # as above
    ) -> pb.ResizeResponse:
        controller, guest, size = self._of(request.guest), request.guest, request.size_bytes
        async with self._promises.growth(controller, guest, size, allowed=request.allow_overcommit):
            saga = await controller.resize(guest, size)
        return pb.ResizeResponse(resize=encode.resize(saga))

    async def CancelResize(  # noqa: N802  # as above
        self,
        request: pb.CancelResizeRequest,
        context: Context,  # noqa: ARG002  # as above
    ) -> pb.CancelResizeResponse:
        if not request.id and not request.guest:
            raise InvalidRequest("id and guest are empty: one of them is needed")
        saga = meant((saga for each in self._controllers for saga in each.resizes), request.id, request.guest)
        controller = next(each for each in self._controllers if any(one.id == saga.id for one in each.resizes))
        return pb.CancelResizeResponse(resize=encode.resize(await controller.cancel_resize(saga.id, saga.guest)))

    async def GetConsoleLink(  # noqa: N802  # as above
        self,
        request: pb.GetConsoleLinkRequest,  # noqa: ARG002  # it is empty
        context: Context,  # noqa: ARG002  # as above
    ) -> pb.GetConsoleLinkResponse:
        return console_link(self.console)

    async def LiftFence(  # noqa: N802  # as above
        self,
        request: pb.LiftFenceRequest,
        context: Context,  # noqa: ARG002  # as above
    ) -> pb.LiftFenceResponse:
        controller = self._of(request.guest)
        controller.lift_fence(request.guest)
        guest = next(guest for guest in self._guests([controller]) if guest.name == request.guest)
        return pb.LiftFenceResponse(guest=guest)

    async def Watch(  # noqa: N802  # as above
        self,
        request: pb.WatchRequest,
        context: Context,  # noqa: ARG002  # as above
    ) -> AsyncIterator[pb.Report]:
        interval = request.min_interval_s
        if not (math.isfinite(interval) and 0 <= interval <= MOST_INTERVAL_S):
            raise InvalidRequest(f"min_interval_s {interval} is not between 0 and {MOST_INTERVAL_S:g}")
        if len(self._watchers) >= WATCHERS_MOST:
            raise StoragedError(f"{WATCHERS_MOST} are watching already, the most that are served", Kind.BUSY)
        news = asyncio.Event()
        self._watchers.add(news)
        history = True
        try:
            while True:
                news.clear()
                yield self._report(history=history)
                history = not request.history_once
                await asyncio.sleep(max(interval, LEAST_INTERVAL_S))
                await news.wait()
        finally:
            self._watchers.discard(news)

    # --- what they are made of

    def _seen(self, controller: Controller, state: State) -> None:
        if state.pool.at is not None and not controller.unread:
            self._histories[controller.pool.name].add(_point(state))
        for news in self._watchers:
            news.set()

    def _logical_of(self, image: str) -> int:
        return self._logical.get(image, 0)

    def _controller(self, name: str) -> Controller:
        if not name and len(self._controllers) > 1:
            known = ", ".join(controller.pool.name for controller in self._controllers)
            raise InvalidRequest(f"name is empty, and there are several pools: {known}")
        for controller in self._controllers:
            if name in {"", controller.pool.name}:
                return controller
        known = ", ".join(controller.pool.name for controller in self._controllers)
        raise StoragedError(f"no pool is called {name!r}; known: {known}", Kind.NOT_FOUND)

    def _of(self, guest: str) -> Controller:
        for controller in self._controllers:
            if guest in controller.members:
                return controller
        raise StoragedError(f"no guest is called {guest!r}", Kind.NOT_FOUND)

    def _pool(self, controller: Controller, *, history: bool = True) -> pb.Pool:
        name = controller.pool.name
        points = self._histories[name].points() if history else []
        found = encode.pool(controller, self._totals.get(name), points)
        sizes = self._promises.sizes(controller)
        found.sizes_bytes = sizes.promised
        if sizes.total:
            found.sizes_limit_bytes = sizes.most
        return found

    def _report(self, *, history: bool) -> pb.Report:
        self._sequence += 1
        resizes = [saga for controller in self._controllers for saga in controller.resizes]
        resizes.sort(key=lambda saga: (not saga.active, -(saga.ended or saga.started)))
        return pb.Report(
            sequence=self._sequence,
            time=encode.timestamp(time.time()),
            version=encode.VERSION,
            pools=[self._pool(controller, history=history) for controller in self._controllers],
            guests=self._guests(self._controllers),
            resizes=[encode.resize(saga) for saga in resizes],
        )

    def _guests(self, controllers: Sequence[Controller]) -> list[pb.Guest]:
        now = time.monotonic()
        found = []
        for controller in controllers:
            ended = controller.ended_resizes
            for name, member in controller.members.items():
                guest = encode.guest(member, controller, now, self._logical.get(member.config.image))
                if name in ended:
                    saga, at = ended[name]
                    reported = member.client.reported_at if member.client is not None else None
                    encode.resized(
                        guest, saga, newer_than_look=self._looked < at, newer_than_report=(reported or 0.0) < at
                    )
                found.append(guest)
        return sorted(found, key=lambda guest: guest.name)

    async def _ask(self) -> None:
        """What only the disk knows."""
        pools = {controller.pool.name: controller.pool.path for controller in self._controllers}
        images = {member.config.image for controller in self._controllers for member in controller.members.values()}
        begun = time.monotonic()
        totals, self._logical = await asyncio.to_thread(_look, pools, images)
        await self._promises.look()
        self._looked = begun
        self._totals |= totals


def _look(pools: Mapping[str, str], images: Collection[str]) -> tuple[dict[str, int], dict[str, int]]:
    totals = {}
    for name, path in pools.items():
        with contextlib.suppress(OSError):
            totals[name] = capacity(path)
    return totals, {image: logical(image) for image in images}


def _point(state: State) -> Point:
    account = books(state)
    return Point(time.time(), account.free, account.reserve, account.set_aside, state.pool.pressure.level)
