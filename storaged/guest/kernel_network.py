"""The machine's network, or that of one network namespace, behind `guest.network.NetworkPort`."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from storaged.errors import StoragedError
from storaged.guest import network_worker
from storaged.guest.network import Ipv4Plan
from storaged.guest.network_worker import Order

log = logging.getLogger(__name__)


class KernelNetwork:
    """Speaks netlink in a short-lived process. `namespace` is a file such as /run/netns/NAME; empty: our own."""

    def __init__(
        self, *, timeout_s: float = 10.0, namespace: str = "", sysctl: str = "/proc/sys", proc: str = "/proc"
    ) -> None:
        self._timeout_s = timeout_s
        self._namespace = namespace
        self._sysctl = sysctl
        self._proc = proc

    def configure(self, interface: str, plan: Ipv4Plan) -> None:
        network = plan.address.network
        self._run(
            Order(
                interface,
                self._sysctl,
                self._namespace,
                address=str(plan.address.ip),
                prefix_length=network.prefixlen,
                broadcast=str(network.broadcast_address) if network.prefixlen < 31 else "",
                gateway=str(plan.gateway),
            )
        )

    def renew_ipv6(self, interface: str) -> None:
        self._run(Order(interface, self._sysctl, self._namespace))

    def _run(self, order: Order) -> None:
        try:
            child = subprocess.run(
                [sys.executable, "-P", "-m", network_worker.__name__],
                input=network_worker.encode(order),
                capture_output=True,
                timeout=self._timeout_s,
                check=False,
                start_new_session=True,
                cwd="/",
                # Whatever made our modules importable makes them importable there.
                env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if os.path.isabs(path))},
            )
        except subprocess.TimeoutExpired:  # killed, and waited for
            raise StoragedError(f"network: not done within {self._timeout_s:g} s") from None
        except OSError as error:
            raise StoragedError(f"network: the netlink process could not be started: {error.strerror}") from error
        answer = _answer(child.stdout)
        if answer is None:
            what = f"the netlink process ended with status {child.returncode}"
            log.error("%s: %s", what, child.stderr.decode("utf-8", "replace"))
            raise StoragedError(f"network: {what}")
        if answer["error"] is not None:
            hint = " (CAP_NET_ADMIN is needed)" if answer["errno"] in (errno.EPERM, errno.EACCES) else ""
            raise StoragedError(f"network: {answer['error']}{hint}")

    def reload_dnsmasq(self) -> None:
        failed = None
        for pid in self._pids():
            try:
                self._hang_up(pid)
            except ProcessLookupError:
                continue  # it has just ended
            except OSError as error:
                failed = StoragedError(f"dnsmasq (process {pid}): {error.strerror}")
        if failed is not None:
            raise failed

    def _pids(self) -> Iterator[int]:
        try:
            return iter([int(name) for name in os.listdir(self._proc) if name.isdecimal()])
        except OSError as error:
            raise StoragedError(f"{self._proc}: {error.strerror}") from error

    def _hang_up(self, pid: int) -> None:
        # Held first and looked at then, so that the number cannot have passed to another process.
        held = os.pidfd_open(pid)
        try:
            with open(f"{self._proc}/{pid}/comm", "rb") as file:
                if file.read().strip() != b"dnsmasq":
                    return
            signal.pidfd_send_signal(held, signal.SIGHUP)
        except FileNotFoundError:
            return
        finally:
            os.close(held)


def _answer(text: bytes) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        return None  # it died
    return answer
