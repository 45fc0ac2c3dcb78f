"""A mount namespace for one thread: what is mounted there nobody else sees, and it is gone with the thread."""

from __future__ import annotations

import ctypes
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache

CLONE_NEWNS = 0x00020000
MS_REC_PRIVATE = 0x4000 | 1 << 18


@cache
def why_not() -> str:
    """Why this machine cannot do it; empty when it can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("mkfs.btrfs", "mkfs.ext4", "losetup", "btrfs") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else ""


def enter() -> None:
    """Give the calling thread a mount namespace of its own; unshare(2) does not ask the other threads."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def private_thread() -> ThreadPoolExecutor:
    """One thread in a namespace of its own."""
    return ThreadPoolExecutor(1, thread_name_prefix="private", initializer=enter)
