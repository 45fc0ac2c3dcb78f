"""A host's disk that is small, for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.loop import host_disk, workspace
from storaged.units import GIB


@pytest.fixture
def pool() -> Iterator[Path]:
    """An ext4 of 3 GiB, mounted."""
    with workspace() as directory:
        yield host_disk(directory, 3 * GIB)
