"""Random filesystems for a gate: every way a guest's disk may have come to look, from a seed."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from dataclasses import dataclass
from pathlib import Path

import btrfsutil

from lab.loop import Guest
from lab.recovery import digest_of
from storaged.btrfs import ioctl
from storaged.units import GIB, MIB

FICLONE = 0x40049409  # _IOW(0x94, 9, int)
MOST_SMALL = 4000


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one layout is made of; `limit` is what a balloon leaves to applications, None without one."""

    seed: int
    size: int
    mkfs: tuple[str, ...]
    mount: str
    fill: float
    large_share: float
    deleted: float
    rounds: int
    snapshots: int
    reflinks: bool
    preallocated: bool
    limit: int | None

    def __str__(self) -> str:
        traits = [f"{self.size // MIB} MiB", " ".join(self.mkfs) or "dup 16K", f"fill {self.fill:.0%}"]
        traits += [f"deleted {self.deleted:.0%}"] if self.deleted else []
        traits += [f"{self.snapshots} snapshots"] if self.snapshots else []
        traits += [self.mount] if self.mount else []
        traits += ["reflinks"] if self.reflinks else []
        traits += ["preallocated"] if self.preallocated else []
        traits += [f"balloon leaves {self.limit // MIB} MiB"] if self.limit is not None else []
        return f"seed {self.seed}: " + ", ".join(traits)


def recipe(seed: int, most: int = 8 * GIB) -> Recipe:
    """The recipe of `seed`; filesystems of 512 MiB to `most`."""
    dice = random.Random(seed)
    sizes = [size for size in (GIB // 2, 3 * GIB // 4, GIB, 3 * GIB // 2, 2 * GIB, 4 * GIB, 8 * GIB) if size <= most]
    size = dice.choice(sizes)
    mixed = size <= GIB and dice.random() < 0.1
    node = dice.choice([(), ("-n", "4096")])
    mkfs = ("--mixed",) if mixed else (*node, *dice.choice([(), ("-m", "single")]))
    return Recipe(
        seed=seed,
        size=size,
        mkfs=mkfs,
        mount=dice.choice(["", "", "", "compress-force=zstd:1", "nodatacow"]),
        fill=dice.choice([0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97]),
        large_share=dice.choice([0.5, 0.9, 1.0]),
        deleted=dice.choice([0.0, 0.2, 0.5, 0.8]),
        rounds=dice.choice([1, 1, 2, 3]),
        snapshots=dice.choice([0, 0, 1, 3]),
        reflinks=dice.random() < 0.25,
        preallocated=dice.random() < 0.25,
        limit=dice.choice([None, None, 0, size // 20, size // 4]),
    )


def build(guest: Guest, plan: Recipe) -> None:
    """Fill the guest's filesystem as the recipe says; running out of room on the way is part of it."""
    dice = random.Random(plan.seed + 1)
    root = guest.mountpoint
    for turn in range(plan.rounds):
        with contextlib.suppress(OSError):
            _write(root, plan, dice, turn)
        os.sync()
        if turn < plan.snapshots:
            with contextlib.suppress(btrfsutil.BtrfsUtilError):
                btrfsutil.create_snapshot(str(root), str(root / f"snapshot{turn}"))
        for path in sorted(root.iterdir()):
            if path.is_file() and dice.random() < plan.deleted:
                path.unlink()
        os.sync()
    for number in range(plan.rounds, plan.snapshots):
        with contextlib.suppress(btrfsutil.BtrfsUtilError):
            btrfsutil.create_snapshot(str(root), str(root / f"snapshot{number}"))
    os.sync()


def _write(root: Path, plan: Recipe, dice: random.Random, turn: int) -> None:
    todo = int(plan.size * plan.fill / plan.rounds)
    large = int(todo * plan.large_share)
    number = 0
    while large > 0:
        part = min(dice.choice([MIB, 8 * MIB, 64 * MIB, 300 * MIB]), large)
        path = root / f"large{turn}-{number}"
        if plan.preallocated and dice.random() < 0.3:
            _preallocate(path, part)
        else:
            _data(path, part, dice)
        if plan.reflinks and dice.random() < 0.5:
            _clone(path, root / f"clone{turn}-{number}")
        large -= part
        number += 1
    small = todo - int(todo * plan.large_share)
    for number in range(MOST_SMALL):
        if small <= 0:
            break
        part = dice.choice([100, 1500, 5000, 40_000, 200_000])
        _data(root / f"small{turn}-{number}", part, dice)
        small -= max(part, 4096)


def _data(path: Path, size: int, dice: random.Random) -> None:
    block = dice.randbytes(min(size, MIB))
    with path.open("wb") as file:
        for at in range(0, size, MIB):
            file.write(block[: min(MIB, size - at)])


def _preallocate(path: Path, size: int) -> None:
    with path.open("wb") as file:
        ioctl.fallocate(file.fileno(), 0, 0, size)
        file.write(b"begun")


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        try:
            ioctl.call(new.fileno(), FICLONE, old.fileno())
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def fingerprints(root: Path, *, leave_out: str = "") -> dict[str, str]:
    """SHA-256 of every file below `root`, or why it cannot be read; snapshots included, the balloon not."""
    found = {}
    for directory, folders, names in os.walk(root):
        if ".storaged-balloon" in folders:
            folders.remove(".storaged-balloon")
        for name in names:
            path = Path(directory) / name
            if (at := str(path.relative_to(root))) != leave_out:
                found[at] = digest_of(path)
    return found
