"""`storaged.service` in its sandbox on a real btrfs, and `storaged-guest.service` to the end of its machine."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.init.machine import SETTINGS, Machine, why_not

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=f"a real init: {why_not()}"),
    pytest.mark.init,
    pytest.mark.btrfs,  # one at a time: it has a loop device, and a whole machine
    pytest.mark.timeout(300),
]
RESIZE = """
import time
for size in ({sizes}):
    assert maitred.ResizeFilesystem(vm.ResizeFilesystemRequest(size=size), timeout=20).status == 2
    while maitred.GetResizeStatus(EMPTY).resize_in_progress:
        time.sleep(0.05)
    print(maitred.GetResizeStatus(EMPTY).current_size == size)
"""
REPORT = """
request = vm.UpdateStorageBalloonRequest(state=vm.DISK_NORMAL, free_space_bytes={free})
print(maitred.UpdateStorageBalloon(request, timeout=20).result, maitred.GetAvailableSpace(EMPTY).available_space)
"""
GIB = 1 << 30


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    one = Machine(tmp_path_factory.mktemp("init"))
    try:
        one.start()
        yield one
    finally:
        one.close()


def test_the_sandbox_lets_the_engine_work(machine: Machine) -> None:
    assert machine.state("storaged")[:2] == ("active", "no report from the host yet; balloon 0 B")
    # 5 GiB are ample for the host, and more than this filesystem has: nothing of the machine's own is touched.
    assert machine.call(REPORT.format(free=5 * GIB)).split()[0] == "0"
    assert machine.call(RESIZE.format(sizes=f"{2 * GIB}, {3 * GIB}")).split() == ["True", "True"]
    result, available = machine.call(REPORT.format(free=int(4.1 * GIB))).split()
    assert (result, int(available) < int(3.1 * GIB) + (1 << 20)) == ("0", True)
    text = machine.journal()
    assert "failed" not in text
    assert "Operation not permitted" not in text


def test_a_call_is_found_in_the_journal_by_its_request(machine: Machine) -> None:
    machine.call(
        "try: maitred.ResizeFilesystem(vm.ResizeFilesystemRequest(size=1), metadata=(('x-request-id', 'host-7'),))",
        "except grpc.RpcError as error: print(error.code())",
    )
    entry = json.loads(machine.run("journalctl", "-o", "json", "--no-pager", "-n", "1", "REQUEST_ID=host-7"))
    assert entry["RPC_METHOD"] == "/vm_tools.Maitred/ResizeFilesystem"
    assert (entry["SYSLOG_IDENTIFIER"], entry["PRIORITY"], entry["LOGGER"]) == (
        "storaged",
        "6",
        "storaged.rpc.interceptors",
    )


def test_a_reload_is_one(machine: Machine) -> None:
    machine.settings.write_text(SETTINGS + "[limits]\ncall_s = 30\n")
    machine.run("systemctl", "reload", "storaged")
    assert "settings read again" in machine.journal()
    machine.settings.write_text("[")
    machine.run("systemctl", "reload", "storaged")
    machine.until(lambda: "the settings stay as they were" in machine.journal())
    assert machine.state("storaged")[0] == "active"
    machine.settings.write_text(SETTINGS)


def test_one_that_is_killed_or_hangs_is_started_again(machine: Machine) -> None:
    before = machine.state("storaged")[2]
    machine.run("systemctl", "kill", "-s", "KILL", "--kill-who=main", "storaged")
    machine.until(lambda: machine.state("storaged")[2] == before + 1 and machine.state("storaged")[0] == "active")
    drop = "/run/systemd/system/storaged.service.d"
    machine.run("sh", "-c", f"mkdir -p {drop} && printf '[Service]\\nWatchdogSec=2\\n' >{drop}/w.conf")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "storaged")
    machine.run("sleep", "5")
    assert machine.state("storaged")[2] == 0, "the watchdog hears from a daemon that is well"
    machine.run("systemctl", "kill", "-s", "STOP", "--kill-who=main", "storaged")
    machine.until(lambda: machine.state("storaged")[2] == 1 and machine.state("storaged")[0] == "active")
    assert "Failed with result 'watchdog'" in machine.journal()


def test_a_stop_is_clean(machine: Machine) -> None:
    machine.run("systemctl", "stop", "storaged")
    assert machine.run("systemctl", "show", "storaged", "-p", "Result", "--value") == "success"
    machine.run("systemctl", "start", "storaged")
    assert machine.call(REPORT.format(free=5 * GIB)).split()[0] == "0"


def test_shutdown_turns_its_machine_off_after_the_answer(machine: Machine) -> None:
    machine.run("systemctl", "start", "storaged-guest")
    assert machine.state("storaged")[0] == "inactive"
    assert machine.state("storaged-guest")[0] == "active"
    assert machine.call("maitred.PrepareToSuspend(EMPTY, timeout=20)", "print('safe')") == "safe"
    assert machine.call("maitred.Shutdown(EMPTY, timeout=30)", "print('answered')") == "answered"
    machine.until(lambda: machine.off, 60)
