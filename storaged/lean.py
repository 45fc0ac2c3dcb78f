"""Imported before anything that imports asyncio, which imports ssl if it can and works without it.

4 MB resident that a daemon with gRPC's own TLS never uses.
"""

from __future__ import annotations

import sys

if "asyncio" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    import asyncio  # noqa: F401

    del sys.modules["ssl"]
