"""Network, resolver and clock as a host calls them: a real gRPC server, the modules in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from storaged.addresses import UnixAddress
from storaged.guest.clock import Clock
from storaged.guest.kernel_network import KernelNetwork
from storaged.guest.network import Network
from storaged.guest.resolv import Resolv
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.rpc.proto import vm_guest_pb2_grpc
from storaged.rpc.server import Server
from storaged.sim.clock import SimWallClock, SimZones
from storaged.sim.network import SimNetwork, SimResolv
from tests.guest.netns import Lab
from tests.rpc.conftest import EMPTY, Guest, refused

INVALID, INTERNAL = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL
SECONDS = 1_900_000_000


class Host:
    """A host's stub for one guest, and what that guest's modules hold."""

    def __init__(self) -> None:
        self.network, self.resolv = SimNetwork(), SimResolv()
        self.wall, self.zones = SimWallClock(), SimZones()
        self.maitred: vm_guest_pb2_grpc.MaitredAsyncStub

    def held(self) -> object:
        """All that a refused call must leave as it is."""
        eth0 = self.network.interfaces["eth0"]
        return (
            frozenset(eth0.addresses),
            frozenset(eth0.default_gateways),
            eth0.up,
            tuple(self.network.forwarding.values()),
            self.network.dnsmasq_reloads,
            self.resolv.text,
            self.wall.nanoseconds,
            self.zones.local,
            self.zones.bound,
        )


@pytest.fixture
async def host(guest: Guest, tmp_path: Path) -> AsyncIterator[Host]:
    one = Host()
    server = Server(
        guest.service,
        network=Network(one.network),
        resolv=Resolv(one.resolv),
        clock=Clock(one.wall, one.zones),
    )
    await server.start([UnixAddress(str(tmp_path / "n"))])
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'n'}") as channel:
        one.maitred = vm_guest_pb2_grpc.MaitredStub(channel)
        yield one
    await server.stop(0.1)


def ipv4(address: int = 0, netmask: int = 0, gateway: int = 0) -> vm.NetworkConfigRequest:
    return vm.NetworkConfigRequest(ipv4_config=vm.IPv4Config(address=address, netmask=netmask, gateway=gateway))


def number(address: str) -> int:
    return int.from_bytes(IPv4Address(address).packed, "little")


def resolv(nameservers: list[str], search_domains: list[str]) -> vm.SetResolvConfigRequest:
    return vm.SetResolvConfigRequest(
        resolv_config=vm.ResolvConfig(nameservers=nameservers, search_domains=search_domains)
    )


def moment(seconds: int, nanos: int = 0) -> vm.SetTimeRequest:
    return vm.SetTimeRequest(time=Timestamp(seconds=seconds, nanos=nanos))


async def test_a_host_sets_up_its_guest(host: Host) -> None:
    # 100.115.92.26/30 with the gateway .25, in the bytes that hosts send.
    assert await host.maitred.ConfigureNetwork(ipv4(442266468, 0xFCFFFFFF, 425489252)) == EMPTY
    eth0 = host.network.interfaces["eth0"]
    assert eth0.addresses == {IPv4Interface("100.115.92.26/30")}
    assert eth0.default_gateways == {IPv4Address("100.115.92.25")}
    assert await host.maitred.SetResolvConfig(resolv(["192.0.2.1"], ["example.com"])) == EMPTY
    assert host.resolv.text is not None
    assert host.resolv.text.startswith("nameserver 192.0.2.1\nsearch example.com\n")
    assert await host.maitred.SetTime(moment(SECONDS, 5)) == EMPTY
    assert host.wall.nanoseconds == SECONDS * 10**9 + 5
    for bind in (True, False):
        request = vm.SetTimezoneRequest(timezone_name="Europe/Berlin", use_bind_mount=bind)
        assert await host.maitred.SetTimezone(request) == EMPTY
        assert (host.zones.local, host.zones.bound) == ("Europe/Berlin", bind)


async def test_both_names_of_the_call_forget_the_old_network(host: Host) -> None:
    for count, call in enumerate((host.maitred.OnHostNetworkChanged, host.maitred.ResetIPv6), 1):
        host.network.interfaces["eth0"].learned_ipv6.add("2001:db8::2")
        assert await call(EMPTY) == EMPTY
        assert not host.network.interfaces["eth0"].learned_ipv6
        assert host.network.dnsmasq_reloads == count


async def test_what_the_network_request_says_of_the_resolver_is_left_alone(host: Host) -> None:
    request = ipv4(442266468, 0xFCFFFFFF, 425489252)
    request.resolv_config.nameservers.append("not an address")
    await host.maitred.ConfigureNetwork(request)
    assert host.resolv.text is None


WRONG: list[tuple[str, object, str]] = [
    ("ConfigureNetwork", vm.NetworkConfigRequest(), "ipv4_config.address is not set"),
    ("ConfigureNetwork", ipv4(), "ipv4_config.address is not set"),
    ("ConfigureNetwork", ipv4(442266468), "ipv4_config.netmask is not set"),
    ("ConfigureNetwork", ipv4(442266468, 0xFCFFFFFF), "ipv4_config.gateway is not set"),
    ("ConfigureNetwork", ipv4(442266468, number("255.0.255.0"), 425489252), "ipv4_config.netmask 255.0.255.0"),
    ("ConfigureNetwork", ipv4(442266468, 0xFCFFFFFF, number("10.0.0.1")), "ipv4_config.gateway 10.0.0.1"),
    ("SetResolvConfig", resolv(["192.0.2.1", "1.1.1.1\noptions debug"], []), "resolv_config.nameservers[1]"),
    ("SetResolvConfig", resolv(["192.0.2.1"], ["a", "b c"]), "resolv_config.search_domains[1]"),
    ("SetTime", vm.SetTimeRequest(), "time.seconds is not set"),
    ("SetTime", moment(0, 5), "time.seconds is not set"),
    ("SetTime", moment(-5), "time.seconds -5"),
    ("SetTime", moment(253402300800), "time.seconds 253402300800"),
    ("SetTime", moment(SECONDS, -1), "time.nanos -1"),
    ("SetTime", moment(SECONDS, 1_000_000_000), "time.nanos 1000000000"),
    ("SetTimezone", vm.SetTimezoneRequest(), "timezone_name is empty"),
    ("SetTimezone", vm.SetTimezoneRequest(timezone_name="/etc/passwd"), "timezone_name '/etc/passwd'"),
    ("SetTimezone", vm.SetTimezoneRequest(timezone_name="../UTC"), "timezone_name '../UTC'"),
]


@pytest.mark.parametrize(("method", "request_message", "message"), WRONG)
async def test_a_wrong_field_is_named_and_nothing_changes(
    host: Host, method: str, request_message: object, message: str
) -> None:
    await host.maitred.ConfigureNetwork(ipv4(442266468, 0xFCFFFFFF, 425489252))
    before = host.held()
    code, text = await refused(getattr(host.maitred, method)(request_message))
    assert code is INVALID
    assert text.startswith(message)
    assert host.held() == before


async def test_what_is_not_there_is_internal_as_hosts_expect(host: Host) -> None:
    code, text = await refused(host.maitred.SetTimezone(vm.SetTimezoneRequest(timezone_name="Mars/Olympus_Mons")))
    assert (code, text) == (INTERNAL, "timezone_name 'Mars/Olympus_Mons': there is no such time zone")
    del host.network.interfaces["eth0"]
    for call in (
        host.maitred.ConfigureNetwork(ipv4(442266468, 0xFCFFFFFF, 425489252)),
        host.maitred.OnHostNetworkChanged(EMPTY),
        host.maitred.ResetIPv6(EMPTY),
    ):
        code, text = await refused(call)
        assert (code, text) == (INTERNAL, "network: there is no interface eth0")


async def test_a_network_that_hangs_delays_nobody_else(host: Host) -> None:
    host.network.faults.hang("configure")
    stuck = asyncio.ensure_future(host.maitred.ConfigureNetwork(ipv4(442266468, 0xFCFFFFFF, 425489252)))
    try:
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            await host.maitred.SetResolvConfig(resolv([], []))
            await host.maitred.SetTime(moment(SECONDS))
            await host.maitred.SetTimezone(vm.SetTimezoneRequest(timezone_name="UTC"))
            await host.maitred.GetKernelVersion(EMPTY)
        assert not stuck.done()
    finally:
        host.network.faults.clear()
    await stuck


async def test_a_guest_without_the_modules_does_not_know_the_calls(guest: Guest) -> None:
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: guest.maitred.ConfigureNetwork(ipv4()),
        lambda: guest.maitred.OnHostNetworkChanged(EMPTY),
        lambda: guest.maitred.ResetIPv6(EMPTY),
        lambda: guest.maitred.SetResolvConfig(resolv([], [])),
        lambda: guest.maitred.SetTime(moment(SECONDS)),
        lambda: guest.maitred.SetTimezone(vm.SetTimezoneRequest(timezone_name="UTC")),
    ]
    for call in calls:
        assert (await refused(call()))[0] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.root
async def test_the_call_reaches_a_real_interface(guest: Guest, tmp_path: Path) -> None:
    lab = Lab()
    server = Server(guest.service, network=Network(KernelNetwork(namespace=lab.guest.path)))
    try:
        await server.start([UnixAddress(str(tmp_path / "n"))])
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'n'}") as channel:
            maitred: vm_guest_pb2_grpc.MaitredAsyncStub = vm_guest_pb2_grpc.MaitredStub(channel)
            for address, netmask, gateway in (
                (Lab.GUEST, "255.255.255.252", Lab.ROUTER),
                (Lab.OTHER_GUEST, "255.255.255.0", Lab.OTHER_ROUTER),
            ):
                request = ipv4(number(address), number(netmask), number(gateway))
                await maitred.ConfigureNetwork(request)
                assert await asyncio.to_thread(lab.seen_from_far) == address
                code, text = await refused(maitred.ConfigureNetwork(ipv4(number(address), number(netmask), 1)))
                assert (code, text.split(" ")[0]) == (INVALID, "ipv4_config.gateway")
                assert await asyncio.to_thread(lab.seen_from_far) == address
    finally:
        await server.stop(0.1)
        lab.close()


def test_the_bytes_are_those_of_the_contract() -> None:
    assert number("100.115.92.26") == 442266468
