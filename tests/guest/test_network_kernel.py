"""Packets, routers and processes: what the kernel does with what a call leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storaged.errors import Kind, StoragedError
from storaged.guest.kernel_network import KernelNetwork
from storaged.guest.network_worker import Order
from tests.guest.netns import Lab, Namespace
from tests.guest.test_network_contract import FIRST, NEIGHBOUR, SECOND

FOREVER = 0xFFFFFFFF


@pytest.fixture
def lab() -> Iterator[Lab]:
    one = Lab()
    try:
        yield one
    finally:
        one.close()


@pytest.fixture
def network(lab: Lab) -> KernelNetwork:
    return KernelNetwork(namespace=lab.guest.path)


def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


# --- ConfigureNetwork -----------------------------------------------------------------------------------------


@pytest.mark.root
def test_traffic_passes_through_the_gateway(lab: Lab, network: KernelNetwork) -> None:
    with pytest.raises(OSError, match="unreachable"):
        lab.guest.inside(lambda: _connect(Lab.FAR))
    for plan, address in ((FIRST, Lab.GUEST), (SECOND, Lab.OTHER_GUEST), (FIRST, Lab.GUEST)):
        network.configure("eth0", plan)
        passed = lab.routed_packets()
        assert lab.seen_from_far() == address
        assert lab.routed_packets() - passed >= 4


def _connect(address: str) -> None:
    with socket.socket() as one:
        one.settimeout(2)
        one.connect((address, 9))


@pytest.mark.root
def test_a_container_behind_the_guest_reaches_the_world(lab: Lab, network: KernelNetwork) -> None:
    container = Namespace()
    try:
        lab.guest.ip(f"link add lxdbr0 type veth peer name eth0 netns {container.pid}")
        lab.guest.ip("addr add 10.20.0.1/24 dev lxdbr0")
        lab.guest.ip("link set lxdbr0 up")
        for command in ("addr add 10.20.0.2/24 dev eth0", "link set eth0 up", "route add default via 10.20.0.1"):
            container.ip(command)
        lab.router.ip(f"route add 10.20.0.0/24 via {Lab.GUEST}")
        network.configure("eth0", FIRST)
        assert lab.seen_from_far(container) == "10.20.0.2"
        assert "10.20.0.1/24" in lab.guest.run("ip", "addr", "show", "dev", "lxdbr0"), "other interfaces keep theirs"
    finally:
        container.close()


@pytest.mark.root
@pytest.mark.parametrize("promote", [0, 1])
def test_a_neighbour_address_stays_when_the_first_of_its_network_goes(
    lab: Lab, network: KernelNetwork, promote: int
) -> None:
    lab.guest.sysctl("ipv4/conf/all/promote_secondaries", promote)
    lab.guest.sysctl("ipv4/conf/eth0/promote_secondaries", promote)
    network.configure("eth0", SECOND)
    network.configure("eth0", NEIGHBOUR)
    (link,) = lab.guest.show("-4 addr show dev eth0")
    assert [(info["local"], info["broadcast"]) for info in link["addr_info"]] == [("10.7.0.78", "10.7.0.255")]
    assert [route["gateway"] for route in lab.guest.show("-4 route show default")] == ["10.7.0.5"]


@pytest.mark.root
def test_an_address_that_would_have_expired_no_longer_does(lab: Lab, network: KernelNetwork) -> None:
    lab.guest.ip(f"addr add {Lab.GUEST}/30 dev eth0 valid_lft 100 preferred_lft 50")
    network.configure("eth0", FIRST)
    (link,) = lab.guest.show("-4 addr show dev eth0")
    assert [info["valid_life_time"] for info in link["addr_info"]] == [FOREVER]
    assert [info["preferred_life_time"] for info in link["addr_info"]] == [FOREVER]


@pytest.mark.root
def test_the_default_route_is_ours_and_worse_ones_elsewhere_stay(lab: Lab, network: KernelNetwork) -> None:
    for command in (
        "link add eth1 type veth peer name eth1-end",
        "link set eth1 up",
        "link set eth1-end up",
        "addr add 172.16.0.2/24 dev eth1",
        "route add default via 172.16.0.1 dev eth1",
        "route add default via 172.16.0.1 dev eth1 metric 500",
        "route add 192.0.2.0/24 via 172.16.0.1",
    ):
        lab.guest.ip(command)
    network.configure("eth0", FIRST)
    assert lab.seen_from_far() == Lab.GUEST
    routes = {(route["dst"], route.get("gateway"), route.get("metric")) for route in lab.guest.show("-4 route show")}
    assert {route for route in routes if route[0] == "default"} == {
        ("default", Lab.ROUTER, None),
        ("default", "172.16.0.1", 500),
    }
    assert ("192.0.2.0/24", "172.16.0.1", None) in routes


@pytest.mark.root
def test_what_the_kernel_refuses_is_said_and_what_was_there_stays(lab: Lab, network: KernelNetwork) -> None:
    network.configure("eth0", FIRST)
    # No plan can say this: the kernel itself has to refuse it.
    impossible = Order("eth0", "/proc/sys", lab.guest.path, Lab.OTHER_GUEST, 33, "", Lab.OTHER_ROUTER)
    with pytest.raises(StoragedError, match=r"network: address 10\.7\.0\.77/33: Invalid argument") as caught:
        network._run(impossible)
    assert caught.value.kind is Kind.INTERNAL
    assert lab.seen_from_far() == Lab.GUEST


@pytest.mark.root
def test_without_the_right_it_says_which_one_is_needed(lab: Lab) -> None:
    code = (
        "from storaged.guest.kernel_network import KernelNetwork\n"
        "from tests.guest.test_network_contract import FIRST\n"
        "KernelNetwork().configure('eth0', FIRST)\n"
    )
    with pytest.raises(subprocess.CalledProcessError) as caught:
        lab.guest.run(
            "setpriv", "--bounding-set=-net_admin", "env", f"PYTHONPATH={os.getcwd()}", sys.executable, "-c", code
        )
    assert "Operation not permitted (CAP_NET_ADMIN is needed)" in caught.value.stderr
    assert "inet " not in lab.guest.run("ip", "addr", "show", "dev", "eth0")


@pytest.mark.root
def test_a_kernel_without_ipv6_gets_its_ipv4(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "net/ipv4").mkdir(parents=True)
    (tmp_path / "net/ipv4/ip_forward").write_text("0\n")
    network = KernelNetwork(namespace=lab.guest.path, sysctl=str(tmp_path))
    network.configure("eth0", FIRST)
    assert (tmp_path / "net/ipv4/ip_forward").read_text() == "1\n"
    assert lab.seen_from_far() == Lab.GUEST
    network.renew_ipv6("eth0")


@pytest.mark.root
def test_a_setting_that_cannot_be_made_is_named(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(StoragedError, match=r"sysctl net/ipv4/ip_forward = 1: No such file"):
        KernelNetwork(namespace=lab.guest.path, sysctl=str(tmp_path)).configure("eth0", FIRST)
    assert "inet " not in lab.guest.run("ip", "addr", "show", "dev", "eth0")


# --- the process that speaks netlink --------------------------------------------------------------------------


def test_a_namespace_that_is_not_there_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(StoragedError, match=rf"network namespace {path}: "):
            KernelNetwork(namespace=str(path)).renew_ipv6("eth0")


def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    pipe = tmp_path / "namespace"
    os.mkfifo(pipe)  # to open it waits for a writer that never comes
    with pytest.raises(StoragedError, match=r"not done within 0\.5 s"):
        KernelNetwork(namespace=str(pipe), timeout_s=0.5).renew_ipv6("eth0")


@pytest.mark.parametrize(
    ("program", "message"),
    [("/bin/false", "ended with status 1"), ("/nowhere/python", "could not be started: No such file")],
)
def test_a_process_that_dies_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(StoragedError, match=message):
        KernelNetwork(namespace=str(tmp_path)).renew_ipv6("eth0")


@pytest.mark.root
def test_the_daemon_itself_does_not_carry_the_netlink_library(lab: Lab) -> None:
    code = (
        "import sys, storaged.app\n"
        "from tests.guest.test_network_contract import FIRST, KernelNetwork\n"
        f"KernelNetwork(namespace={lab.guest.path!r}).configure('eth0', FIRST)\n"
        "print(sorted(name for name in sys.modules if name.startswith('pyroute2')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=os.getcwd())
    assert done.stdout == "[]\n"
    assert lab.guest.show("-4 route show default")


# --- OnHostNetworkChanged, ResetIPv6 --------------------------------------------------------------------------


class Advertiser:
    """A router's side of neighbour discovery on `lan` (RFC 4861)."""

    def __init__(self, lab: Lab) -> None:
        self._socket = lab.router.inside(lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6))
        index = lab.router.inside(lambda: socket.if_nametoindex("lan"))
        self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        group = socket.inet_pton(socket.AF_INET6, "ff02::2") + struct.pack("@I", index)
        self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def advertise(self, prefix: str) -> None:
        """Tell all hosts that we are a router and that this /64 is theirs."""
        router = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
        option = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0) + socket.inet_pton(socket.AF_INET6, prefix)
        with contextlib.suppress(OSError):  # no link-local address yet
            self._socket.sendto(router + option, ("ff02::1", 0))

    def solicited(self) -> bool:
        """True when a host has asked for routers since the last time."""
        asked = False
        with contextlib.suppress(BlockingIOError):
            while True:
                asked |= self._socket.recv(1500)[0] == 133
        return asked


@pytest.mark.root
def test_a_forwarding_guest_learns_ipv6_forgets_it_and_asks_anew(lab: Lab, network: KernelNetwork) -> None:
    def learned(prefix: str) -> bool:
        addresses = lab.guest.run("ip", "-6", "addr", "show", "dev", "eth0", "scope", "global")
        return prefix in addresses and "default via" in lab.guest.run("ip", "-6", "route", "show", "default")

    def hears(prefix: str) -> bool:
        router.advertise(prefix + "::")
        return learned(prefix)

    network.configure("eth0", FIRST)
    router = Advertiser(lab)
    try:
        until(lambda: hears("2001:db8:1"))
        router.solicited()
        network.renew_ipv6("eth0")
        assert not learned("2001:db8:1"), "the old network's address and router are gone"
        until(router.solicited)
        until(lambda: hears("2001:db8:2"))
        assert not learned("2001:db8:1")
        assert lab.guest.sysctl("ipv6/conf/eth0/disable_ipv6") == 0
    finally:
        router.close()


LISTENER = """
import signal, sys, time
signal.signal(signal.SIGHUP, lambda *_: print("hung up", flush=True))
open("/proc/self/comm", "w").write(sys.argv[1])
print("ready", flush=True)
while True: signal.pause()
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """`processes(name)` starts one that says when it hears a SIGHUP; a /proc in tmp_path shows these alone."""
    made: list[subprocess.Popen[str]] = []

    def start(name: str) -> subprocess.Popen[str]:
        one = subprocess.Popen(
            [sys.executable, "-u", "-c", LISTENER, name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        made.append(one)
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        (tmp_path / str(one.pid)).symlink_to(f"/proc/{one.pid}")
        return one

    yield start
    for one in made:
        one.kill()
        one.communicate()


def test_every_dnsmasq_is_told_and_nobody_else(
    tmp_path: Path, processes: Callable[[str], subprocess.Popen[str]]
) -> None:
    told, also_told, other = processes("dnsmasq"), processes("dnsmasq"), processes("dnsmasq2")
    ended = processes("dnsmasq")
    ended.kill()
    ended.wait()
    (tmp_path / "self").symlink_to("/proc/self")
    (tmp_path / str(os.getpid())).mkdir()  # ended after it was listed: there is nothing in it to read
    network = KernelNetwork(proc=str(tmp_path))
    for _ in range(2):
        network.reload_dnsmasq()
        for one in (told, also_told):
            assert one.stdout is not None
            assert one.stdout.readline() == "hung up\n"
    other.send_signal(signal.SIGTERM)
    assert other.communicate(timeout=10)[0] == ""


def test_a_proc_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoragedError, match="No such file"):
        KernelNetwork(proc=str(tmp_path / "none")).reload_dnsmasq()
