"""The guest's interface: which addresses make sense (pure), and who sets them (a port)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Protocol

from storaged.errors import ConfigError, InvalidRequest
from storaged.guest.serial import OneByOne

_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}", re.ASCII)
"""No more than IFNAMSIZ - 1 bytes, and nothing that is special in a path."""
_THIS_NETWORK = IPv4Network("0.0.0.0/8")


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """What an administrator may set."""

    interface: str = field(default="eth0", metadata={"help": "the interface that the host configures"})
    timeout_s: float = field(default=10.0, metadata={"help": "seconds a change may take before it is given up"})

    def __post_init__(self) -> None:
        if not _INTERFACE.fullmatch(self.interface) or self.interface in (".", "..", "all", "default", "lo"):
            raise ConfigError(f"network.interface = {self.interface!r}: the name of a network interface is accepted")
        if not 0.1 <= self.timeout_s <= 3600:
            raise ConfigError(f"network.timeout_s = {self.timeout_s!r}: seconds between 0.1 and 3600 are accepted")


@dataclass(frozen=True, slots=True)
class Ipv4Plan:
    """An address with its network, and a gateway that is another address of that network."""

    address: IPv4Interface
    gateway: IPv4Address


def plan(address: IPv4Address, netmask: IPv4Address, gateway: IPv4Address) -> Ipv4Plan:
    """What these three values of `ipv4_config` ask for. Raises InvalidRequest that names the first wrong one."""
    for name, value in (("address", address), ("netmask", netmask), ("gateway", gateway)):
        if not int(value):
            raise InvalidRequest(f"ipv4_config.{name} is not set: an IPv4 {name} is accepted")
    _check_host("address", address)
    interface = IPv4Interface((address, _prefix_length(netmask)))
    network = interface.network
    _check_inside("address", address, network)
    _check_host("gateway", gateway)
    if gateway not in network:
        raise InvalidRequest(
            f"ipv4_config.gateway {gateway} is not in {network}: an address of that network is accepted"
        )
    _check_inside("gateway", gateway, network)
    if gateway == address:
        raise InvalidRequest(f"ipv4_config.gateway {gateway} is the guest's own address: another one is accepted")
    return Ipv4Plan(interface, gateway)


def _prefix_length(netmask: IPv4Address) -> int:
    zeros = ~int(netmask) & 0xFFFFFFFF
    if zeros & (zeros + 1):
        raise InvalidRequest(f"ipv4_config.netmask {netmask} has a gap: ones followed by zeros are accepted")
    return 32 - zeros.bit_length()


def _check_host(name: str, value: IPv4Address) -> None:
    if value.is_loopback or value.is_multicast or value.is_reserved or value in _THIS_NETWORK:
        raise InvalidRequest(f"ipv4_config.{name} {value} is no host's: a unicast address is accepted")


def _check_inside(name: str, value: IPv4Address, network: IPv4Network) -> None:
    # A network of two or of one address has neither of the two special ones (RFC 3021).
    if network.prefixlen < 31 and value in (network.network_address, network.broadcast_address):
        raise InvalidRequest(
            f"ipv4_config.{name} {value} is the network or the broadcast address of {network}: a host's is accepted"
        )


class NetworkPort(Protocol):
    """The machine's network. Every method blocks, and raises StoragedError when the kernel refuses."""

    def configure(self, interface: str, plan: Ipv4Plan) -> None:
        """Leave `interface` up with exactly this IPv4 address and default route, forwarding on, and `lo` up.

        An interface that does not exist is an error, and then nothing was changed.
        """

    def renew_ipv6(self, interface: str) -> None:
        """Drop all that IPv6 learned on `interface` and ask for it anew."""

    def reload_dnsmasq(self) -> None:
        """Tell every dnsmasq of this machine to drop its cache and read its files again."""


class Network:
    """What a host may ask of the network; its calls take effect in the order in which they came."""

    def __init__(self, port: NetworkPort, settings: NetworkSettings | None = None) -> None:
        self._port = port
        self._settings = settings or NetworkSettings()
        self._calls = OneByOne("network")

    async def configure(self, address: IPv4Address, netmask: IPv4Address, gateway: IPv4Address) -> None:
        """Give the interface its address and the default route. All is checked before anything is changed."""
        wanted = plan(address, netmask, gateway)
        await self._calls.run(self._port.configure, self._settings.interface, wanted)

    async def host_changed(self) -> None:
        """Forget what was learned from the network that the host has left."""
        await self._calls.run(self._forget)

    def _forget(self) -> None:
        try:
            self._port.renew_ipv6(self._settings.interface)
        finally:
            self._port.reload_dnsmasq()
