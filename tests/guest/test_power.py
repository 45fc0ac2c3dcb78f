"""The power: logind on a real bus, systemctl, and a process 1 in a namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import Kind, StoragedError
from storaged.guest.power import (
    FirstPower,
    InitPower,
    LogindPower,
    Power,
    SystemctlPower,
    mounts_to_release,
    real_power,
)
from storaged.sim.power import SimPower

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


# --- logind ---------------------------------------------------------------------------------------------------

needs_bus = pytest.mark.skipif(shutil.which("dbus-daemon") is None, reason="needs dbus-daemon")


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    """The address of a bus that is there for this test alone."""
    path = tmp_path / "bus"
    config = tmp_path / "bus.conf"
    config.write_text(
        f"""<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
        "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
        <busconfig><type>session</type><listen>unix:path={path}</listen><policy context="default">
        <allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>""",
        encoding="ascii",
    )
    daemon = subprocess.Popen(["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"])
    try:
        _wait(path.exists)
        yield f"unix:path={path}"
    finally:
        daemon.terminate()
        daemon.wait(5)


def _wait(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


class Logind:
    """The login manager's process, and what it was asked."""

    def __init__(self, bus: str, log: Path, answer: str) -> None:
        self._log = log
        self._process = subprocess.Popen([sys.executable, HERE / "logind.py", bus, log, answer])

    def __enter__(self) -> Self:
        _wait(self._log.exists)
        _wait(lambda: bool(self.asked or self._log.read_text(encoding="ascii")))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(5)

    @property
    def asked(self) -> list[str]:
        return self._log.read_text(encoding="ascii").splitlines()[1:]


@needs_bus
def test_logind_is_asked_first_and_then_told(bus: str, tmp_path: Path) -> None:
    with Logind(bus, tmp_path / "log", "yes") as logind:
        power = LogindPower(bus)
        power.check()
        assert logind.asked == ["CanPowerOff()"], "asking changes nothing"
        power.power_off()
        assert logind.asked == ["CanPowerOff()", "PowerOff(False,)"], "nobody is there to be asked for a password"


@needs_bus
@pytest.mark.parametrize("answer", ["no", "na", "challenge", "inhibited"])
def test_what_logind_would_not_do_is_known_before_anything_ends(bus: str, tmp_path: Path, answer: str) -> None:
    with Logind(bus, tmp_path / "log", answer) as logind:
        with pytest.raises(StoragedError, match=answer) as caught:
            LogindPower(bus).check()
        assert caught.value.kind is Kind.PRECONDITION
        assert logind.asked == ["CanPowerOff()"]


@needs_bus
def test_a_refusal_of_logind_is_an_error_with_its_words(bus: str, tmp_path: Path) -> None:
    with Logind(bus, tmp_path / "log", "refuse"), pytest.raises(StoragedError, match="not today"):
        LogindPower(bus).power_off()


@needs_bus
def test_a_bus_without_logind(bus: str) -> None:
    with pytest.raises(StoragedError, match="logind"):
        LogindPower(bus).check()


def test_no_bus_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(StoragedError, match="cannot be asked") as caught:
            LogindPower(f"unix:path={tmp_path / name}").check()
        assert caught.value.kind is Kind.UNAVAILABLE


# --- systemctl, and which way is taken ------------------------------------------------------------------------


@pytest.fixture
def systemctl(tmp_path: Path) -> SystemctlPower:
    """A systemctl that writes down what it is asked."""
    program = tmp_path / "systemctl"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\ntest ! -e {tmp_path}/broken || {{ echo no way >&2; exit 4; }}\n'
    )
    program.chmod(0o755)
    return SystemctlPower(str(program), booted=str(tmp_path))


def test_systemctl_is_run_without_waiting(systemctl: SystemctlPower, tmp_path: Path) -> None:
    systemctl.check()
    assert not (tmp_path / "asked").exists()
    systemctl.power_off()
    assert (tmp_path / "asked").read_text() == "--no-block --no-ask-password poweroff\n"


def test_what_systemctl_says_is_kept(systemctl: SystemctlPower, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(StoragedError, match="no way"):
        systemctl.power_off()


def test_systemctl_is_no_way_where_systemd_does_not_run(systemctl: SystemctlPower, tmp_path: Path) -> None:
    for other in (
        SystemctlPower(str(tmp_path / "none"), str(tmp_path)),
        SystemctlPower(systemctl.program, str(tmp_path / "none")),
    ):
        with pytest.raises(StoragedError) as caught:
            other.check()
        assert caught.value.kind is Kind.UNSUPPORTED


class Broken(SimPower):
    """It would, and then it does not."""

    def power_off(self) -> None:
        raise StoragedError("gone", Kind.UNAVAILABLE)


def test_the_first_way_that_works_is_taken() -> None:
    no = SimPower(fault=StoragedError("no bus", Kind.UNAVAILABLE))
    good, spare = SimPower(), SimPower()
    power = FirstPower((no, good, spare))
    power.check()
    power.power_off()
    assert (good.done[-1], spare.done) == ("power off", [])
    FirstPower((Broken(), spare)).power_off()
    assert spare.done == ["check", "power off"]
    with pytest.raises(StoragedError, match="no bus; gone") as caught:
        FirstPower((no, Broken())).power_off()
    assert caught.value.kind is Kind.UNAVAILABLE
    with pytest.raises(StoragedError, match="no bus"):
        FirstPower((no,)).check()


def test_this_process_is_not_process_1() -> None:
    assert isinstance(real_power(), FirstPower)
    assert not real_power().last
    with pytest.raises(StoragedError, match="only process 1"):
        InitPower(switch=lambda: pytest.fail("the switch was used")).power_off()


# --- the port's contract --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logind", "systemctl", "sim"])
def test_every_way_checks_without_doing(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    def contract(power: Power, done: Callable[[], int]) -> None:
        assert not power.last
        power.check()
        power.check()
        power.sync()
        assert done() == 0
        power.power_off()
        assert done() == 1

    if kind == "sim":
        sim = SimPower()
        contract(sim, lambda: sim.done.count("power off"))
    elif kind == "systemctl":
        asked = tmp_path / "asked"
        contract(
            request.getfixturevalue("systemctl"),
            lambda: len(asked.read_text().split("\n")) - 1 if asked.exists() else 0,
        )
    elif shutil.which("dbus-daemon") is None:
        pytest.skip("needs dbus-daemon")
    else:
        bus = request.getfixturevalue("bus")
        with Logind(bus, tmp_path / "log", "yes") as logind:
            contract(LogindPower(bus), lambda: sum(one.startswith("PowerOff") for one in logind.asked))


# --- as process 1 ---------------------------------------------------------------------------------------------

MOUNTINFO = """\
22 27 0:20 / /sys rw - sysfs sysfs rw
23 27 0:21 / /proc rw - proc proc rw
24 27 0:5 / /dev rw - devtmpfs udev rw
25 24 0:22 / /dev/pts rw - devpts devpts rw
27 1 8:1 / / rw - ext4 /dev/vda rw
30 27 0:26 / /mnt/stateful rw - btrfs /dev/vdb rw
31 30 0:27 / /mnt/stateful/a\\040b\\134c rw - tmpfs tmpfs rw
32 27 0:28 / /run rw - tmpfs tmpfs rw
"""


def test_mounts_are_let_go_newest_first_and_by_their_true_names() -> None:
    assert mounts_to_release(MOUNTINFO) == ["/mnt/stateful/a b\\c", "/mnt/stateful"]


@given(text=st.text(st.characters(codec="ascii"), max_size=200))
def test_any_text_is_read(text: str) -> None:
    for point in mounts_to_release(text):
        assert point not in ("/", "/proc", "/dev")


def _why_no_namespaces() -> str:
    if os.geteuid() != 0:
        return "namespaces: needs root"
    if shutil.which("unshare") is None:
        return "namespaces: needs unshare"
    return ""


INIT = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from storaged.guest.power import InitPower

where = Path({where!r})
assert os.getpid() == 1
subprocess.run(["mount", "-t", "tmpfs", "first", where / "m"], check=True)
(where / "m" / "in").mkdir()
subprocess.run(["mount", "-t", "tmpfs", "second", where / "m" / "in"], check=True)
if {hold!r} == "a file":
    held = open(where / "m" / "held", "w")
if {hold!r} == "a directory":
    held = os.open(where / "m", os.O_RDONLY)
polite = subprocess.Popen(["sh", "-c", "trap 'echo term >{where}/polite; exit' TERM; while :; do sleep 0.02; done"])
rude = subprocess.Popen(["sh", "-c", "trap '' TERM; touch {where}/rude; while :; do sleep 0.02; done"])
orphan = subprocess.Popen(["sh", "-c", "(sleep 60 & echo $! >{where}/orphan) "])
while not (where / "rude").exists() or not (where / "orphan").exists():
    time.sleep(0.01)
time.sleep(0.1)

def switch():
    left = [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    mounts = [line.split()[4] for line in open("/proc/self/mountinfo") if str(where) in line]
    flags = [line.split()[5] for line in open("/proc/self/mountinfo") if str(where) in line]
    (where / "off").write_text(f"{{left}} {{mounts}} {{flags}}")

power = InitPower(switch=switch, term_s=0.4, kept=tuple({kept!r}))
power.check()
power.power_off()
"""


@pytest.mark.skipif(bool(_why_no_namespaces()), reason=_why_no_namespaces() or "there")
@pytest.mark.parametrize("hold", ["nothing", "a directory", "a file"])
def test_process_1_ends_everything_and_lets_go_of_every_mount(tmp_path: Path, hold: str) -> None:
    (tmp_path / "m").mkdir()
    # The machine's own mounts are copies here, and kept all the same: only what this test mounted is let go.
    kept = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    script = tmp_path / "init.py"
    script.write_text(textwrap.dedent(INIT).format(root=str(ROOT), where=str(tmp_path), kept=kept, hold=hold))
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child", sys.executable, script],
        timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "polite").read_text() == "term\n"
    said = (tmp_path / "off").read_text()
    if hold == "nothing":
        assert said == "[] [] []", done.stderr
    else:
        way, name = ("ro", "read-only") if hold == "a directory" else ("rw", "writable")
        assert said == f"[] ['{tmp_path}/m'] ['{way},relatime']", done.stderr
        assert f"{tmp_path}/m stays mounted, {name}" in done.stderr
    assert "SIGTERM" in done.stderr, "the rude one needed SIGKILL"
