"""`vm_tools.Maitred`: decode, call, encode. What a method means is in the storage engine."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from storaged.core.model import Told
from storaged.errors import InvalidRequest, Unsupported
from storaged.rpc.power import PowerControl
from storaged.rpc.proto import common_pb2, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.runtime import StorageService

Context = Any
Module = TypeVar("Module")


class Maitred(vm_guest_pb2_grpc.MaitredServicer):
    """The storage half of the contract, and power; every other method answers UNIMPLEMENTED."""

    def __init__(self, storage: StorageService, *, power: PowerControl | None = None) -> None:
        self._storage = storage
        self._power = power

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
        await _there(self._power).shut_down(context.add_done_callback)
        return common_pb2.EmptyMessage()

    async def PrepareToSuspend(self, request: common_pb2.EmptyMessage, context: Context) -> common_pb2.EmptyMessage:
        await _there(self._power).suspend()
        return common_pb2.EmptyMessage()


def _there(module: Module | None) -> Module:
    """A part that this daemon was given; UNIMPLEMENTED without it."""
    if module is None:
        raise Unsupported("this daemon does not serve this method")
    return module
