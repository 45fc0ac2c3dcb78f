"""What is given back when storaged goes, whoever wrote the journal."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from storaged.app import worlds
from storaged.core.model import Config, Told
from storaged.core.ports import World
from storaged.resize.journal import FileJournal
from storaged.runtime import StorageService
from storaged.sim import SimDisk, make_world
from storaged.units import GIB
from tests.rpc.conftest import RealTime


@pytest.fixture
async def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """What a daemon left behind that was told LOW: a balloon, other write-back limits, and a journal."""
    world = make_world(SimDisk(8 * GIB), clock=RealTime())
    world = replace(world, journal=FileJournal(str(tmp_path / world.filesystem.uuid)))
    service = StorageService(world, Config())
    await service.start()
    assert await service.report(Told.LOW, 2 * GIB) == ""
    await service.stop()
    assert world.balloon.size() > 0
    monkeypatch.setattr(worlds, "real_world", lambda *_: world)
    return world


async def test_all_is_given_back(left: World, tmp_path: Path) -> None:
    held_to = left.sysctl.dirty_limits()
    said = worlds.uninstall("/", str(tmp_path))
    assert said[0] == "write-back limits restored"
    assert left.sysctl.dirty_limits() != held_to
    assert left.balloon.size() == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change", [{"version": 2}, {"limit": "much"}])
async def test_a_journal_of_another_version_keeps_no_balloon(
    left: World, tmp_path: Path, change: dict[str, object]
) -> None:
    record = left.journal.load()
    assert record is not None
    left.journal.save(record | change)
    held_to = left.sysctl.dirty_limits()
    said = worlds.uninstall("/", str(tmp_path))
    assert said[0].startswith("journal cannot be believed (")
    assert "write-back limits stay as they are" in said[0]
    assert left.sysctl.dirty_limits() == held_to
    assert "given back" in said[1]
    assert left.balloon.size() == 0
    assert os.listdir(tmp_path) == []
