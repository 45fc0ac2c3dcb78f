"""A network and a resolver in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface

from storaged.errors import StoragedError
from storaged.guest.network import Ipv4Plan
from storaged.sim.faults import Faults


@dataclass(slots=True)
class SimInterface:
    """What one interface has."""

    addresses: set[IPv4Interface] = field(default_factory=set)
    default_gateways: set[IPv4Address] = field(default_factory=set)
    learned_ipv6: set[str] = field(default_factory=set)
    up: bool = False
    accept_ra: int = 1


class SimNetwork:
    """`guest.network.NetworkPort` for interfaces that exist nowhere else."""

    def __init__(self, interfaces: Iterable[str] = ("eth0",), faults: Faults | None = None) -> None:
        self.interfaces = {name: SimInterface() for name in interfaces}
        self.forwarding = {"ipv4": False, "ipv6": False}
        self.loopback_up = False
        self.dnsmasq_reloads = 0
        self.faults = faults or Faults()

    def configure(self, interface: str, plan: Ipv4Plan) -> None:
        self.faults.meet("configure")
        one = self._interface(interface)
        self.forwarding = {"ipv4": True, "ipv6": True}
        one.accept_ra = 2
        one.addresses = {plan.address}
        one.default_gateways = {plan.gateway}
        one.up = self.loopback_up = True

    def renew_ipv6(self, interface: str) -> None:
        self.faults.meet("renew_ipv6")
        self._interface(interface).learned_ipv6.clear()

    def reload_dnsmasq(self) -> None:
        self.faults.meet("reload_dnsmasq")
        self.dnsmasq_reloads += 1

    def _interface(self, name: str) -> SimInterface:
        if name not in self.interfaces:
            raise StoragedError(f"network: there is no interface {name}")
        return self.interfaces[name]


class SimResolv:
    """`guest.resolv.ResolvPort` without a file."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.text: str | None = None
        self.faults = faults or Faults()

    def write(self, text: str) -> None:
        self.faults.meet("write_resolv")
        self.text = text
