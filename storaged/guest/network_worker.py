"""The process that speaks netlink: one order on its standard input, one answer on its standard output, then its end.

A process of its own because the netlink library would cost the daemon a quarter of its memory for a call that comes
once a boot, and because a process can enter another network namespace without dragging a thread of the daemon along.

Order and answer are JSON objects. The answer has `error`, null when all was done, and `errno` beside it, 0 when the
refusal is ours.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from typing import Any

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
IFF_UP = 1
MAIN_TABLE = 254  # RT_TABLE_MAIN


@dataclass(frozen=True, slots=True)
class Order:
    """What to do. An empty `address` means: renew IPv6."""

    interface: str
    sysctl: str
    namespace: str = ""
    address: str = ""
    prefix_length: int = 0
    broadcast: str = ""
    gateway: str = ""


class Refused(Exception):
    """A step that did not work, in words for whoever asked."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.errno = errno


class Sysctls:
    """Files below /proc/sys, as the network namespace of this process has them."""

    def __init__(self, root: str) -> None:
        self._root = root

    def exists(self, name: str) -> bool:
        """False when the kernel was built or booted without it."""
        return os.path.exists(f"{self._root}/{name}")

    def write(self, name: str, value: int) -> None:
        try:
            fd = os.open(f"{self._root}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"%d\n" % value)
            finally:
                os.close(fd)
        except OSError as error:
            raise Refused(f"sysctl {name} = {value}: {error.strerror}", error.errno or 0) from error


def configure(netlink: Any, sysctls: Sysctls, order: Order) -> None:
    """Leave exactly the address and the route of `order`. The interface is looked up before anything is changed."""
    index, loopback = _index(netlink, order.interface), _index(netlink, "lo")
    sysctls.write("net/ipv4/ip_forward", 1)
    if sysctls.exists("net/ipv6"):
        # In this order: forwarding makes the kernel forget the routers of every interface whose accept_ra is not 2.
        sysctls.write(f"net/ipv6/conf/{order.interface}/accept_ra", 2)
        sysctls.write("net/ipv6/conf/all/forwarding", 1)
    # The new address first: one that the kernel does not take leaves the old one where it was.
    _add_address(netlink, index, order)
    for other in _addresses(netlink, index):
        if other != (order.address, order.address, order.prefix_length):
            _step(f"removing address {other[0]}/{other[2]}", netlink.addr, "del", **_address(index, *other))
    # It is gone again when it was a secondary address of one that was removed (unless promote_secondaries is set).
    _add_address(netlink, index, order)
    for one in (index, loopback):
        _step("bringing the interface up", netlink.link, "set", index=one, flags=IFF_UP, change=IFF_UP)
    _step(
        f"default route via {order.gateway}",
        netlink.route,
        "replace",
        family=socket.AF_INET,
        dst="default",
        gateway=order.gateway,
        oif=index,
        table=MAIN_TABLE,
    )
    _drop_other_routes(netlink, index, order.gateway)


def _index(netlink: Any, name: str) -> int:
    found: list[int] = _step(f"looking up interface {name}", netlink.link_lookup, ifname=name)
    if not found:
        raise Refused(f"there is no interface {name}")
    return found[0]


def _addresses(netlink: Any, index: int) -> list[tuple[str, str, int]]:
    """Local address, address (the peer's, of a point-to-point link) and prefix length of each one of the interface."""
    dump = _step("listing addresses", lambda: list(netlink.get_addr(family=socket.AF_INET, index=index)))
    return [(each.get("local"), each.get("address"), each["prefixlen"]) for each in dump]


def _address(index: int, local: str, address: str, prefix_length: int) -> dict[str, Any]:
    return {
        "index": index,
        "family": socket.AF_INET,
        "local": local,
        "address": address,
        "prefixlen": prefix_length,
    }


def _add_address(netlink: Any, index: int, order: Order) -> None:
    """Add the address, or give the one that is there an endless life, which is what no lifetime means."""
    _step(
        f"address {order.address}/{order.prefix_length}",
        netlink.addr,
        "replace",
        **_address(index, order.address, order.address, order.prefix_length),
        **({"broadcast": order.broadcast} if order.broadcast else {}),
    )


def _drop_other_routes(netlink: Any, index: int, gateway: str) -> None:
    """Remove the default routes through this interface that the order did not ask for."""
    routes = _step("listing routes", lambda: list(netlink.get_routes(family=socket.AF_INET, table=MAIN_TABLE)))
    for route in routes:
        metric, via = route.get("priority") or 0, route.get("gateway")
        if route["dst_len"] or route.get("oif") != index or (metric == 0 and via == gateway and route["tos"] == 0):
            continue
        _step(
            f"removing the default route via {via}",
            netlink.route,
            "del",
            family=socket.AF_INET,
            dst="default",
            oif=index,
            priority=metric,
            tos=route["tos"],
            table=MAIN_TABLE,
            **({"gateway": via} if via else {}),
        )


def _step(what: str, call: Any, *args: Any, **kwargs: Any) -> Any:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        return call(*args, **kwargs)
    except NetlinkError as error:
        raise Refused(f"{what}: {os.strerror(error.code)}", error.code) from error


def renew_ipv6(sysctls: Sysctls, order: Order) -> None:
    """Take IPv6 from the interface and give it back: addresses, routers and routes are learned anew."""
    if not sysctls.exists("net/ipv6"):
        return
    switch = f"net/ipv6/conf/{order.interface}/disable_ipv6"
    if not sysctls.exists(switch):
        raise Refused(f"there is no interface {order.interface}")
    try:
        sysctls.write(switch, 1)
    finally:
        sysctls.write(switch, 0)


def run(order: Order) -> None:
    """Do what is ordered, in the namespace that is named. Raises Refused."""
    if order.namespace:
        _enter(order.namespace)
    sysctls = Sysctls(order.sysctl)
    if not order.address:
        renew_ipv6(sysctls, order)
        return
    from pyroute2.iproute import IPRoute

    with IPRoute() as netlink:
        configure(netlink, sysctls, order)


def _enter(namespace: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(fd, CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(fd)
    except OSError as error:
        raise Refused(f"network namespace {namespace}: {error.strerror}", error.errno or 0) from error


def main() -> None:
    """Serve one order."""
    error: Refused | None = None
    try:
        run(Order(**json.load(sys.stdin)))
    except Refused as refused:
        error = refused
    json.dump({"error": error and error.message, "errno": error.errno if error else 0}, sys.stdout)


def encode(order: Order) -> bytes:
    """`order` as `main` reads it."""
    return json.dumps(asdict(order)).encode()


if __name__ == "__main__":
    main()
