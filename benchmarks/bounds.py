"""What a bounds query costs as chunks grow from 10 to 16,000 (16 TiB), against just going through all chunks once."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from benchmarks.measure import Goal, Row, in_turns, milliseconds, say
from storaged.resize.bounds import compute
from storaged.resize.layout import Chunk, Layout
from storaged.units import GIB, MIB, SECTOR, sector_floor

SECTION = "bounds"
PEER = "sum of used bytes"
CHUNKS = {10: None, 100: None, 1_000: Goal(10.0), 16_000: Goal(200.0)}
"""Goals in milliseconds."""
PIECES = 64
"""Of free room in each chunk of a fragmented filesystem."""
FILLS = (0.2, 0.5, 0.9)
EXTENT = 128 * MIB
METADATA_EVERY = 50


def layout(count: int, fill: float, seed: int = 1, pieces: int = 1) -> Layout:
    """A device full of chunks of 1 GiB, metadata among them, each as full as the dice say, its room in `pieces`."""
    dice = random.Random(seed)  # noqa: S311  # dice for a layout
    at = MIB
    chunks = [Chunk(0, 8 * MIB, 16384, 0, "system", (at,), 8 * MIB)]
    at += 8 * MIB
    for number in range(1, count + 1):
        if number % METADATA_EVERY == 10:
            chunks.append(Chunk(number * GIB, GIB // 4, GIB // 8, 0, "metadata", (at, at + GIB // 4), GIB // 4))
            at += GIB // 2
            continue
        used = sector_floor(int(GIB * min(max(dice.gauss(fill, 0.2), 0), 1)))
        rooms = _pieces(dice, GIB - used, pieces) if used < GIB else ()
        chunks.append(Chunk(number * GIB, GIB, used, 0, "data", (at,), GIB, rooms))
        at += GIB
    return Layout(at + 10 * GIB, at + 10 * GIB, tuple(chunks), GIB // 2)


def measure(_: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; nothing is mounted for it."""
    turns = 3 if quick else 9
    rows = [_row(f"{count} chunks", count, goal, turns) for count, goal in CHUNKS.items()]
    fragmented = {count: goal for count, goal in CHUNKS.items() if goal is not None}
    return rows + [
        _row(f"{count} chunks, {PIECES} pieces of room in each", count, goal, turns, PIECES)
        for count, goal in fragmented.items()
    ]


def _pieces(dice: random.Random, room: int, count: int) -> tuple[int, ...]:
    sectors = room // SECTOR
    ends = sorted({0, sectors, *(dice.randrange(sectors) for _ in range(count - 1))})
    return tuple((end - start) * SECTOR for start, end in itertools.pairwise(ends))


def _row(name: str, count: int, goal: Goal | None, turns: int, pieces: int = 1) -> Row:
    say(f"bounds of {name}")
    row = Row(SECTION, name, "ms", PEER, goal)
    for fill in FILLS:
        picture = layout(count, fill, pieces=pieces)

        def ours(picture: Layout = picture) -> None:
            row.ours.append(milliseconds(lambda: compute(picture, lambda _: EXTENT)))

        def peer(picture: Layout = picture) -> None:
            row.peer.append(milliseconds(lambda: sum(chunk.used for chunk in picture.chunks)))

        for turn in range(turns):
            in_turns(turn, ours, peer)
    return row
