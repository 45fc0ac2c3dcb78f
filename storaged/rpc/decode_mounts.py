"""From the mounts' messages to the guest module's values."""

from __future__ import annotations

from storaged.guest.mounts import Mount, Mount9P
from storaged.rpc.proto import vm_guest_pb2


def mount(request: vm_guest_pb2.MountRequest) -> Mount:
    """What to mount, not checked yet."""
    return Mount(
        source=request.source,
        target=request.target,
        fstype=request.fstype,
        flags=request.mountflags,
        options=request.options,
        create_target=request.create_target,
        permissions=request.permissions,
        mkfs_if_needed=request.mkfs_if_needed,
    )


def mount_9p(request: vm_guest_pb2.Mount9PRequest) -> Mount9P:
    """Which port to mount where, not checked yet."""
    return Mount9P(request.port, request.target)
