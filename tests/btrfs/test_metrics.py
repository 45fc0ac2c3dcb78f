"""Through a whole run the metrics say what the filesystem itself says."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest

from demo.world import free_port
from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, MIB, SECTOR
from tests.btrfs.conftest import MakeDaemon, MakeGuest
from tests.btrfs.support import Figures, available, held, report_for, sync
from tests.dashboards.live import real
from tests.metrics.support import get, samples

pytestmark = pytest.mark.btrfs
SETTLES_WITHIN_S = 5.0
HANGS_S = 0.9
"""The hundred scrapes take longer than this altogether: one that waited for the disk would wait for all of it."""
FILE = 256 * MIB


class Scraped:
    """One scrape."""

    def __init__(self, address: str) -> None:
        self._found = samples(get(address)[1])

    def __call__(self, name: str, **labels: str) -> float:
        return self._found[f"storaged_{name}", *sorted(labels.items())]


def size_on_disk(guest: Guest) -> int:
    """The filesystem's size as btrfs-progs reads it from the kernel."""
    line = next(
        line for line in run("btrfs", "filesystem", "show", "--raw", guest.mountpoint).splitlines() if "devid" in line
    )
    return int(line.split("size")[1].split()[0])


def unallocated(guest: Guest) -> int:
    """As btrfs-progs counts."""
    usage = run("btrfs", "filesystem", "usage", "--raw", guest.mountpoint)
    return int(next(line.split()[-1] for line in usage.splitlines() if "Device unallocated" in line))


def device_written(guest: Guest) -> int:
    """Bytes that reached the guest's disk."""
    return int(Path(f"/sys/block/{Path(guest.device).name}/stat").read_text(encoding="ascii").split()[6]) * 512


def agree(guest: Guest, address: str) -> Scraped:
    """Compare every value with the filesystem's own; what was scraped. A write-back under way may need a moment."""
    until = time.monotonic() + SETTLES_WITHIN_S
    while True:
        sync(guest)
        seen = Scraped(address)
        pairs = {
            "size": (seen("filesystem_size_bytes"), size_on_disk(guest), 0),
            "balloon": (seen("balloon_size_bytes"), held(guest), 0),
            "available": (seen("filesystem_available_bytes"), available(guest), 4 * MIB),
            "unallocated": (seen("btrfs_unallocated_bytes"), unallocated(guest), 2 * MIB),
        }
        wrong = {name: values for name, values in pairs.items() if abs(values[0] - values[1]) > values[2]}
        if not wrong:
            return seen
        assert time.monotonic() < until, wrong
        time.sleep(0.1)


def test_metrics_agree_with_the_filesystem_through_a_run(
    make_guest: MakeGuest, make_daemon: MakeDaemon, figures: Figures
) -> None:
    guest = make_guest(8 * GIB)
    address = f"127.0.0.1:{free_port()}"
    daemon = make_daemon(guest, "--metrics", address)
    agree(guest, address)

    for number in range(10):
        fill(guest.mountpoint / f"file{number}", FILE)
    agree(guest, address)

    assert daemon.report_free(report_for(2 * GIB)) == vm_guest_pb2.SUCCESS
    seen = agree(guest, address)
    assert seen("balloon_state", state="idle") == 1
    assert seen("host_free_bytes") == report_for(2 * GIB)
    assert abs(seen("balloon_size_bytes") - seen("balloon_target_bytes")) <= MIB
    assert seen("balloon_adjusted_bytes_total", direction="inflate") >= held(guest)
    assert seen("balloon_reaction_seconds_count") == seen("balloon_updates_total", result="success") == 1

    assert daemon.report_free(report_for(5 * GIB)) == vm_guest_pb2.SUCCESS
    seen = agree(guest, address)
    inflated, deflated = (seen("balloon_adjusted_bytes_total", direction=way) for way in ("inflate", "deflate"))
    assert inflated - deflated == held(guest)

    for number in range(0, 10, 2):
        (guest.mountpoint / f"file{number}").unlink()
    sync(guest)
    cost = os.stat(guest.image).st_blocks
    reclaimed = agree(guest, address)("reclaimed_bytes_total")
    assert run_trim(daemon) == agree(guest, address)("reclaimed_bytes_total") - reclaimed
    assert os.stat(guest.image).st_blocks < cost

    assert daemon.report_free(report_for(64 * GIB)) == vm_guest_pb2.SUCCESS
    minimum = daemon.minimum()
    assert Scraped(address)("filesystem_min_size_bytes") == minimum
    target = max(minimum, (daemon.report().bounds.guaranteed_size - GIB) // SECTOR * SECTOR)
    before = device_written(guest)
    daemon.resize(target)
    while daemon.status().resize_in_progress:
        seen = Scraped(address)
        assert target <= seen("filesystem_size_bytes") <= 8 * GIB
        assert size_on_disk(guest) <= 8 * GIB
        time.sleep(0.05)
    sync(guest)
    written = device_written(guest) - before
    seen = agree(guest, address)
    assert seen("filesystem_size_bytes") == target
    assert seen("resize_jobs_total", direction="shrink", outcome="success") == 1
    assert seen("resize_state", state="done") == 1
    moved = seen("resize_moved_bytes_total")
    figures.note(shrink_to=target, moved=moved, written_to_the_disk=written)
    assert 0.5 * written <= moved <= written, "what is said to have moved was written to the disk"
    assert moved >= 16 * MIB, "the layout was to leave something to move"


def run_trim(daemon: Daemon) -> int:
    """Trim by request; bytes."""
    return daemon.storage.Trim(storaged_v1_pb2.TrimRequest(), timeout=20).trimmed_bytes


def test_a_filesystem_that_was_forced_read_only_is_told(make_guest: MakeGuest, make_daemon: MakeDaemon) -> None:
    guest = make_guest(2 * GIB)
    address = f"127.0.0.1:{free_port()}"
    make_daemon(guest, "--metrics", address)
    assert Scraped(address)("filesystem_read_only") == 0
    run("mount", "-o", "remount,ro", guest.mountpoint)
    assert Scraped(address)("filesystem_read_only") == 1
    run("mount", "-o", "remount,rw", guest.mountpoint)


def test_a_scrape_waits_for_no_disk_while_a_resize_runs() -> None:
    with real() as scene:
        member = scene.members[0]
        assert member.disk is not None
        for number in range(8):
            fill(member.disk.mountpoint / f"file{number}", 128 * MIB)
        for number in range(0, 8, 2):
            (member.disk.mountpoint / f"file{number}").unlink()
        os.sync()
        bounds = member.daemon.report().bounds
        member.daemon.resize(max(bounds.minimum_size, (bounds.guaranteed_size - GIB) // SECTOR * SECTOR))
        # From now on whatever needs the guest's disk hangs: the filesystem that its image lies on takes no write.
        run("fsfreeze", "--freeze", scene.pool)
        try:
            took = []
            seen = Scraped(member.metrics)
            for _ in range(100):
                began = time.perf_counter()
                seen = Scraped(member.metrics)
                took.append(time.perf_counter() - began)
                time.sleep(0.01)
            assert seen("resize_state", state="running") == 1, "it was to be caught at work"
            assert seen("filesystem_available_bytes") > 0
        finally:
            run("fsfreeze", "--unfreeze", scene.pool)
        assert statistics.median(took) < 0.025, took
        assert max(took) < HANGS_S, took
        member.daemon.wait_resized()
        assert member.daemon.report().job.state == storaged_v1_pb2.JOB_DONE, member.daemon.report().job
        assert Scraped(member.metrics)("resize_jobs_total", direction="shrink", outcome="success") == 1
