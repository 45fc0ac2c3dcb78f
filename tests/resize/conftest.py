"""Guests that more than one file of tests begins with."""

from __future__ import annotations

import pytest

from tests.resize.guest import Guest


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def topped(guest: Guest) -> Guest:
    """Full data chunks, and above them metadata in a chunk much longer than it need be."""
    guest.disk.write(2 * guest.disk.data_chunk)
    metadata = guest.disk.of("metadata")[0]
    at = metadata.start
    for chunk in guest.disk.of("data"):
        chunk.start, at = at, at + chunk.length
    metadata.start = at
    return guest
