"""Each command against a real daemon, as its users run it: what it says, as what it exits, what it leaves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import grpc
import pytest

from lab.daemon import Daemon
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.units import GIB
from tests.ctl.conftest import CTL, OnTerminal, ctl, environment
from tests.ctl.fake import FakeDaemon, job, report


def fits(text: str, width: int = 80) -> bool:
    """True when no line is longer."""
    return all(len(line) <= width for line in text.splitlines())


def test_status(daemon: Daemon) -> None:
    done = ctl(daemon.address, "status")
    assert (done.returncode, done.stderr) == (0, "")
    for label in ("storaged", "Pressure", "Filesystem", "Balloon", "Job", "Given back"):
        assert f"\n{label} " in f"\n{done.stdout}"
    assert "simulated" in done.stdout
    assert "\033" not in done.stdout
    assert fits(done.stdout)


def test_status_as_json_is_the_report(daemon: Daemon) -> None:
    value = json.loads(ctl(daemon.address, "status", "--json").stdout)
    assert value["filesystem"]["size_bytes"] == daemon.report().filesystem.size_bytes
    assert value["simulated"] is True
    assert value["dirty_limits_found"] is None


def test_status_on_a_terminal_of_any_width(daemon: Daemon) -> None:
    for columns in (80, 40, 24):
        with OnTerminal(daemon.address, "status", columns=columns) as terminal:
            assert terminal.wait() == 0
            assert "Balloon" in terminal.text
            assert fits(terminal.text, columns)
            assert "\033[1mBalloon\033[0m" in terminal.raw


def test_the_guest_may_come_from_the_environment(daemon: Daemon) -> None:
    done = subprocess.run(
        (*CTL, "status"), env=environment(STORAGED_GUEST=daemon.address), capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 0


def test_bounds(daemon: Daemon) -> None:
    done = ctl(daemon.address, "bounds")
    assert done.returncode == 0
    assert f"({daemon.minimum()} bytes)" in done.stdout
    value = json.loads(ctl(daemon.address, "bounds", "--json").stdout)
    assert value["minimum_size"] == daemon.minimum()
    assert set(value) == {"size_bytes", "minimum_size", "guaranteed_size", "why"}


def test_bounds_that_are_not_known_are_a_failure(fake: FakeDaemon) -> None:
    fake.says.minimum = 0
    done = ctl(fake.address, "bounds")
    assert (done.returncode, done.stderr) == (1, "storagectl: the minimum is not known\n")


def test_balloon_holds_back_what_the_host_does_not_have(daemon: Daemon) -> None:
    done = ctl(daemon.address, "balloon", "3G")
    assert (done.returncode, done.stderr) == (0, "")
    assert daemon.available() == 2 * GIB
    assert "applications may write 2.00 GiB" in done.stdout
    assert "NORMAL, the host has 3.00 GiB free" in done.stdout
    value = json.loads(ctl(daemon.address, "balloon", "100G", "--json").stdout)
    assert value["result"] == "SUCCESS"
    assert value["balloon"]["size_bytes"] == 0
    assert value["pressure"]["host_free_bytes"] == 100 * GIB


@pytest.mark.parametrize(
    ("arguments", "state", "free"),
    [
        (["3G"], 1, 3 * GIB),
        (["2G"], 2, 2 * GIB),
        (["1G"], 3, GIB),
        (["0"], 3, 0),
        (["unknown"], 0, -1),
        (["-1"], 0, -1),
        (["10G", "critical"], 3, 10 * GIB),
        (["1.5G", "none"], 0, 3 * GIB // 2),
    ],
)
def test_balloon_tells_what_a_host_would(fake: FakeDaemon, arguments: list[str], state: int, free: int) -> None:
    assert ctl(fake.address, "balloon", *arguments).returncode == 0
    (request,) = fake.says.asked
    assert (request.state, request.free_space_bytes) == (state, free)


def test_a_balloon_that_could_not_be_inflated_is_a_failure(fake: FakeDaemon) -> None:
    fake.says.held = False
    fake.says.now.balloon.failure_reason = "no room for 4096 bytes"
    done = ctl(fake.address, "balloon", "3G", "--json")
    assert done.returncode == 1
    assert done.stderr == "storagectl: the balloon is not where it should be: no room for 4096 bytes\n"
    assert json.loads(done.stdout)["result"] == "BALLOON_INFLATE_FAILED"


def test_trim(daemon: Daemon) -> None:
    done = ctl(daemon.address, "trim")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Trimmed     ")
    assert json.loads(ctl(daemon.address, "trim", "--json").stdout)["trimmed_bytes"] > 0


def test_trim_reclaims_when_asked(fake: FakeDaemon) -> None:
    assert ctl(fake.address, "trim").returncode == 0
    assert ctl(fake.address, "trim", "--reclaim").returncode == 0
    assert [request.reclaim_empty_chunks for request in fake.says.asked] == [False, True]


def test_cancel_without_a_job(daemon: Daemon) -> None:
    done = ctl(daemon.address, "cancel")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "storagectl: no resize job is running\n"


def test_cancel(daemon: Daemon) -> None:
    size = daemon.report().filesystem.size_bytes
    daemon.resize(daemon.report().filesystem.device_bytes + GIB)  # waits for a device that large
    done = ctl(daemon.address, "cancel", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    assert (value["state"], value["current_size"]) == ("JOB_CANCELLED", size)
    assert not daemon.status().resize_in_progress


def test_cancel_that_came_too_late_is_a_failure(fake: FakeDaemon) -> None:
    fake.says.cancel_answer = job(pb.JOB_DONE)
    done = ctl(fake.address, "cancel")
    assert done.returncode == 1
    assert "the job ended first (done)" in done.stderr
    assert "(4294967296 bytes)" in done.stdout


# --- watch --------------------------------------------------------------------------------------------------------


def test_watch_writes_a_json_object_per_line_until_nobody_reads(daemon: Daemon) -> None:
    process = subprocess.Popen(
        (*CTL, "--guest", daemon.address, "watch", "--json", "--interval", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    first = json.loads(process.stdout.readline())
    daemon.report_free(50 * GIB)
    while json.loads(process.stdout.readline())["pressure"]["host_free_bytes"] != 50 * GIB:
        pass
    process.stdout.close()
    daemon.report_free(60 * GIB)  # the next line finds nobody
    assert (process.wait(20), process.stderr.read()) == (0, b"")
    process.stderr.close()
    assert first["filesystem"]["mountpoint"] == "/sim"


def test_watch_writes_a_line_per_report(fake: FakeDaemon) -> None:
    process = subprocess.Popen(
        (*CTL, "--guest", fake.address, "watch", "--interval", "2.5"), stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    fake.says.send(report(job()))
    line = process.stdout.readline()
    assert line.startswith(b"22:15:00  LOW  shrink 41 %  balloon 2.00 GiB")
    assert len(line) <= 81
    process.send_signal(2)
    assert process.wait(10) == 0
    process.stdout.close()
    assert fake.says.asked[0].min_interval_s == 2.5


def test_watch_on_a_terminal_ends_with_ctrl_c(daemon: Daemon) -> None:
    daemon.report_free(70 * GIB)
    with OnTerminal(daemon.address, "watch", "--interval", "0", columns=60) as terminal:
        terminal.wait_for("70.0 GiB free")
        daemon.report_free(71 * GIB)
        terminal.wait_for("71.0 GiB free")
        terminal.type("\x03")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.text
        assert all(len(line) <= 60 for line in terminal.lines)


def test_watch_finds_a_daemon_that_comes_back(fake: FakeDaemon) -> None:
    with OnTerminal(fake.address, "watch") as terminal:
        fake.says.send(report())
        terminal.wait_for("1.50 GiB free")
        fake.stop()
        terminal.wait_for("lost storaged")
        fake.start()
        back = report()
        back.pressure.host_free_bytes = 5 * GIB
        fake.says.send(back)
        terminal.wait_for("5.00 GiB free")


def test_watch_gives_up_on_a_daemon_that_stays_away(fake: FakeDaemon) -> None:
    with OnTerminal(fake.address, "--timeout", "1", "watch") as terminal:
        fake.says.send(report())
        terminal.wait_for("1.50 GiB free")
        fake.stop()
        assert terminal.wait() == 1
        assert "gave up after 1 s" in " ".join(terminal.text.split())


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["resize"],
        ["resize", "much"],
        ["resize", "-5"],
        ["resize", "9E"],
        ["balloon"],
        ["balloon", "3G", "awful"],
        ["watch", "--interval", "-1"],
        ["watch", "--interval", "nan"],
        ["watch", "--interval", "1e9"],
        ["--timeout", "0", "status"],
        ["--guest", "somewhere", "status"],
        ["--guest", "vsock:3:8888", "status"],
        ["--guest", "tcp:127.0.0.1:1", "status"],
        ["--guest", "tcp:192.0.2.1:1", "--insecure", "status"],
        ["--tls-ca", "/nowhere", "status"],
        ["--guest", "tcp:127.0.0.1:1", "--tls-ca", "/no", "--tls-cert", "/no", "--tls-key", "/no", "status"],
    ],
)
def test_wrong_use(arguments: list[str]) -> None:
    done = ctl("unix:/nowhere.sock", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "storagectl" in done.stderr.splitlines()[-1]


def test_vsock_says_that_it_is_not_there_yet() -> None:
    assert "vsock is not built yet" in ctl("vsock:3:8888", "status").stderr


@pytest.mark.parametrize(
    "command", [["status"], ["bounds"], ["resize", "4G", "--yes"], ["cancel"], ["trim"], ["watch"]]
)
def test_a_daemon_that_is_not_there(tmp_path: Path, command: list[str]) -> None:
    address = f"unix:{tmp_path}/none.sock"
    done = ctl(address, *command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"storagectl: cannot reach storaged at {address}: No such file or directory\n"


def test_a_port_where_nobody_listens() -> None:
    done = ctl("tcp:127.0.0.1:1", "--insecure", "status")
    assert done.returncode == 1
    assert done.stderr == "storagectl: cannot reach storaged at tcp:127.0.0.1:1: Connection refused\n"


def test_a_daemon_that_does_not_answer(fake: FakeDaemon) -> None:
    done = ctl(fake.address, "--timeout", "0.5", "cancel")
    assert done.returncode == 1
    assert done.stderr == f"storagectl: storaged at {fake.address} did not answer within 0.5 s\n"


@pytest.mark.parametrize(
    ("code", "details", "said"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, "this disk cannot discard", "this disk cannot discard"),
        (grpc.StatusCode.UNAVAILABLE, "the disk did not answer in time", "the disk did not answer in time"),
        (grpc.StatusCode.INTERNAL, "two\nlines \033[31mred", "two lines  [31mred"),
    ],
)
def test_what_the_daemon_says_is_one_line(fake: FakeDaemon, code: grpc.StatusCode, details: str, said: str) -> None:
    fake.says.error = (code, details)
    done = ctl(fake.address, "trim")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"storagectl: {said}\n")


def test_a_server_that_is_no_storaged(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, without_storage=True) as other:
        done = ctl(other.address, "status")
    assert done.returncode == 1
    assert done.stderr == f"storagectl: what answers at {other.address} does not know this call\n"


def test_a_full_disk_and_a_closed_pipe(daemon: Daemon) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            (*CTL, "--guest", daemon.address, "status"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"storagectl: cannot write: No space left on device\n")
    line = f"set -o pipefail; {' '.join(CTL)} --guest {daemon.address} status | true"
    shell = subprocess.run(["bash", "-c", line], capture_output=True, env=environment(), timeout=30, check=False)
    assert shell.stderr == b""


def test_output_that_cannot_be_encoded(fake: FakeDaemon) -> None:
    fake.says.now.filesystem.mountpoint = "/mnt/größe"
    done = ctl(fake.address, "status", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "/mnt/gr??e" in done.stdout


def test_help_fits_and_names_every_command() -> None:
    done = ctl("unix:/nowhere.sock", "--help")
    assert done.returncode == 0
    assert fits(done.stdout)
    for command in ("status", "bounds", "resize", "cancel", "balloon", "trim", "watch"):
        assert f"\n    {command}" in done.stdout


def test_mutual_tls(tmp_path: Path) -> None:
    for name, subject in (("ca", "/CN=ca"), ("server", "/CN=localhost"), ("client", "/CN=client")):
        _certificate(tmp_path, name, subject)
    files = [(tmp_path / name).read_bytes() for name in ("server.key", "server.crt", "ca.crt")]
    daemon = FakeDaemon(tmp_path, "localhost:0")
    daemon.start(grpc.ssl_server_credentials([(files[0], files[1])], files[2], require_client_auth=True))
    try:
        tls = ["--tls-ca", f"{tmp_path}/ca.crt", "--tls-cert", f"{tmp_path}/client.crt"]
        tls += ["--tls-key", f"{tmp_path}/client.key"]
        done = ctl(daemon.address, *tls, "trim")
        assert (done.returncode, done.stderr) == (0, "")
        _certificate(tmp_path, "ca", "/CN=another")  # which signed nothing that is in use
        done = ctl(daemon.address, *tls, "trim")
        assert done.returncode == 1
        assert done.stderr.startswith(f"storagectl: cannot reach storaged at {daemon.address}: ")
        assert done.stderr.count("\n") == 1
    finally:
        daemon.stop()


def _certificate(directory: Path, name: str, subject: str) -> None:
    """A key and a certificate for an elliptic curve, signed by `ca` unless it is that itself."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-days", "2", "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.crt"]
    if name != "ca":
        command += ["-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
