"""A guest pleads for room over `storaged.v1`, and its host gives some: from the guest's engine to its next grant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio

from lab.agent import Agent, agent
from storaged.addresses import UnixAddress
from storaged.host import guests
from storaged.host.config import GuestConfig, PoolConfig
from storaged.host.controller import Controller
from storaged.host.guests import GuestClient
from storaged.host.watch import Watcher
from storaged.rpc.proto import storaged_v1_pb2, storaged_v1_pb2_grpc, vm_guest_pb2_grpc
from storaged.units import GIB, MIB
from tests.host.test_controller import FAST, Source, until
from tests.rpc.conftest import Guest


class Pleading(storaged_v1_pb2_grpc.StorageServicer):
    """As a storaged that cries for room all the time, from when it is told to."""

    def __init__(self) -> None:
        self.cries = asyncio.Event()
        self.count = 0

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[storaged_v1_pb2.Report]:  # noqa: N802
        yield storaged_v1_pb2.Report()
        await asyncio.Event().wait()

    async def AskRoom(self, request: Any, context: Any) -> AsyncIterator[storaged_v1_pb2.RoomAsked]:  # noqa: N802
        await self.cries.wait()
        while True:
            self.count += 1
            yield storaged_v1_pb2.RoomAsked(size_bytes=(1 << 64) - 1)
            await asyncio.sleep(0.01)


async def _serve(inside: Agent, pleading: Pleading, path: Path) -> grpc.aio.Server:
    server = grpc.aio.server()
    vm_guest_pb2_grpc.add_MaitredServicer_to_server(inside, server)
    storaged_v1_pb2_grpc.add_StorageServicer_to_server(pleading, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server


async def test_who_pleads_gets_what_others_do_not_use_and_no_more(tmp_path: Path) -> None:
    agents = {name: agent() for name in ("a", "b")}
    pleas = {name: Pleading() for name in agents}  # type: ignore[abstract]
    servers = [await _serve(agents[name], pleas[name], tmp_path / f"{name}.sock") for name in agents]
    configs = []
    for name in agents:
        with (tmp_path / f"{name}.img").open("wb") as file:
            file.truncate(100 * GIB)
        configs.append(
            GuestConfig(name, UnixAddress(str(tmp_path / f"{name}.sock")), str(tmp_path / f"{name}.img"), "p")
        )
    source = Source(5 * GIB)
    controller = Controller(
        PoolConfig("p", str(tmp_path)), configs, FAST, Watcher(source),
        lambda guest: GuestClient(guest.name, guest.address, trusted=True),
    )  # fmt: skip
    task = asyncio.create_task(controller.run())
    try:
        await until(
            lambda: all(each.lease.bound for each in controller.state.guests.values()) and bool(controller.state.guests)
        )
        await until(lambda: all(each.allowed for each in agents.values()))
        await asyncio.sleep(0.5)
        before = {name: each.allowed or 0 for name, each in agents.items()}
        told = len(agents["a"].told)
        pleas["a"].cries.set()
        await until(lambda: (agents["a"].allowed or 0) > before["a"] + 256 * MIB, lambda: (before, controller.state))
        assert (agents["b"].allowed or 0) < before["b"]
        await asyncio.sleep(2)
        assert pleas["a"].count > 50
        assert len(agents["a"].told) - told < 8, "a cry for room costs its host no call each"
        assert sum(each.allowed or 0 for each in agents.values()) <= 4 * GIB
        assert (agents["b"].allowed or 0) > 0
    finally:
        task.cancel()
        await asyncio.gather(task, *(server.stop(0) for server in servers), return_exceptions=True)


async def test_a_storaged_whose_applications_write_fast_pleads(tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    await guest.start()
    client = GuestClient("g", UnixAddress(guest.path))
    asked: list[tuple[float, int]] = []
    watch = asyncio.create_task(
        client.watch(lambda: None, lambda: None, lambda size: asked.append((time.monotonic(), size)), lambda *_: None)
    )
    try:
        await guest.report_free(GIB + 400 * MIB)
        assert guest.world.balloon.size() > 2 * GIB
        await until(lambda: client.report is not None)
        await asyncio.sleep(1.5)
        assert not asked, "nothing is written"
        begun = time.monotonic()
        while not asked and time.monotonic() < begun + 8:
            guest.disk.write(8 * MIB)
            await asyncio.sleep(0.1)
        assert asked
        assert (await client.fresh_report()).filesystem.available_bytes > 0, "while there is something left"  # type: ignore[union-attr]
        assert 64 * MIB <= asked[0][1] <= guest.world.balloon.size()
        count = len(asked)
        await asyncio.sleep(2.5)
        assert len(asked) <= count + 1, "it stands still again"
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await client.close()
        await guest.stop()


async def test_an_older_storaged_without_pleas_is_watched_all_the_same(tmp_path: Path) -> None:
    class Older(storaged_v1_pb2_grpc.StorageServicer):
        Watch = Pleading.Watch

    server = grpc.aio.server()
    vm_guest_pb2_grpc.add_MaitredServicer_to_server(agent(), server)
    storaged_v1_pb2_grpc.add_StorageServicer_to_server(Older(), server)  # type: ignore[abstract]
    server.add_insecure_port(f"unix:{tmp_path}/g.sock")
    await server.start()
    client = GuestClient("g", UnixAddress(f"{tmp_path}/g.sock"))
    watch = asyncio.create_task(client.watch(lambda: None, lambda: None, lambda _: None, lambda *_: None))
    await until(lambda: client.report is not None)
    await asyncio.sleep(guests.AGAIN_FIRST_S + 0.5)
    assert client.report is not None
    assert not watch.done()
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    await client.close()
    await server.stop(0)
