"""A whole service on the simulation, served over a unix socket as a host finds it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
import pytest

from storaged import runtime
from storaged.addresses import Address, UnixAddress
from storaged.config import LimitsConfig, VsockConfig
from storaged.core.model import Config
from storaged.core.ports import Clock, JournalStore, World
from storaged.guest.containers import Containers
from storaged.guest.mounts import Mounts
from storaged.guest.processes import Processes
from storaged.guest.termina import Termina
from storaged.guest.users import Users
from storaged.rpc.proto import common_pb2, storaged_v1_pb2, storaged_v1_pb2_grpc, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.rpc.server import Server
from storaged.runtime import StorageService
from storaged.sim import SimDisk, SimSysctl, make_world
from storaged.sim.power import SimPower
from storaged.units import GIB

EMPTY = common_pb2.EmptyMessage()
QUICK = Config(
    settle_s=0.2, retry_first_s=0.05, retry_most_s=0.2, guard_every_s=0.2, capacity_wait_s=0.4, capacity_poll_s=0.05
)
Answer = TypeVar("Answer")


class RealTime(Clock):
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class Guest:
    """One simulated guest: its disk, its service, and a host's stubs for it."""

    def __init__(self, directory: Path, size: int = 8 * GIB, device: int | None = None, config: Config = QUICK) -> None:
        self.disk = SimDisk(size, device)
        self.power: SimPower | None = SimPower()
        self.limits = LimitsConfig()
        self.vsock = VsockConfig()
        self.addresses: list[Address] = []
        self.config = config
        self.path = str(directory / "s")
        self.sysctl = SimSysctl(faults=self.disk.faults)
        self.world: World = make_world(self.disk, clock=RealTime(), sysctl=self.sysctl)
        self.processes: Processes | None = None
        self.mounts: Mounts | None = None
        self.termina: Termina | None = None
        self.containers: Containers | None = None
        self.users: Users | None = None
        self.service: StorageService
        self.server: Server
        self.bound: list[Address] = []
        self._channel: grpc.aio.Channel

    @property
    def journal(self) -> JournalStore:
        """What a crash leaves."""
        return self.world.journal

    async def start(self) -> None:
        """Start it, or start it again after `stop`."""
        self.world = make_world(self.disk, clock=RealTime(), sysctl=self.sysctl, journal=self.journal)
        self.service = StorageService(self.world, self.config)
        await self.service.start()
        self.server = Server(
            self.service,
            processes=self.processes,
            mounts=self.mounts,
            termina=self.termina,
            containers=self.containers,
            users=self.users,
            power=self.power,
            limits=self.limits,
            vsock=self.vsock,
        )
        self.bound = await self.server.start([UnixAddress(self.path), *self.addresses])
        self._channel = grpc.aio.insecure_channel(f"unix:{self.path}")
        self.maitred: vm_guest_pb2_grpc.MaitredAsyncStub = vm_guest_pb2_grpc.MaitredStub(self._channel)
        self.storage: storaged_v1_pb2_grpc.StorageAsyncStub = storaged_v1_pb2_grpc.StorageStub(self._channel)

    async def stop(self) -> None:
        """Stop it as SIGTERM does."""
        await self._channel.close()
        await self.server.stop(0.1)
        await self.service.stop()

    @property
    def channel(self) -> grpc.aio.Channel:
        """For other services' stubs."""
        return self._channel

    async def report_free(self, free: int, state: int = vm_guest_pb2.DISK_NORMAL) -> int:
        """UpdateStorageBalloon; its result."""
        request = vm_guest_pb2.UpdateStorageBalloonRequest(state=state, free_space_bytes=free)  # type: ignore[arg-type]
        answer: vm_guest_pb2.UpdateStorageBalloonResponse = await self.maitred.UpdateStorageBalloon(request)
        return answer.result

    async def resize(self, size: int) -> int:
        """ResizeFilesystem; its status."""
        answer = await self.maitred.ResizeFilesystem(vm_guest_pb2.ResizeFilesystemRequest(size=size))
        return answer.status

    async def status(self) -> vm_guest_pb2.GetResizeStatusResponse:
        """GetResizeStatus."""
        return await self.maitred.GetResizeStatus(EMPTY)

    async def report(self) -> storaged_v1_pb2.Report:
        """GetReport."""
        return await self.storage.GetReport(storaged_v1_pb2.GetReportRequest())

    async def ended(self) -> storaged_v1_pb2.Job:
        """Poll as a host does until no resize is in progress; the job."""
        await until(self.idle)
        return (await self.report()).job

    async def idle(self) -> bool:
        """True when no resize is in progress."""
        return not (await self.status()).resize_in_progress


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = 5.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110  # a host polls too
            await asyncio.sleep(0.005)


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    """The status and the message of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


@pytest.fixture
async def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guest]:
    """A guest of 8 GiB on a device of 16 GiB."""
    monkeypatch.setattr(runtime, "ANSWER_WITHIN_S", 3.0)
    one = Guest(tmp_path, device=16 * GIB)
    await one.start()
    try:
        yield one
    finally:
        one.disk.faults.clear()
        await one.stop()
