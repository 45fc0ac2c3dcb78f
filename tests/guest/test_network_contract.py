"""One contract, two networks: the simulation, and a real interface in a network namespace (marked `root`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

import pytest

from storaged.errors import Kind, StoragedError
from storaged.guest.kernel_network import KernelNetwork
from storaged.guest.network import Ipv4Plan, NetworkPort
from storaged.sim.network import SimNetwork
from tests.guest.netns import Lab

FIRST = Ipv4Plan(IPv4Interface(f"{Lab.GUEST}/30"), IPv4Address(Lab.ROUTER))
SECOND = Ipv4Plan(IPv4Interface(f"{Lab.OTHER_GUEST}/24"), IPv4Address(Lab.OTHER_ROUTER))
NEIGHBOUR = Ipv4Plan(IPv4Interface("10.7.0.78/24"), IPv4Address("10.7.0.5"))
WIDER = Ipv4Plan(IPv4Interface(f"{Lab.OTHER_GUEST}/16"), IPv4Address("10.7.1.1"))
NARROW = Ipv4Plan(IPv4Interface(f"{Lab.OTHER_GUEST}/31"), IPv4Address("10.7.0.76"))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a network looks like from outside the port."""

    addresses: frozenset[IPv4Interface]
    gateways: frozenset[IPv4Address]
    up: bool
    loopback_up: bool
    forwarding: tuple[int, int]
    accept_ra: int

    @classmethod
    def after(cls, plan: Ipv4Plan) -> Seen:
        """What it must be once `plan` was carried out."""
        return cls(frozenset({plan.address}), frozenset({plan.gateway}), True, True, (1, 1), 2)


class Place:
    """One network with an interface eth0 that nobody has configured."""

    port: NetworkPort

    def seen(self) -> Seen:
        """What it looks like now."""
        raise NotImplementedError

    def disturb(self) -> None:
        """Somebody else brings the interface up and adds two addresses and two default routes."""
        raise NotImplementedError

    def learn_ipv6(self) -> None:
        """The interface gets an IPv6 address of the network that it is in."""
        raise NotImplementedError

    def learned_ipv6(self) -> bool:
        """True while it has that address."""
        raise NotImplementedError


class SimPlace(Place):
    """In memory."""

    def __init__(self) -> None:
        self.sim = SimNetwork()
        self.port = self.sim

    def seen(self) -> Seen:
        one = self.sim.interfaces["eth0"]
        return Seen(
            frozenset(one.addresses),
            frozenset(one.default_gateways),
            one.up,
            self.sim.loopback_up,
            (int(self.sim.forwarding["ipv4"]), int(self.sim.forwarding["ipv6"])),
            one.accept_ra,
        )

    def disturb(self) -> None:
        one = self.sim.interfaces["eth0"]
        one.up = True
        one.addresses |= {IPv4Interface("10.7.0.9/24"), IPv4Interface("10.9.9.9/8")}
        one.default_gateways |= {IPv4Address("10.7.0.254"), IPv4Address("10.7.0.253")}

    def learn_ipv6(self) -> None:
        self.sim.interfaces["eth0"].learned_ipv6.add("2001:db8::2")

    def learned_ipv6(self) -> bool:
        return bool(self.sim.interfaces["eth0"].learned_ipv6)


class RealPlace(Place):
    """A pair of virtual Ethernet devices between two namespaces."""

    def __init__(self) -> None:
        self.lab = Lab()
        self.port = KernelNetwork(namespace=self.lab.guest.path)

    def seen(self) -> Seen:
        guest = self.lab.guest
        links = {link["ifname"]: "UP" in link["flags"] for link in guest.show("link show")}
        addresses = guest.show("-4 addr show dev eth0")
        routes = guest.show("-4 route show default")
        return Seen(
            frozenset(
                IPv4Interface((info["local"], info["prefixlen"])) for link in addresses for info in link["addr_info"]
            ),
            frozenset(IPv4Address(route["gateway"]) for route in routes),
            links["eth0"],
            links["lo"],
            (guest.sysctl("ipv4/ip_forward"), guest.sysctl("ipv6/conf/all/forwarding")),
            guest.sysctl("ipv6/conf/eth0/accept_ra"),
        )

    def disturb(self) -> None:
        for command in (
            "link set eth0 up",
            "addr add 10.7.0.9/24 dev eth0",
            "addr add 10.9.9.9/8 dev eth0",
            "route add default via 10.7.0.254 metric 100",
            "route append default via 10.7.0.253",
        ):
            self.lab.guest.ip(command)

    def learn_ipv6(self) -> None:
        self.lab.guest.ip("link set eth0 up")
        self.lab.guest.ip("addr add 2001:db8::2/64 dev eth0")

    def learned_ipv6(self) -> bool:
        return "2001:db8::2" in self.lab.guest.run("ip", "-6", "addr", "show", "dev", "eth0")


@pytest.fixture(params=["sim", pytest.param("real", marks=pytest.mark.root)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A network of its own for each test."""
    if request.param == "sim":
        yield SimPlace()
        return
    real = RealPlace()
    try:
        yield real
    finally:
        real.lab.close()


def test_an_interface_is_configured_from_nothing(place: Place) -> None:
    before = place.seen()
    assert not before.addresses
    assert not before.up
    assert not before.loopback_up
    place.port.configure("eth0", FIRST)
    assert place.seen() == Seen.after(FIRST)


@pytest.mark.parametrize("then", [FIRST, SECOND, NEIGHBOUR, WIDER, NARROW], ids=lambda plan: str(plan.address))
def test_a_second_call_leaves_exactly_what_it_says(place: Place, then: Ipv4Plan) -> None:
    for plan in (SECOND, then, then):
        place.port.configure("eth0", plan)
        assert place.seen() == Seen.after(plan)


@pytest.mark.parametrize("plan", [SECOND, NEIGHBOUR, FIRST], ids=lambda plan: str(plan.address))
def test_what_somebody_else_set_does_not_stay(place: Place, plan: Ipv4Plan) -> None:
    place.disturb()
    assert len(place.seen().addresses) == 2
    place.port.configure("eth0", plan)
    assert place.seen() == Seen.after(plan)


def test_an_interface_that_is_not_there_changes_nothing(place: Place) -> None:
    before = place.seen()
    with pytest.raises(StoragedError, match="there is no interface eth7") as caught:
        place.port.configure("eth7", FIRST)
    assert caught.value.kind is Kind.INTERNAL
    with pytest.raises(StoragedError, match="there is no interface eth7"):
        place.port.renew_ipv6("eth7")
    assert place.seen() == before


def test_ipv6_is_learned_anew_and_ipv4_stays(place: Place) -> None:
    place.port.configure("eth0", FIRST)
    place.learn_ipv6()
    assert place.learned_ipv6()
    place.port.renew_ipv6("eth0")
    assert not place.learned_ipv6()
    assert place.seen() == Seen.after(FIRST)
