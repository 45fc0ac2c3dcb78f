"""`vm_tools.Maitred`: decode, call, encode. What a method means is in the storage engine."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from storaged.core.model import Told
from storaged.errors import InvalidRequest, Unsupported
from storaged.guest.clock import Clock
from storaged.guest.containers import Containers
from storaged.guest.mounts import Mounts
from storaged.guest.network import Network
from storaged.guest.processes import Processes
from storaged.guest.resolv import Resolv
from storaged.guest.termina import Termina
from storaged.guest.users import Users
from storaged.rpc import decode_containers, decode_mounts, decode_processes
from storaged.rpc.bound import Bound, as_metadata
from storaged.rpc.decode_network import ipv4_config
from storaged.rpc.power import PowerControl
from storaged.rpc.proto import common_pb2, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.runtime import StorageService

Context = Any
Part = TypeVar("Part")
EMPTY = common_pb2.EmptyMessage()


def _there(part: Part | None) -> Part:
    """The guest module that a call needs. Raises Unsupported when this daemon was made without it."""
    if part is None:
        raise Unsupported("this daemon does not serve this method")
    return part


class Maitred(vm_guest_pb2_grpc.MaitredServicer):
    """The storage half of the contract and the guest modules that are given; every other method is UNIMPLEMENTED."""

    def __init__(
        self,
        storage: StorageService,
        *,
        network: Network | None = None,
        resolv: Resolv | None = None,
        clock: Clock | None = None,
        processes: Processes | None = None,
        mounts: Mounts | None = None,
        termina: Termina | None = None,
        containers: Containers | None = None,
        users: Users | None = None,
        power: PowerControl | None = None,
    ) -> None:
        self._storage = storage
        self._network = network
        self._resolv = resolv
        self._clock = clock
        self._processes = processes
        self._mounts = mounts
        self._termina = termina
        self._containers = containers
        self._users = users
        self._power = power

    async def UpdateStorageBalloon(
        self, request: vm_guest_pb2.UpdateStorageBalloonRequest, context: Context
    ) -> vm_guest_pb2.UpdateStorageBalloonResponse:
        try:
            told = Told(request.state)
        except ValueError:
            raise InvalidRequest(f"state {request.state} is none of DISK_NONE 0 to DISK_CRITICAL 3") from None
        reason = await self._storage.report(told, request.free_space_bytes)
        if (now := await self._storage.measured()) is not None:
            # Beside the answer, which has no field for it: a host that shares its disk must know.
            told_beside = as_metadata(Bound(now.reach, now.potential, now.sequence, reason))
            context.set_trailing_metadata((*(context.trailing_metadata() or ()), *told_beside))
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
            target_size=job.target if job is not None else current,
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

    # --- network, resolver and clock ---

    async def ConfigureNetwork(
        self, request: vm_guest_pb2.NetworkConfigRequest, context: Context
    ) -> common_pb2.EmptyMessage:
        await _there(self._network).configure(*ipv4_config(request))
        return EMPTY

    async def OnHostNetworkChanged(self, request: common_pb2.EmptyMessage, context: Context) -> common_pb2.EmptyMessage:
        await _there(self._network).host_changed()
        return EMPTY

    async def ResetIPv6(self, request: common_pb2.EmptyMessage, context: Context) -> common_pb2.EmptyMessage:
        await _there(self._network).host_changed()
        return EMPTY

    async def SetResolvConfig(
        self, request: vm_guest_pb2.SetResolvConfigRequest, context: Context
    ) -> common_pb2.EmptyMessage:
        config = request.resolv_config
        await _there(self._resolv).set(config.nameservers, config.search_domains)
        return EMPTY

    async def SetTime(self, request: vm_guest_pb2.SetTimeRequest, context: Context) -> common_pb2.EmptyMessage:
        await _there(self._clock).set_time(request.time.seconds, request.time.nanos)
        return EMPTY

    async def SetTimezone(self, request: vm_guest_pb2.SetTimezoneRequest, context: Context) -> common_pb2.EmptyMessage:
        await _there(self._clock).set_zone(request.timezone_name, bind=request.use_bind_mount)
        return EMPTY

    # --- processes, mounts, containers and users ---

    async def LaunchProcess(
        self, request: vm_guest_pb2.LaunchProcessRequest, context: Context
    ) -> vm_guest_pb2.LaunchProcessResponse:
        processes = _there(self._processes)
        return decode_processes.launched(await processes.launch(decode_processes.launch(request)))

    async def Mount(self, request: vm_guest_pb2.MountRequest, context: Context) -> vm_guest_pb2.MountResponse:
        error = await _there(self._mounts).mount(decode_mounts.mount(request))
        if not error:
            await self._storage.look()
        return vm_guest_pb2.MountResponse(error=error)

    async def Mount9P(self, request: vm_guest_pb2.Mount9PRequest, context: Context) -> vm_guest_pb2.MountResponse:
        await _there(self._mounts).mount_9p(decode_mounts.mount_9p(request))
        return vm_guest_pb2.MountResponse()

    async def StartTermina(
        self, request: vm_guest_pb2.StartTerminaRequest, context: Context
    ) -> vm_guest_pb2.StartTerminaResponse:
        result = await _there(self._termina).start(decode_containers.termina(request))
        await self._storage.look()
        return decode_containers.started(result)

    async def ConfigureContainerGuest(
        self, request: vm_guest_pb2.ConfigureContainerGuestRequest, context: Context
    ) -> common_pb2.EmptyMessage:
        await _there(self._containers).configure(request.container_token, request.vm_username)
        return EMPTY

    async def SetUpUser(
        self, request: vm_guest_pb2.SetUpUserRequest, context: Context
    ) -> vm_guest_pb2.SetUpUserResponse:
        reason = await _there(self._users).set_up(decode_containers.user(request))
        return decode_containers.user_set_up(request.username, reason)

    # --- power ---

    async def Shutdown(self, request: common_pb2.EmptyMessage, context: Context) -> common_pb2.EmptyMessage:
        await _there(self._power).shut_down(context.add_done_callback)
        return EMPTY

    async def PrepareToSuspend(self, request: common_pb2.EmptyMessage, context: Context) -> common_pb2.EmptyMessage:
        await _there(self._power).suspend()
        return EMPTY
