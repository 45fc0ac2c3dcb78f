"""`vm_tools.Maitred`: decode, call, encode. What a method means is in the storage engine."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from storaged.core.model import Told
from storaged.errors import InvalidRequest, StoragedError, Unsupported
from storaged.guest.power import Power
from storaged.rpc.proto import common_pb2, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.runtime import StorageService

log = logging.getLogger(__name__)
Context = Any


class Maitred(vm_guest_pb2_grpc.MaitredServicer):
    """The storage half of the contract, and power; every other method answers UNIMPLEMENTED."""

    def __init__(
        self,
        storage: StorageService,
        *,
        power: Power | None = None,
        refuse: Callable[[str], None] = lambda _: None,
        power_wanted: asyncio.Event | None = None,
    ) -> None:
        self._storage = storage
        self._power = power
        self._refuse = refuse
        self._power_wanted = power_wanted or asyncio.Event()

    async def UpdateStorageBalloon(
        self, request: vm_guest_pb2.UpdateStorageBalloonRequest, context: Context
    ) -> vm_guest_pb2.UpdateStorageBalloonResponse:
        try:
            told = Told(request.state)
        except ValueError:
            raise InvalidRequest(f"state {request.state} is none of DISK_NONE 0 to DISK_CRITICAL 3") from None
        reason = await self._storage.report(told, request.free_space_bytes)
        result = vm_guest_pb2.BALLOON_INFLATE_FAILED if reason else vm_guest_pb2.SUCCESS
        return vm_guest_pb2.UpdateStorageBalloonResponse(result=result)

    async def ResizeFilesystem(
        self, request: vm_guest_pb2.ResizeFilesystemRequest, context: Context
    ) -> vm_guest_pb2.ResizeFilesystemResponse:
        started = await self._storage.resize(request.size)
        status = vm_guest_pb2.ResizeFilesystemResponse
        return status(status=status.STARTED if started else status.ALREADY_IN_PROGRESS)

    async def GetResizeStatus(
        self, request: common_pb2.EmptyMessage, context: Context
    ) -> vm_guest_pb2.GetResizeStatusResponse:
        current = self._storage.current_size()
        job = self._storage.snapshot.state.job
        return vm_guest_pb2.GetResizeStatusResponse(
            resize_in_progress=job is not None and job.active,
            current_size=current,
            target_size=job.requested if job is not None else current,
        )

    async def GetResizeBounds(
        self, request: common_pb2.EmptyMessage, context: Context
    ) -> vm_guest_pb2.GetResizeBoundsResponse:
        return vm_guest_pb2.GetResizeBoundsResponse(minimum_size=(await self._storage.bounds()).minimum)

    async def GetAvailableSpace(
        self, request: common_pb2.EmptyMessage, context: Context
    ) -> vm_guest_pb2.GetAvailableSpaceResponse:
        return vm_guest_pb2.GetAvailableSpaceResponse(available_space=await self._storage.available())

    async def GetKernelVersion(
        self, request: common_pb2.EmptyMessage, context: Context
    ) -> vm_guest_pb2.GetKernelVersionResponse:
        kernel = os.uname()
        return vm_guest_pb2.GetKernelVersionResponse(kernel_release=kernel.release, kernel_version=kernel.version)

    async def Shutdown(self, request: common_pb2.EmptyMessage, context: Context) -> common_pb2.EmptyMessage:
        if self._power is None:
            raise Unsupported("this daemon was given no power to turn off")
        await asyncio.to_thread(self._power.check)  # first: a refusal must leave everything running
        self._refuse("the machine shuts down")
        await self._storage.close()  # a running resize ends at a committed step
        await self._durable()
        context.add_done_callback(lambda _: self._power_wanted.set())  # the answer goes before the power
        return common_pb2.EmptyMessage()

    async def PrepareToSuspend(self, request: common_pb2.EmptyMessage, context: Context) -> common_pb2.EmptyMessage:
        await self._durable()
        return common_pb2.EmptyMessage()

    async def _durable(self) -> None:
        """The journal and all data are on the disk, or the reason why not is logged: the machine sleeps anyway."""
        try:
            await self._storage.suspend()
        except StoragedError as error:
            log.warning("not everything could be made durable: %s", error.message)
        if self._power is not None:
            await asyncio.to_thread(self._power.sync)
