"""The metrics say what the daemon believes, and nothing else."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from storaged.metrics.collector import StorageCollector
from storaged.resize.job import JobState
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB
from tests.metrics.support import written
from tests.rpc.conftest import Guest, refused, until


class Scraper:
    """What Prometheus would read."""

    def __init__(self, guest: Guest) -> None:
        self._collector = StorageCollector(guest.service)

    def read(self) -> dict[str, float]:
        """Value by name and labels, as in `storaged_balloon_state{state="idle"}`."""
        found = {}
        for family in text_string_to_metric_families(written(self._collector)):
            for sample in family.samples:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = float(sample.value)
        return found


async def test_they_agree_with_the_report(guest: Guest) -> None:
    scraper = Scraper(guest)
    guest.disk.write(GIB)
    await guest.report_free(2 * GIB, vm.DISK_LOW)
    report, found = await guest.report(), scraper.read()
    balloon, fs = report.balloon, report.filesystem
    assert found["storaged_host_free_bytes"] == 2 * GIB
    assert found["storaged_balloon_size_bytes"] == balloon.size_bytes == guest.world.balloon.size()
    assert found["storaged_balloon_target_bytes"] == balloon.target_bytes
    assert found["storaged_balloon_adjusted_bytes_total{direction=inflate}"] == balloon.inflated_bytes_total
    assert found["storaged_balloon_adjusted_bytes_total{direction=deflate}"] == balloon.deflated_bytes_total
    assert found["storaged_filesystem_size_bytes"] == fs.size_bytes
    assert found["storaged_btrfs_unallocated_bytes"] == fs.unallocated_bytes
    assert found["storaged_filesystem_available_bytes"] == fs.available_bytes
    assert found["storaged_disk_pressure{state=low}"] == 1
    assert sum(value for name, value in found.items() if name.startswith("storaged_disk_pressure{")) == 1
    assert found["storaged_balloon_state{state=idle}"] == 1
    assert found["storaged_resize_state{state=none}"] == 1


async def test_reports_are_counted_by_what_came_of_them(guest: Guest) -> None:
    scraper = Scraper(guest)
    assert scraper.read()["storaged_disk_pressure{state=none}"] == 1
    await guest.report_free(3 * GIB)
    await guest.report_free(-1, vm.DISK_NONE)
    guest.disk.exclusive_operation = "balance"
    await guest.report_free(2 * GIB)
    found = scraper.read()
    assert found["storaged_balloon_updates_total{result=success}"] == 1
    assert found["storaged_balloon_updates_total{result=ignored}"] == 1
    assert found["storaged_balloon_updates_total{result=failed}"] >= 1
    assert found["storaged_balloon_state{state=failed}"] == 1


async def test_jobs_are_counted_by_direction_and_end(guest: Guest) -> None:
    scraper = Scraper(guest)
    await guest.resize(12 * GIB)
    await until(guest.idle)
    await guest.resize(4 * GIB)
    await until(guest.idle)
    await guest.resize(20 * GIB)
    running = scraper.read()
    assert running["storaged_resize_state{state=waiting_for_capacity}"] == 1
    assert running["storaged_resize_target_bytes"] == 20 * GIB
    await guest.storage.CancelResize(pb.CancelResizeRequest())
    found = scraper.read()
    assert found["storaged_resize_jobs_total{direction=grow,outcome=success}"] == 1
    assert found["storaged_resize_jobs_total{direction=shrink,outcome=success}"] == 1
    assert found["storaged_resize_jobs_total{direction=grow,outcome=cancelled}"] == 1
    assert found["storaged_resize_jobs_total{direction=shrink,outcome=failed}"] == 0
    assert "storaged_resize_target_bytes" not in found
    states = {name for name in found if name.startswith("storaged_resize_state{")}
    assert len(states) == len(JobState) + 1


async def test_a_scrape_never_waits_for_the_disk(guest: Guest) -> None:
    scraper = Scraper(guest)
    guest.disk.faults.hang("space")
    waiting = asyncio.ensure_future(guest.report_free(3 * GIB))
    await asyncio.sleep(0.02)
    assert scraper.read()["storaged_balloon_state{state=inflating}"] == 1
    guest.disk.faults.clear()
    await waiting


async def test_what_is_refused_counts_nowhere(guest: Guest) -> None:
    scraper = Scraper(guest)
    before = scraper.read()
    await refused(guest.report_free(GIB, 99))
    await refused(guest.resize(0))
    assert scraper.read() == before
