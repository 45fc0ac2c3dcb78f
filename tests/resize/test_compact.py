"""What is worth rewriting."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from storaged.btrfs.swap import swap_files
from storaged.resize.bounds import compute
from storaged.resize.compact import empty_chunks, metadata_is_safe, next_chunk
from storaged.resize.layout import Chunk, Layout
from storaged.units import GIB, MIB

LENGTH = 128 * MIB


def data(start: int, used: int, balloon: int = 0) -> Chunk:
    """A data chunk in slot `start` whose free room is in one piece."""
    at = 300 * MIB + start * LENGTH
    rooms = (LENGTH - used,) if used < LENGTH else ()
    return Chunk(at, LENGTH, used, balloon, "data", (at,), LENGTH, rooms)


METADATA = Chunk(MIB, 256 * MIB, 32 * MIB, 0, "metadata", (MIB,), 256 * MIB)


def layout(*chunks: Chunk) -> Layout:
    """A disk just large enough for four data chunks."""
    return Layout(300 * MIB + 4 * LENGTH, 8 * GIB, (METADATA, *chunks))


def test_the_one_that_costs_least_comes_first_and_none_comes_twice() -> None:
    picture = layout(data(0, 90 * MIB), data(1, 40 * MIB), data(2, 70 * MIB), data(3, 0))
    tried: set[int] = set()
    order = []
    while (chunk := next_chunk(picture, tried)) is not None:
        order.append(chunk.used // MIB)
        tried.add(chunk.logical)
    assert order == [40, 70, 90]


def test_full_chunks_and_those_with_nowhere_to_go_stay() -> None:
    assert next_chunk(layout(data(0, LENGTH), data(1, LENGTH), data(2, 0)), ()) is None
    assert next_chunk(layout(*(data(n, 120 * MIB) for n in range(4))), ()) is None


def test_the_balloon_alone_is_not_rewritten() -> None:
    assert next_chunk(layout(data(0, 100 * MIB, 100 * MIB), data(1, 0), data(2, LENGTH)), ()) is None


def test_nothing_is_rewritten_when_metadata_is_short_or_mixed() -> None:
    picture = layout(*(data(number, 40 * MIB) for number in range(4)))
    assert next_chunk(picture, ()) is not None
    full = replace(METADATA, used=METADATA.length - MIB)
    mixed = replace(METADATA, kind="mixed")
    for other in (full, mixed):
        assert not metadata_is_safe(replace(picture, chunks=(other, *picture.chunks[1:])))
        assert next_chunk(replace(picture, chunks=(other, *picture.chunks[1:])), ()) is None


def test_what_an_active_swap_file_pins_is_neither_rewritten_nor_cut_away() -> None:
    pinned = replace(data(2, 40 * MIB), pinned=True)
    picture = layout(data(0, 90 * MIB), pinned, data(1, 60 * MIB))
    assert next_chunk(picture, {data(1, 0).logical, data(0, 0).logical}) is None
    bounds = compute(picture, lambda _: MIB)
    assert bounds.minimum == pinned.top
    free = replace(picture, chunks=tuple(replace(chunk, pinned=False) for chunk in picture.chunks))
    assert compute(free, lambda _: MIB).minimum < pinned.top


def test_swap_files_are_told_from_devices_and_their_names_from_octal() -> None:
    text = (
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/vdb                                partition\t1048572\t\t0\t\t-2\n"
        "/mnt/swap\\040file                      file\t\t16380\t\t0\t\t0\n"
        "/mnt/plain                              file\t\t16380\t\t0\t\t-3\n"
    )
    assert swap_files(text) == ["/mnt/swap file", "/mnt/plain"]
    assert swap_files("") == []


def test_metadata_that_is_short_is_safe_where_another_chunk_of_it_has_room() -> None:
    full = replace(METADATA, used=METADATA.length - MIB)
    roomy = layout(data(0, 40 * MIB), data(1, 40 * MIB))
    assert metadata_is_safe(replace(roomy, chunks=(full, *roomy.chunks[1:])))


def test_empty_chunks_are_seen_only_beside_a_used_one() -> None:
    assert empty_chunks(layout(data(0, MIB), data(1, 0)))
    assert not empty_chunks(layout(data(0, 0), data(1, 0)))
    assert not empty_chunks(layout(data(0, MIB)))


@given(st.lists(st.integers(0, LENGTH // MIB), max_size=4), st.sets(st.integers(0, 3)))
def test_what_is_chosen_has_data_and_fits_elsewhere(used: list[int], tried: set[int]) -> None:
    picture = layout(*(data(number, size * MIB) for number, size in enumerate(used)))
    chunk = next_chunk(picture, {300 * MIB + number * LENGTH for number in tried})
    if chunk is not None:
        gap = 43 * MIB  # between metadata and the first slot
        others = sum(LENGTH - size * MIB for size in used) - (LENGTH - chunk.used) + (4 - len(used)) * LENGTH + gap
        assert 0 < chunk.held <= others
        assert (chunk.logical - 300 * MIB) // LENGTH not in tried
