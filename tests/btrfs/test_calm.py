"""One report, one move: the balloon neither overshoots nor twitches, and costs the host nothing."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest

from lab.loop import Guest, fill
from storaged.balloon import target
from storaged.balloon.engine import BalloonEngine
from storaged.balloon.file import BtrfsBalloonFile
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.errors import FilesystemError
from storaged.rpc.proto import vm_guest_pb2
from storaged.sim import SimDisk, SimPreallocated
from storaged.units import GIB, MIB, SECTOR
from tests.btrfs import support
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import Figures, Sampler, available, held, report_for, writing

pytestmark = pytest.mark.btrfs
UNSETTLED = 2 * MIB  # what a writer may move between two looks


@pytest.mark.parametrize("rate", [0, 20 * MIB, 200 * MIB])
def test_no_report_inflates_twice(rate: int, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures) -> None:
    guest = make_guest(4 * GIB)
    fill(guest.mountpoint / "data", 100 * MIB)
    daemon = make_daemon(guest)
    chunk = daemon.report().filesystem.data_chunk_bytes
    for limit in (3 * GIB, 2 * GIB, GIB, 600 * MIB):
        if rate:
            with writing(guest, rate), Sampler(lambda: held(guest)) as seen:
                assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
        else:
            with Sampler(lambda: held(guest)) as seen:
                assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
        final = held(guest)
        figures.note(rate=rate, limit=limit, final=final, most=max(seen.values), samples=seen.samples)
        assert seen.samples > 2
        assert max(seen.values) <= final + chunk


def test_the_same_report_again_moves_nothing(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(2 * GIB)
    support.half_holes(guest, 60 * MIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(400 * MIB)) == vm_guest_pb2.SUCCESS
    size, shown = held(guest), available(guest)
    for _ in range(20):
        assert daemon.report_free(report_for(400 * MIB)) == vm_guest_pb2.SUCCESS
        assert abs(held(guest) - size) <= MIB
        assert abs(available(guest) - shown) <= 2 * MIB


def _on_host(guest: Guest) -> int:
    """What the image costs its host once everything written has arrived there."""
    support.sync(guest)
    with guest.image.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_blocks * 512


@pytest.mark.parametrize("holed", [False, True])
def test_inflating_costs_the_host_nothing(
    holed: bool, make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest = make_guest(4 * GIB)
    if holed:
        support.half_holes(guest, 60 * MIB)
    daemon = make_daemon(guest)
    # The first one makes the subvolume, and what the kernel writes once.
    assert daemon.report_free(report_for(3 * GIB)) == vm_guest_pb2.SUCCESS
    for limit in (2 * GIB, GIB, 100 * MIB, 0):
        before = _on_host(guest)
        assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
        grown = _on_host(guest) - before
        figures.note(holed=holed, limit=limit, host_growth=grown)
        # Its extents lie in trees that are copied on write; between them, the kernel's discards are late.
        assert grown <= (4 * MIB if holed else MIB)


def test_deflating_gives_all_of_it_back_step_by_step(
    make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    # Punching a part out of an extent frees nothing until all of the extent is punched.
    guest = make_guest(4 * GIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(0)) == vm_guest_pb2.SUCCESS
    moved = daemon.report().balloon.deflated_bytes_total
    for limit in range(8 * MIB, 120 * MIB, 8 * MIB):
        with Sampler(lambda: available(guest)) as seen:
            assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
        figures.note(deflate_to=limit, shown=available(guest), most=max(seen.values))
        assert limit - 2 * MIB <= available(guest) <= limit + 16 * MIB
    moved = daemon.report().balloon.deflated_bytes_total - moved
    figures.note(deflated_for_112_mib=moved)


def test_what_the_balloon_leaves_behind_is_nobodys_data(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    # The bound must not know how often the balloon went up and down: nobody has written a byte.
    guest = make_guest(4 * GIB)
    daemon = make_daemon(guest)
    assert daemon.report_free(report_for(0)) == vm_guest_pb2.SUCCESS
    fresh = daemon.minimum()
    for limit in (2 * GIB, 100 * MIB, 300 * MIB, 130 * MIB, GIB, 900 * MIB):
        assert daemon.report_free(report_for(limit)) == vm_guest_pb2.SUCCESS
    report = daemon.report()
    assert report.filesystem.data_used_bytes - held(guest) <= MIB, "pinned by the balloon, but not seen in it"
    assert report.bounds.minimum_size <= fresh, report.bounds.why


def test_a_short_balance_is_waited_for(make_guest: MakeGuest) -> None:
    # The kernel's own chunk reclaim takes the exclusive slot now and then, and so does storaged's at a new level.
    guest = make_guest(2 * GIB)
    filesystem, other = BtrfsFilesystem(str(guest.mountpoint)), BtrfsFilesystem(str(guest.mountpoint))
    balloon = BtrfsBalloonFile(str(guest.mountpoint))
    done = threading.Event()
    balances = 0

    def balance() -> None:
        nonlocal balances
        while not done.wait(0.01):
            with contextlib.suppress(FilesystemError):
                other.reclaim_empty_chunks()
                balances += 1

    thread = threading.Thread(target=balance)
    thread.start()
    try:
        engine = BalloonEngine(filesystem, balloon, SimPreallocated(SimDisk()))
        for limit in (0, GIB, 300 * MIB, 900 * MIB, 100 * MIB) * 8:
            engine.hold(limit)
            # A chunk that is being balanced counts as no room meanwhile.
            support.until(lambda limit=limit: abs(filesystem.space().available - limit) <= 250 * MIB, within_s=5)  # type: ignore[misc]
    finally:
        done.set()
        thread.join()
        balloon.close()
        filesystem.close()
        other.close()
    assert balances


def test_it_comes_to_rest(make_guest: MakeGuest) -> None:
    guest = make_guest(2 * GIB)
    filesystem, balloon = BtrfsFilesystem(str(guest.mountpoint)), BtrfsBalloonFile(str(guest.mountpoint))
    try:
        assert filesystem.space().metadata_readonly, "a copy of the superblock lies in a metadata chunk"
        engine = BalloonEngine(filesystem, balloon, SimPreallocated(SimDisk()))
        engine.hold(300 * MIB)
        support.until(lambda: not engine.hold(300 * MIB, fresh=False).again, within_s=5)
    finally:
        balloon.close()
        filesystem.close()


def test_a_new_segment_is_seen_at_once(make_guest: MakeGuest) -> None:
    guest = make_guest(4 * GIB)
    balloon = BtrfsBalloonFile(str(guest.mountpoint))
    try:
        for size in (100 * MIB, GIB, 3 * GIB):
            balloon.extend(size - balloon.size())
            assert abs(balloon.size() - size) <= MIB
    finally:
        balloon.close()


def test_pieces_that_fit_make_no_chunk(make_guest: MakeGuest) -> None:
    guest = make_guest(2 * GIB)
    filesystem, balloon = BtrfsFilesystem(str(guest.mountpoint)), BtrfsBalloonFile(str(guest.mountpoint))
    try:
        balloon.extend(600 * MIB)  # its extents, and what lies between them: pieces of all sizes
        sizes = [23, 5, 60, 31, 2, 47, 90, 11, 70, 38, 8, 55]
        for index, size in enumerate(sizes):
            fill(guest.mountpoint / f"{index}", size * MIB)
        support.sync(guest)
        for index in range(0, len(sizes), 2):
            (guest.mountpoint / f"{index}").unlink()
        support.sync(guest)
        filesystem.trim()  # or the kernel's own discards hide a piece at the moment at which it is wanted
        before = filesystem.space()
        rooms = [room for chunk in filesystem.layout().chunks for room in chunk.rooms]
        pieces, left = target.pieces(before.data_free // SECTOR * SECTOR, rooms)
        assert len(pieces) >= 4, rooms
        for piece in pieces:
            balloon.extend(piece)
        support.sync(guest)
        after = filesystem.space()
        assert after.data_free == left
        assert after.data_total == before.data_total
    finally:
        balloon.close()
        filesystem.close()


def test_every_thread_sees_the_same_balloon(make_guest: MakeGuest) -> None:
    # The guard asks for the size while a resize looks at the extents: neither may see half of the segments.
    guest = make_guest(4 * GIB)
    balloon = BtrfsBalloonFile(str(guest.mountpoint))
    try:
        balloon.extend(3 * GIB)
        size, seen = held(guest), {balloon.size() for _ in range(3)} & {held(guest)}
        until = time.monotonic() + 1.5

        def look() -> None:
            while time.monotonic() < until:
                seen.add(balloon.size())

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == {size}
    finally:
        balloon.close()
