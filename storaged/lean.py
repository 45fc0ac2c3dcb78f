"""Imported before anything that imports asyncio, which imports ssl if it can and works without it.

4 MB resident that a daemon with gRPC's own TLS never uses. And one heap for all threads: glibc gives every thread that
allocates one of its own, which saves no time where one interpreter's lock lets one thread run, and takes another MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

if "asyncio" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    import asyncio  # noqa: F401

    del sys.modules["ssl"]

M_ARENA_MAX = -8
"""glibc's malloc.h; other C libraries have no such function."""
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
