"""Capacity events: the kernel tells when a block device has grown or shrunk."""

from __future__ import annotations

from collections.abc import Callable

import pyudev


class CapacityMonitor:
    """Kernel events of one block device (`major:minor`). Watch `fileno()`, call `drain()` when it is readable.

    The kernel's own source, not udev's: a guest need not run a udev daemon.
    """

    def __init__(self, device_name: str, changed: Callable[[], None]) -> None:
        self._device = device_name
        self._changed = changed
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        self._monitor.filter_by(subsystem="block")
        self._monitor.start()

    def fileno(self) -> int:
        """The netlink socket's descriptor."""
        fd: int = self._monitor.fileno()
        return fd

    def drain(self) -> None:
        """Read every event that is there; calls back once if any says that our device was resized."""
        resized = False
        while (device := self._monitor.poll(timeout=0)) is not None:
            number = device.device_number
            name = f"{number >> 8 & 0xFFF | number >> 32 & ~0xFFF}:{number & 0xFF | number >> 12 & ~0xFF}"
            resized |= name == self._device and device.properties.get("RESIZE") == "1"
        if resized:
            self._changed()
