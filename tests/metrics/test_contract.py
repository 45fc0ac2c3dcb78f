"""What is served is what the contract says: names, types, labels, when they are there, and how many."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from storaged.errors import FilesystemError
from storaged.metrics.collector import StorageCollector
from storaged.metrics.families import GUEST, REACTION_BUCKETS
from storaged.metrics.family import ALWAYS, Type
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB
from tests.metrics.support import OPENMETRICS, Served, promtool, samples, written
from tests.rpc.conftest import Guest, until

MOST_SERIES = 100


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    """A simulated guest of 8 GiB on a device of 16 GiB."""
    one = Guest(tmp_path, device=16 * GIB)
    await one.start()
    try:
        yield one
    finally:
        one.disk.faults.clear()
        await one.stop()


@pytest.fixture
def collector(guest: Guest) -> Iterator[StorageCollector]:
    """The guest's metrics."""
    one = StorageCollector(guest.service)
    yield one
    one.close()


async def everything(guest: Guest) -> None:
    """Bring the guest into the state with the most series: told, bounded, a job under way."""
    await guest.report_free(3 * GIB, vm.DISK_LOW)
    await guest.report()
    assert await guest.resize(20 * GIB)  # waits for its device


async def test_names_types_and_labels_are_the_contracts(guest: Guest, collector: StorageCollector) -> None:
    await everything(guest)
    served = {family.name: family for family in text_string_to_metric_families(written(collector))}
    assert not await guest.idle(), "the job was to run still"
    for family in GUEST:
        found = served.pop(family.name.removesuffix("_total") if family.type is Type.COUNTER else family.name, None)
        if found is None:
            assert family.name == "storaged_resize_eta_seconds", f"{family.name} is not served"
            continue  # only once bytes have moved
        assert (found.type, found.documentation) == (family.type.value, family.help)
        for sample in found.samples:
            assert set(sample.labels) - {"le"} == set(family.label_names)
        for name, values in family.labels:
            if values:
                assert {sample.labels[name] for sample in found.samples} == set(values)
    assert not served, "served, but not in the contract"


async def test_what_is_always_there_is_there_at_once_and_nothing_else(collector: StorageCollector) -> None:
    names = {sample.name for family in text_string_to_metric_families(written(collector)) for sample in family.samples}
    always = {name for family in GUEST if family.present == ALWAYS for name in family.samples}
    assert names == always | {"storaged_unwritten_bytes"}, "nothing is preallocated on a new disk, which is soon known"


async def test_there_are_few_series(guest: Guest, collector: StorageCollector) -> None:
    await everything(guest)
    assert len(samples(written(collector))) <= MOST_SERIES


async def test_promtool_has_nothing_to_say(guest: Guest, collector: StorageCollector) -> None:
    await everything(guest)
    done = promtool("check", "metrics", stdin=written(collector).encode())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


async def test_openmetrics_says_the_same(guest: Guest, collector: StorageCollector) -> None:
    await guest.report_free(3 * GIB)
    text = written(collector, accept=OPENMETRICS)
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse_openmetrics(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }
    assert found == samples(written(collector))


async def test_a_reaction_is_measured_from_the_report_to_the_target(guest: Guest, collector: StorageCollector) -> None:
    def buckets() -> dict[str, float]:
        return {
            dict(labels)["le"]: value
            for (name, *labels), value in samples(written(collector)).items()
            if name == "storaged_balloon_reaction_seconds_bucket"
        }

    assert set(buckets().values()) == {0.0}
    await guest.report_free(3 * GIB)
    assert buckets()["+Inf"] == 1
    # A report that fails at first is not forgotten: it took as long as it took.
    guest.disk.faults.fail("extend", FilesystemError("no"), times=1)
    assert await guest.report_free(2 * GIB) == vm.BALLOON_INFLATE_FAILED

    async def settled() -> bool:
        return guest.service.snapshot.state.balloon.failures == 0

    await until(settled)
    assert buckets()["+Inf"] == 2
    assert buckets()["0.025"] < 2, "the retry came 50 ms later"
    assert len(buckets()) == len(REACTION_BUCKETS) + 1
    updates = {
        dict(labels)["result"]: value
        for (name, *labels), value in samples(written(collector)).items()
        if name == "storaged_balloon_updates_total"
    }
    assert updates == {"success": 1, "failed": 1, "ignored": 0}, "a retry by ourselves is no call of the host"


async def test_what_applications_write_is_seen_at_the_next_scrape(guest: Guest, collector: StorageCollector) -> None:
    def available() -> float:
        return samples(written(collector))["storaged_filesystem_available_bytes",]

    before = available()
    guest.disk.write(GIB)
    assert before - available() == GIB


async def test_a_read_only_filesystem_is_told(guest: Guest, collector: StorageCollector) -> None:
    key = ("storaged_filesystem_read_only",)
    assert samples(written(collector))[key] == 0
    guest.disk.read_only = True
    assert samples(written(collector))[key] == 1


async def test_a_disk_that_hangs_keeps_the_last_values_and_one_thread(
    guest: Guest, collector: StorageCollector
) -> None:
    first = samples(written(collector))
    guest.disk.faults.hang("space")
    before = guest.disk.faults.calls["space"]
    guest.disk.write(GIB)
    for _ in range(5):
        assert samples(written(collector)) == first
    assert guest.disk.faults.calls["space"] == before + 1, "reads must not pile up"
    guest.disk.faults.clear()

    async def fresh() -> bool:
        now = samples(written(collector))
        key = ("storaged_filesystem_available_bytes",)
        return first[key] - now[key] == GIB

    await until(fresh)


def test_the_reference_is_made_from_the_contract() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, root / "tools/metrics.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "unix:{tmp}/m.sock"])
async def test_it_is_served_on_tcp_and_on_a_unix_socket(address: str, guest: Guest, tmp_path: Path) -> None:
    with Served(guest.service, address.format(tmp=tmp_path)) as served:
        content_type, text = await served.get()
        assert content_type.startswith("text/plain; version=0.0.4")
        assert samples(text)["storaged_filesystem_size_bytes",] == 8 * GIB
        content_type, text = await served.get(accept="application/openmetrics-text; version=1.0.0")
        assert content_type.startswith("application/openmetrics-text; version=1.0.0")
        assert text.endswith("# EOF\n")
    assert not (tmp_path / "m.sock").exists()
