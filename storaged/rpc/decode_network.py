"""From the network's messages to the guest module's values."""

from __future__ import annotations

from ipaddress import IPv4Address

from storaged.rpc.proto import vm_guest_pb2


def ipv4_config(request: vm_guest_pb2.NetworkConfigRequest) -> tuple[IPv4Address, IPv4Address, IPv4Address]:
    """Address, netmask and gateway; what the request leaves out is 0.0.0.0."""
    config = request.ipv4_config
    return _address(config.address), _address(config.netmask), _address(config.gateway)


def _address(number: int) -> IPv4Address:
    # The four bytes of the address in network order, read as a little-endian number: 100.115.92.26 is 442266468.
    return IPv4Address(number.to_bytes(4, "little"))
