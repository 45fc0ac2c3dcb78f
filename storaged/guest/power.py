"""Turning the machine off: through logind, or by hand as process 1."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from storaged.errors import Kind, StoragedError

log = logging.getLogger(__name__)

LOGIND_S = 5.0
SYSTEMCTL_S = 10.0
TERM_S = 10.0
KILL_S = 2.0
RB_POWER_OFF = 0x4321FEDC
MS_REMOUNT, MS_RDONLY = 32, 1
KEPT = ("/", "/proc", "/sys", "/dev", "/run")
"""Mounts that the last steps need, or that have nothing to lose."""


class Power(Protocol):
    """The machine's power."""

    @property
    def last(self) -> bool:
        """True when `power_off` ends every process at once: whoever calls it must have closed everything."""

    def check(self) -> None:
        """Raise StoragedError when `power_off` could not work; changes nothing."""

    def sync(self) -> None:
        """Everything written is durable."""

    def power_off(self) -> None:
        """Turn the machine off, or have it turned off soon."""


class LogindPower:
    """Asks systemd-logind over the system bus."""

    last = False

    def __init__(self, bus: str = "SYSTEM") -> None:
        self._bus = bus

    def check(self) -> None:
        answer = self._ask("CanPowerOff")
        if answer != "yes":
            raise StoragedError(f"logind would not power off: it answers {answer!r}", Kind.PRECONDITION)

    def sync(self) -> None:
        os.sync()

    def power_off(self) -> None:
        self._ask("PowerOff", interactive=False)

    def _ask(self, method: str, *, interactive: bool | None = None) -> object:
        from jeepney import DBusAddress, DBusErrorResponse, MessageType, new_method_call
        from jeepney.io.blocking import open_dbus_connection

        manager = DBusAddress("/org/freedesktop/login1", "org.freedesktop.login1", "org.freedesktop.login1.Manager")
        signature, body = ("", ()) if interactive is None else ("b", (interactive,))
        try:
            with open_dbus_connection(bus=self._bus) as connection:
                reply = connection.send_and_get_reply(
                    new_method_call(manager, method, signature, body), timeout=LOGIND_S
                )
        except (OSError, TimeoutError, DBusErrorResponse, KeyError, ValueError, RuntimeError) as error:
            raise StoragedError(f"logind cannot be asked to power off: {error}", Kind.UNAVAILABLE) from error
        if reply.header.message_type is MessageType.error:
            raise StoragedError(f"logind refused {method}: {' '.join(map(str, reply.body))}", Kind.UNAVAILABLE)
        return reply.body[0] if reply.body else None


@dataclass(frozen=True, slots=True)
class SystemctlPower:
    """Asks the service manager by its own tool, which needs no bus."""

    last: ClassVar[bool] = False

    program: str = "systemctl"
    booted: str = "/run/systemd/system"
    """There when systemd is the service manager (sd_booted(3))."""

    def check(self) -> None:
        import shutil

        if shutil.which(self.program) is None:
            raise StoragedError(f"{self.program} is not there", Kind.UNSUPPORTED)
        if not os.path.isdir(self.booted):
            raise StoragedError("systemd does not run this machine", Kind.UNSUPPORTED)

    def sync(self) -> None:
        os.sync()

    def power_off(self) -> None:
        try:
            subprocess.run(
                [self.program, "--no-block", "--no-ask-password", "poweroff"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=SYSTEMCTL_S,
                text=True,
                errors="replace",
            )
        except subprocess.CalledProcessError as error:
            raise StoragedError(
                f"{self.program} refused to power off: {error.stderr.strip()}", Kind.UNAVAILABLE
            ) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StoragedError(f"{self.program} cannot power off: {error}", Kind.UNAVAILABLE) from error


@dataclass(frozen=True, slots=True)
class FirstPower:
    """The first of several ways that works."""

    last: ClassVar[bool] = False

    ways: tuple[Power, ...]

    def check(self) -> None:
        self._first(lambda way: way.check())

    def sync(self) -> None:
        os.sync()

    def power_off(self) -> None:
        def off(way: Power) -> None:
            way.check()
            way.power_off()

        self._first(off)

    def _first(self, step: Callable[[Power], None]) -> None:
        failed: list[StoragedError] = []
        for way in self.ways:
            try:
                step(way)
            except StoragedError as error:
                failed.append(error)
            else:
                return
        raise StoragedError("; ".join(error.message for error in failed), failed[0].kind)


def _kernel_power_off() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.reboot(ctypes.c_int(RB_POWER_OFF)) != 0:
        number = ctypes.get_errno()
        raise StoragedError(f"the kernel would not power off: {os.strerror(number)}")


@dataclass(frozen=True, slots=True)
class InitPower:
    """As process 1: every process is told to end, what is mounted is let go, then the power."""

    last: ClassVar[bool] = True
    switch: Callable[[], None] = _kernel_power_off
    term_s: float = TERM_S
    kept: tuple[str, ...] = KEPT

    def check(self) -> None:
        if os.getpid() != 1:
            raise StoragedError("only process 1 may end every other one", Kind.PRECONDITION)

    def sync(self) -> None:
        os.sync()

    def power_off(self) -> None:
        self.check()  # kill(-1) from any other process would end its whole machine
        for number, within_s in ((signal.SIGTERM, self.term_s), (signal.SIGKILL, KILL_S)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, number)
            if _all_gone(within_s):
                break
            log.warning("processes are left %g s after %s", within_s, number.name)
        os.sync()
        libc = ctypes.CDLL(None, use_errno=True)
        for point in mounts_to_release(_read("/proc/self/mountinfo"), self.kept):
            if libc.umount2(os.fsencode(point), 0) != 0:
                reason = os.strerror(ctypes.get_errno())
                only_read = (
                    libc.mount(None, os.fsencode(point), None, ctypes.c_ulong(MS_REMOUNT | MS_RDONLY), None) == 0
                )
                log.warning("%s stays mounted, %s: %s", point, "read-only" if only_read else "writable", reason)
        os.sync()
        self.switch()


def mounts_to_release(mountinfo: str, kept: tuple[str, ...] = KEPT) -> list[str]:
    """Mount points in the order to unmount them, newest first; not `kept`, nor what is below /proc, /sys or /dev."""
    points = []
    for line in mountinfo.splitlines():
        words = line.split(" ")
        if len(words) < 5:
            continue
        point = words[4]
        for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            point = point.replace(code, character)
        if point not in kept and not point.startswith(("/proc/", "/sys/", "/dev/")):
            points.append(point)
    return points[::-1]


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _all_gone(within_s: float) -> bool:
    """Reap until no process but us is left; false when some are after `within_s`."""
    until = time.monotonic() + within_s
    while True:
        left = _others()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)


def _others() -> bool:
    """True while a process with memory of its own (not a kernel thread) is left besides us."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if _read(f"/proc/{name}/maps") or _read(f"/proc/{name}/cmdline"):
                    return True
    return False


def real_power() -> Power:
    """The way this process can turn its machine off."""
    return InitPower() if os.getpid() == 1 else FirstPower((LogindPower(), SystemctlPower()))
