"""What a virtual machine is made of, and why it cannot be made here."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "vm"
GUEST = Path(__file__).parent / "guest"
VSOCK = BUILD / "vsock" / "usr" / "bin" / "vhost-device-vsock"
GUEST_PYTHON = (3, 11)
"""Of the Debian release in the guest: the compiled wheels must fit."""
PROGRAMS = ("qemu-system-x86_64", "mkfs.ext4", "mkfs.btrfs", "modprobe", "depmod", "ldconfig", "dpkg-deb")


def why_not() -> str:
    """Why no virtual machine can run here; empty when one can."""
    if os.geteuid() != 0:
        return "needs root, for the image and for loop devices"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not (BUILD / "got").exists():
        missing.append("build/vm (tools/vm.sh makes it)")
    if missing:
        return f"needs {', '.join(missing)}"
    if sys.version_info[:2] != GUEST_PYTHON:
        return f"needs Python {GUEST_PYTHON[0]}.{GUEST_PYTHON[1]}, as the guest has"
    return ""


def kernel() -> Path:
    """The kernel's image."""
    (found,) = (BUILD / "kernel" / "boot").glob("vmlinuz-*")
    return found


def kernel_release() -> str:
    """Its name, as uname says it."""
    return kernel().name.removeprefix("vmlinuz-")


if __name__ == "__main__" and (reason := why_not()):
    print(reason)
