"""Network namespaces with a guest, a router and a far host in them, and nothing of this machine's."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

CLONE_NEWNET = 0x40000000
Answer = TypeVar("Answer")


class Namespace:
    """A network namespace that is gone with `close`, or with the process that made it."""

    def __init__(self) -> None:
        # cat ends when our end of its pipe does, however we end.
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.pid = self._holder.pid
        self.path = f"/proc/{self.pid}/ns/net"
        ours = os.readlink("/proc/self/ns/net")
        ends = time.monotonic() + 10
        while os.readlink(self.path) == ours:
            assert time.monotonic() < ends, "unshare made no namespace"
            time.sleep(0.002)

    def close(self) -> None:
        """Let it go, and all that is in it."""
        self._holder.kill()
        self._holder.communicate()

    def run(self, *argv: str) -> str:
        """Run a program inside; what it said."""
        return subprocess.run(
            ["nsenter", f"--net={self.path}", *argv], check=True, capture_output=True, text=True
        ).stdout

    def ip(self, command: str) -> None:
        """`ip COMMAND` inside."""
        self.run("ip", *command.split())

    def show(self, command: str) -> list[dict[str, Any]]:
        """`ip -j COMMAND` inside."""
        answer: list[dict[str, Any]] = json.loads(self.run("ip", "-j", *command.split()) or "[]")
        return answer

    def sysctl(self, name: str, value: int | None = None) -> int:
        """The value of a file below /proc/sys/net, after setting it when one is given."""
        path = f"/proc/sys/net/{name}"
        if value is not None:
            self.run("sh", "-c", f"echo {value} > {path}")
        return int(self.run("cat", path))

    def inside(self, call: Callable[[], Answer]) -> Answer:
        """What `call` answers on a thread inside; sockets that it makes stay there."""

        def enter() -> Answer:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(self.path, "rb") as file:
                assert libc.setns(file.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            return call()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter).result()


class Lab:
    """guest eth0 - lan ROUTER wan - eth0 far.

    The guest's end is down and without an address, as on a machine that has just booted.
    """

    NETWORK = "100.115.92.24/30"
    GUEST, ROUTER = "100.115.92.26", "100.115.92.25"
    OTHER_NETWORK = "10.7.0.0/24"
    OTHER_GUEST, OTHER_ROUTER = "10.7.0.77", "10.7.0.1"
    FAR = "203.0.113.2"

    def __init__(self) -> None:
        self.guest, self.router, self.far = Namespace(), Namespace(), Namespace()
        try:
            self._wire()
        except BaseException:
            self.close()
            raise

    def _wire(self) -> None:
        for name in ("all", "default"):
            for namespace in (self.guest, self.router):
                namespace.sysctl(f"ipv6/conf/{name}/accept_dad", 0)  # link-local addresses without a second's wait
        self.guest.sysctl("ipv6/conf/default/router_solicitation_delay", 0)
        self.guest.ip(f"link add eth0 type veth peer name lan netns {self.router.pid}")
        self.far.ip(f"link add eth0 type veth peer name wan netns {self.router.pid}")
        self.router.sysctl("ipv4/ip_forward", 1)
        for command in (
            f"addr add {self.ROUTER}/30 dev lan",
            f"addr add {self.OTHER_ROUTER}/24 dev lan",
            "addr add 203.0.113.1/24 dev wan",
            "link set lan up",
            "link set wan up",
        ):
            self.router.ip(command)
        for command in (f"addr add {self.FAR}/24 dev eth0", "link set eth0 up", "route add default via 203.0.113.1"):
            self.far.ip(command)

    def close(self) -> None:
        """Nothing of it is left."""
        for namespace in (self.guest, self.router, self.far):
            namespace.close()

    def seen_from_far(self, client_of: Namespace | None = None) -> str:
        """Connect from the guest (or from behind it) to the far host; the address that the far host saw."""
        listener = self.far.inside(lambda: socket.create_server((self.FAR, 0)))
        listener.settimeout(5)
        with listener:
            client = (client_of or self.guest).inside(lambda: socket.create_connection(listener.getsockname(), 5))
            with client:
                server, address = listener.accept()
                with server:
                    client.sendall(b"through the gateway")
                    assert server.recv(64) == b"through the gateway"
        return str(address[0])

    def routed_packets(self) -> int:
        """Packets that the router has passed on."""
        names, values = (
            line.split() for line in self.router.run("cat", "/proc/net/snmp").splitlines() if line.startswith("Ip:")
        )
        return int(values[names.index("ForwDatagrams")])
