"""From the container guests' and users' messages to the guest modules' values, and back."""

from __future__ import annotations

from ipaddress import IPv4Address

from storaged.guest.termina import TerminaRequest, TerminaResult, parse_termina
from storaged.guest.users import UserRequest
from storaged.rpc.proto import vm_guest_pb2


def termina(request: vm_guest_pb2.StartTerminaRequest) -> TerminaRequest:
    """What to start. Raises InvalidRequest."""
    # The address' four bytes in network order, read as a little-endian number.
    address = IPv4Address(request.tremplin_ipv4_address.to_bytes(4, "little"))
    return parse_termina(address, request.lxd_ipv4_subnet, request.stateful_device)


def started(result: TerminaResult) -> vm_guest_pb2.StartTerminaResponse:
    """How it went."""
    return vm_guest_pb2.StartTerminaResponse(
        mount_result=result.mount.value,  # type: ignore[arg-type]  # the guest module's numbers are the contract's
        free_bytes=result.free,
        free_bytes_has_value=True,
    )


def user(request: vm_guest_pb2.SetUpUserRequest) -> UserRequest:
    """Who is asked for, not checked yet."""
    uid = request.uid if request.HasField("uid") else None
    return UserRequest(request.username, uid, tuple(dict.fromkeys(request.group_names)))


def user_set_up(name: str, reason: str) -> vm_guest_pb2.SetUpUserResponse:
    """Empty reason: it is done."""
    return vm_guest_pb2.SetUpUserResponse(success=not reason, failure_reason=reason, username=name)
