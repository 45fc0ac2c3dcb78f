"""Trimming while an application writes to the last byte: what was accepted is kept."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.loop import Guest
from storaged.btrfs import ioctl
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.units import GIB, MIB
from tests.btrfs.conftest import MakeGuest

pytestmark = [pytest.mark.btrfs, pytest.mark.once]
FILE = 8 * MIB


@dataclass(slots=True)
class Figures:
    """What an application met: honest refusals, and writes that were accepted and then lost."""

    refused: int = 0
    lost: int = 0
    trimmed: int = 0


def at_the_edge(root: Path, figures: Figures, over: Callable[[], bool]) -> None:
    """Write durable files until there is no room, delete four, and on."""
    dice = random.Random(1)
    kept: list[Path] = []
    number = 0
    while not over():
        number += 1
        path, accepted = root / f"file{number}", False
        try:
            with path.open("wb", buffering=0) as file:
                data = dice.randbytes(FILE)
                at = 0
                while at < FILE:
                    at += file.write(data[at:])
                accepted = True
                os.fsync(file.fileno())
            kept.append(path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            path.unlink(missing_ok=True)
            figures.lost += accepted
            figures.refused += not accepted
            for old in dice.sample(kept, min(len(kept), 4)):
                kept.remove(old)
                old.unlink()


def under_trims(guest: Guest, trim: Callable[[BtrfsFilesystem], int], enough: Callable[[Figures], bool]) -> Figures:
    """Both at once until there is `enough`, or for a minute."""
    figures, over = Figures(), threading.Event()
    filesystem = BtrfsFilesystem(str(guest.mountpoint))

    def again() -> None:
        while not over.is_set():
            filesystem.sync()
            figures.trimmed += trim(filesystem)

    thread = threading.Thread(target=again)
    thread.start()
    ends = time.monotonic() + 60
    try:
        at_the_edge(guest.mountpoint, figures, lambda: enough(figures) or time.monotonic() > ends)
    finally:
        over.set()
        thread.join()
        filesystem.close()
    return figures


def test_no_accepted_write_is_lost_to_a_trim(make_guest: MakeGuest) -> None:
    guest = make_guest(GIB)
    ours = under_trims(guest, BtrfsFilesystem.trim, lambda figures: figures.refused >= 15 or figures.lost > 0)
    assert ours.lost == 0
    assert ours.refused
    assert ours.trimmed
    for path in guest.mountpoint.iterdir():
        path.unlink()
    # The same with the kernel's call as it is: else the test could not fail.
    kernels = under_trims(guest, lambda filesystem: ioctl.trim(filesystem.fd), lambda figures: figures.lost > 0)
    if not kernels.lost:
        pytest.skip("this kernel lost nothing under FITRIM in a minute: nothing to guard against")
