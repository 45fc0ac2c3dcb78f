"""Which addresses make a network, decided by nobody but the three values."""

from __future__ import annotations

import asyncio
import threading
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ConfigError, FilesystemError, InvalidRequest, StoragedError
from storaged.guest.network import Ipv4Plan, Network, NetworkSettings, plan
from storaged.sim.faults import Faults
from storaged.sim.network import SimNetwork

words = st.one_of(
    st.integers(0, (1 << 32) - 1),
    st.sampled_from([0, 1, 0x7F000001, 0xE0000001, 0xF0000001, 0xFFFFFFFF, 0x0A070001, 0x0A070002, 0x0A0700FF]),
)
masks = st.one_of(words, st.integers(0, 32).map(lambda length: (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF))


def mask_of(length: int) -> int:
    return (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF


def first_wrong(address: int, netmask: int, gateway: int) -> str | None:
    """The rule once more, in bits: the field that a refusal must name."""
    for name, value in (("address", address), ("netmask", netmask), ("gateway", gateway)):
        if value == 0:
            return name
    special = {0, 127, *range(224, 256)}
    if address >> 24 in special:
        return "address"
    if f"{netmask:032b}".rstrip("0").count("0"):
        return "netmask"
    host = ~netmask & 0xFFFFFFFF
    if host > 1 and address & host in (0, host):
        return "address"
    if gateway >> 24 in special or gateway & netmask != address & netmask:
        return "gateway"
    if (host > 1 and gateway & host in (0, host)) or gateway == address:
        return "gateway"
    return None


@given(words, masks, words)
def test_any_three_numbers_are_a_plan_or_name_the_field(address: int, netmask: int, gateway: int) -> None:
    wrong = first_wrong(address, netmask, gateway)
    if wrong is None:
        plan(IPv4Address(address), IPv4Address(netmask), IPv4Address(gateway))
        return
    with pytest.raises(InvalidRequest, match=rf"^ipv4_config\.{wrong} "):
        plan(IPv4Address(address), IPv4Address(netmask), IPv4Address(gateway))


first_bytes = st.integers(1, 223).filter(lambda byte: byte != 127)


@given(st.integers(8, 31), first_bytes, st.integers(0, (1 << 24) - 1), st.data())
def test_two_hosts_of_one_network_are_accepted_as_they_are(
    length: int, first: int, rest: int, data: st.DataObject
) -> None:
    network = IPv4Network(((first << 24 | rest) & mask_of(length), length))
    edge = 0 if length == 31 else 1
    hosts = range(int(network.network_address) + edge, int(network.broadcast_address) - edge + 1)
    place = data.draw(st.integers(0, len(hosts) - 1))
    other = (place + data.draw(st.integers(1, len(hosts) - 1))) % len(hosts)
    address, gateway = IPv4Address(hosts[place]), IPv4Address(hosts[other])
    assert plan(address, network.netmask, gateway) == Ipv4Plan(IPv4Interface((address, length)), gateway)


@pytest.mark.parametrize(
    ("address", "netmask", "gateway", "message"),
    [
        ("0.0.0.0", "0.0.0.0", "0.0.0.0", "address is not set"),
        ("10.0.0.2", "0.0.0.0", "0.0.0.0", "netmask is not set"),
        ("10.0.0.2", "255.255.255.0", "0.0.0.0", "gateway is not set"),
        ("10.0.0.2", "255.0.255.0", "10.0.0.1", "netmask 255.0.255.0 has a gap"),
        ("10.0.0.2", "0.0.0.255", "10.0.0.1", "netmask 0.0.0.255 has a gap"),
        ("10.0.0.2", "255.255.255.0", "10.0.1.1", r"gateway 10.0.1.1 is not in 10.0.0.0/24"),
        ("10.0.0.2", "255.255.255.255", "10.0.0.1", r"gateway 10.0.0.1 is not in 10.0.0.2/32"),
        ("10.0.0.2", "255.255.255.0", "10.0.0.2", "gateway 10.0.0.2 is the guest's own"),
        ("10.0.0.2", "255.255.255.0", "10.0.0.255", "gateway 10.0.0.255 is the network or the broadcast"),
        ("10.0.0.0", "255.255.255.0", "10.0.0.1", "address 10.0.0.0 is the network or the broadcast"),
        ("10.0.0.255", "255.255.255.0", "10.0.0.1", "address 10.0.0.255 is the network or the broadcast"),
        ("127.0.0.2", "255.0.0.0", "127.0.0.1", "address 127.0.0.2 is no host's"),
        ("224.0.0.2", "255.0.0.0", "224.0.0.1", "address 224.0.0.2 is no host's"),
        ("255.255.255.255", "255.0.0.0", "10.0.0.1", "address 255.255.255.255 is no host's"),
        ("10.0.0.2", "128.0.0.0", "127.0.0.1", "gateway 127.0.0.1 is no host's"),
    ],
)
def test_the_refusal_says_which_field_and_why(address: str, netmask: str, gateway: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^ipv4_config\.{message}"):
        plan(IPv4Address(address), IPv4Address(netmask), IPv4Address(gateway))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "eth0\n", "eth 0", "x" * 16, "all", "default", "lo", "a\0"])
def test_an_interface_that_is_none_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match=r"network\.interface"):
        NetworkSettings(interface=name)


@pytest.mark.parametrize("seconds", [0, -1, 3601, float("nan")])
def test_a_time_limit_that_is_none_is_refused_at_the_start(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"network\.timeout_s"):
        NetworkSettings(timeout_s=seconds)


FIRST = (IPv4Address("10.0.0.2"), IPv4Address("255.255.255.0"), IPv4Address("10.0.0.1"))
SECOND = (IPv4Address("10.0.1.2"), IPv4Address("255.255.255.0"), IPv4Address("10.0.1.1"))


async def test_the_last_call_holds_also_when_the_first_is_slow_and_its_caller_has_left() -> None:
    port = SimNetwork()
    going = port.faults.hang("configure")
    network = Network(port)
    first = asyncio.ensure_future(network.configure(*FIRST))
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(network.configure(*SECOND))
    await asyncio.sleep(0.05)
    first.cancel()
    assert port.faults.calls["configure"] == 1, "the event loop is free while a call is stuck, and no two calls overlap"
    port.faults.clear()
    going.set()
    await second
    assert port.interfaces["eth0"].addresses == {IPv4Interface("10.0.1.2/24")}
    assert port.faults.calls["configure"] == 2


async def test_nothing_reaches_the_port_of_a_request_that_is_wrong() -> None:
    port = SimNetwork()
    with pytest.raises(InvalidRequest):
        await Network(port).configure(FIRST[0], FIRST[1], SECOND[2])
    assert not port.faults.calls


async def test_the_interface_is_the_one_that_is_set() -> None:
    port = SimNetwork(("eth0", "enp1s0"))
    await Network(port, NetworkSettings(interface="enp1s0")).configure(*FIRST)
    assert port.interfaces["enp1s0"].up
    assert not port.interfaces["eth0"].up


async def test_dnsmasq_is_told_also_when_ipv6_could_not_be_renewed() -> None:
    port = SimNetwork(faults=Faults())
    port.faults.fail("renew_ipv6", FilesystemError("no"))
    with pytest.raises(StoragedError):
        await Network(port).host_changed()
    assert port.dnsmasq_reloads == 1


async def test_work_is_done_off_the_event_loop() -> None:
    threads = []

    class Port(SimNetwork):
        def reload_dnsmasq(self) -> None:
            threads.append(threading.current_thread())

    await Network(Port()).host_changed()
    assert threads
    assert threads[0] is not threading.main_thread()
