"""Requests for every method of Maitred, and a servicer over a guest that exists in memory alone."""

from __future__ import annotations

from typing import Any

from google.protobuf import message_factory
from google.protobuf.message import Message

from storaged.rpc.maitred import Maitred
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB

_SERVICE = vm.DESCRIPTOR.services_by_name["Maitred"]
METHODS = tuple(method.name for method in _SERVICE.methods if method.input_type.fields)
"""Those whose request has anything to say."""


def request_type(method: str) -> Any:
    """The class of its request."""
    return message_factory.GetMessageClass(_SERVICE.methods_by_name[method].input_type)


SEEDS: tuple[Message, ...] = (
    vm.NetworkConfigRequest(ipv4_config=vm.IPv4Config(address=0x1A5C7364, gateway=0x195C7364, netmask=0xFCFFFFFF)),
    vm.SetResolvConfigRequest(
        resolv_config=vm.ResolvConfig(nameservers=["192.0.2.1", "2001:db8::1"], search_domains=["example.org"])
    ),
    vm.LaunchProcessRequest(argv=["true"], env={"A": "b"}, wait_for_exit=True),
    vm.LaunchProcessRequest(argv=["sleep", "1"], respawn=True, use_console=True),
    vm.MountRequest(
        source="tmpfs", target="/mnt/x", fstype="tmpfs", mountflags=1, options="size=1m", create_target=True
    ),
    vm.Mount9PRequest(port=8889, target="/mnt/shared"),
    vm.StartTerminaRequest(stateful_device="/dev/vdb", allow_privileged_containers=True),
    vm.ConfigureContainerGuestRequest(container_token="1234", vm_username="chronos"),
    vm.SetUpUserRequest(username="chronos", uid=1000, group_names=["video"]),
    vm.SetTimezoneRequest(timezone_name="Europe/Berlin", use_bind_mount=True),
    vm.ResizeFilesystemRequest(size=4 * GIB),
    vm.UpdateStorageBalloonRequest(state=2, free_space_bytes=3 * GIB),  # type: ignore[arg-type]  # an enum's number
)
"""One or two that each method takes."""


async def servicer() -> Maitred:
    """Maitred as `storaged serve --sim` has it."""
    from storaged.app import sim_guest
    from storaged.btrfs.system import SystemClock
    from storaged.config import Settings
    from storaged.runtime import StorageService
    from storaged.sim import SimDisk, make_world

    storage = StorageService(make_world(SimDisk(8 * GIB), clock=SystemClock()))
    await storage.start()
    guest = sim_guest(Settings())
    return Maitred(
        storage,
        network=guest.network,
        resolv=guest.resolv,
        clock=guest.clock,
        processes=guest.processes,
        mounts=guest.mounts,
        termina=guest.termina,
        containers=guest.containers,
        users=guest.users,
    )
