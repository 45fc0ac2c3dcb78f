"""What every test may rely on, and which tests this machine cannot run."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples everywhere and every time; HYPOTHESIS_PROFILE=search looks for new ones, for long.
settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@cache
def why_no_btrfs() -> str:
    """Why tests on a real btrfs cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices (/dev/loop-control)"
    missing = [tool for tool in ("mkfs.btrfs", "losetup", "mount", "umount") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    return ""


@cache
def why_no_namespaces() -> str:
    """Why tests in namespaces of their own cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("unshare", "nsenter", "ip", "setpriv") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("root") and (reason := why_no_namespaces()):
            item.add_marker(pytest.mark.skip(reason=f"root: {reason}"))
        if item.get_closest_marker("btrfs") and (reason := why_no_btrfs()):
            item.add_marker(pytest.mark.skip(reason=f"btrfs: {reason}"))
