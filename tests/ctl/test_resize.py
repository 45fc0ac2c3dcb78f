"""storagectl resize: the plan, the question, the bar, Ctrl-C, and an end that is true whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lab.daemon import Daemon
from storaged.ctl.resize import Follower
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.units import GIB, MIB
from tests.ctl.conftest import CTL, OnTerminal, ctl, environment
from tests.ctl.fake import FakeDaemon, job, report
from tests.ctl.slow import SlowDaemon


@pytest.fixture
def size(daemon: Daemon) -> int:
    """The filesystem's size now, with no job running."""
    if daemon.status().resize_in_progress:
        daemon.storage.CancelResize(pb.CancelResizeRequest(), timeout=20)
    daemon.report_free(100 * GIB)
    return daemon.status().current_size


def device(daemon: Daemon) -> int:
    return daemon.report().filesystem.device_bytes


# --- against a real daemon ----------------------------------------------------------------------------------------


def test_grow_and_shrink_back(daemon: Daemon, size: int) -> None:
    done = ctl(daemon.address, "resize", str(size + GIB))
    assert (done.returncode, done.stderr) == (0, "")
    assert daemon.status().current_size == size + GIB
    assert "Takes       1.00 GiB more for /sim" in done.stdout
    assert f"done: the filesystem has 9.00 GiB ({size + GIB} bytes)" in done.stdout

    done = ctl(daemon.address, "resize", str(size), "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert daemon.status().current_size == size
    assert "Gives back  1.00 GiB of /sim" in done.stdout
    assert f"Minimum     {'265 MiB'}" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_a_shrink_with_an_inflated_balloon(daemon: Daemon, size: int) -> None:
    daemon.report_free(2 * GIB)
    assert ctl(daemon.address, "resize", str(size - GIB), "--yes").returncode == 0
    daemon.report_free(100 * GIB)
    assert ctl(daemon.address, "resize", str(size)).returncode == 0


def test_json_is_one_object_on_stdout(daemon: Daemon, size: int) -> None:
    done = ctl(daemon.address, "resize", str(size - GIB), "--yes", "--json")
    value = json.loads(done.stdout)
    assert (value["outcome"], value["size_bytes"]) == ("done", size - GIB)
    assert value["job"]["state"] == "JOB_DONE"
    value = json.loads(ctl(daemon.address, "resize", str(size), "--json").stdout)
    assert value["job"]["direction"] == "DIRECTION_GROW"
    value = json.loads(ctl(daemon.address, "resize", str(size), "--json").stdout)
    assert value == {"outcome": "done", "size_bytes": size, "job": None}


def test_a_best_effort_goes_below_the_minimum(daemon: Daemon, size: int) -> None:
    minimum = daemon.minimum()
    done = ctl(daemon.address, "resize", "256MiB", "--best-effort", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    reached = daemon.status().current_size
    assert 256 * MIB <= reached < minimum
    assert f"({reached} bytes)" in " ".join(done.stdout.split())
    done = ctl(daemon.address, "resize", str(size), "--best-effort")
    assert done.returncode == 1
    assert "only a shrink can be a best effort" in " ".join(done.stderr.split())
    assert ctl(daemon.address, "resize", str(size)).returncode == 0


def test_a_running_resize_is_retargeted(daemon: Daemon, size: int) -> None:
    daemon.resize(device(daemon) + GIB)  # waits for its device
    assert ctl(daemon.address, "resize", str(size - GIB), "--yes").returncode == 1
    done = ctl(daemon.address, "resize", str(size - GIB), "--yes", "--retarget")
    assert (done.returncode, done.stderr) == (0, "")
    assert daemon.status().current_size == size - GIB
    assert ctl(daemon.address, "resize", str(size), "--retarget").returncode == 0


def test_the_host_knows_neither_retarget_nor_best_effort(daemon: Daemon) -> None:
    done = ctl(daemon.address, "resize", "vm1", "1GiB", "--best-effort")
    assert done.returncode == 2
    assert "for one guest" in done.stderr


def test_nothing_to_do(daemon: Daemon, size: int) -> None:
    before = daemon.report().job.id
    done = ctl(daemon.address, "resize", str(size))
    assert done.returncode == 0
    assert done.stdout.startswith("nothing to do: the filesystem has")
    assert daemon.report().job.id == before


def test_a_shrink_below_the_minimum_is_refused_with_numbers_and_without_a_question(daemon: Daemon, size: int) -> None:
    asked = daemon.minimum() - MIB
    done = ctl(daemon.address, "resize", str(asked))
    assert (done.returncode, done.stdout) == (1, "")
    for number in (f"({asked} bytes)", f"({daemon.minimum()} bytes)", "8.00 GiB"):
        assert number in done.stderr
    assert done.stderr.count("\n") == 1
    assert daemon.status().current_size == size


def test_what_the_daemon_refuses_is_said_in_its_words(daemon: Daemon, size: int) -> None:
    daemon.report_free(GIB // 2, 3)
    done = ctl(daemon.address, "resize", str(size + GIB))
    assert done.returncode == 1
    assert "while the host's disk is critically full" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_shrink_needs_a_yes(daemon: Daemon, size: int) -> None:
    done = ctl(daemon.address, "resize", str(size - GIB))
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert daemon.status().current_size == size


@pytest.mark.parametrize(("answer", "code"), [("n\r", 1), ("\r", 1), ("\x04", 1), ("\x03", 1), ("y\r", 0)])
def test_the_question(daemon: Daemon, size: int, answer: str, code: int) -> None:
    with OnTerminal(daemon.address, "resize", str(size - GIB)) as terminal:
        terminal.wait_for("Shrink it? [y/N] ")
        terminal.type(answer)
        assert terminal.wait() == code
        assert "Traceback" not in terminal.text
    expected = size - GIB if code == 0 else size
    assert daemon.status().current_size == expected
    daemon.resize(size)
    daemon.wait_resized()


def test_a_growth_asks_nothing(daemon: Daemon, size: int) -> None:
    with OnTerminal(daemon.address, "resize", str(size + GIB)) as terminal:
        assert terminal.wait() == 0
        assert "[y/N]" not in terminal.text
    assert ctl(daemon.address, "resize", str(size), "--yes").returncode == 0


def test_another_job_is_running(daemon: Daemon, size: int) -> None:
    wanted = device(daemon) + GIB
    daemon.resize(wanted)
    done = ctl(daemon.address, "resize", str(size + GIB))
    assert (done.returncode, done.stdout) == (1, "")
    assert "a resize to 33.0 GiB (waiting for capacity, 0 %) is running already" in done.stderr
    assert daemon.report().job.requested_size == wanted
    assert daemon.status().resize_in_progress


def test_ctrl_c_cancels_the_job(daemon: Daemon, size: int) -> None:
    with OnTerminal(daemon.address, "resize", str(device(daemon) + GIB)) as terminal:
        terminal.wait_for("waiting for capacity")
        assert daemon.status().resize_in_progress
        terminal.type("\x03")
        assert terminal.wait() == 1
        assert "asking storaged to cancel" in terminal.text
        assert "the resize was cancelled" in terminal.text
        assert "Traceback" not in terminal.text
    assert not daemon.status().resize_in_progress
    assert daemon.report().job.state == pb.JOB_CANCELLED
    assert daemon.status().current_size == size


def test_sigint_cancels_the_job_without_a_terminal_too(daemon: Daemon, size: int) -> None:
    process = subprocess.Popen(
        (*CTL, "--guest", daemon.address, "resize", str(device(daemon) + GIB)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    while not daemon.status().resize_in_progress:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "asking storaged to cancel" in out
    assert err.startswith("storagectl: the resize was cancelled")
    assert daemon.report().job.state == pb.JOB_CANCELLED


def test_the_daemon_is_stopped_in_the_middle(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("stopped")
    settings = directory / "storaged.toml"
    settings.write_text("[storage]\ncapacity_wait_s = 600\n")
    with Daemon(directory, "--config", str(settings)) as daemon:
        with OnTerminal(daemon.address, "--timeout", "1", "resize", "40G") as terminal:
            terminal.wait_for("waiting for capacity")
            daemon.stop()
            assert terminal.wait() == 1
            assert "cancelled: storaged was stopped" in terminal.text or "gave up after 1 s" in terminal.text
        with OnTerminal(daemon.start().address, "resize", "40G") as terminal:
            terminal.wait_for("waiting for capacity")
            daemon.kill()
            terminal.wait_for("lost storaged")
            daemon.start()  # a simulation remembers nothing
            assert terminal.wait() == 1
            assert "how the resize ended is not known" in terminal.text.replace("\n", " ")


def test_a_shrink_that_moves_data_shows_how_far_it_is(tmp_path: Path) -> None:
    with SlowDaemon(tmp_path) as slow, OnTerminal(slow.address, "resize", "5G", "--yes") as terminal:
        terminal.wait_for(" of 2.00 GiB, ")  # moved, rate and time left
        assert terminal.wait() == 0
        assert "done: the filesystem has 5.00 GiB (5368709120 bytes), 2.00 GiB moved" in terminal.text
        assert any("MiB/s, " in line and line.rstrip().endswith(" left") for line in terminal.lines)
        assert all(len(line) <= 80 for line in terminal.lines)
        assert slow.disk.size == 5 * GIB


def test_ctrl_c_in_the_middle_of_a_move_ends_at_a_true_size(tmp_path: Path) -> None:
    with SlowDaemon(tmp_path, 200 * MIB) as slow, OnTerminal(slow.address, "resize", "5G", "--yes") as terminal:
        terminal.wait_for("MiB/s")
        terminal.type("\x03")
        assert terminal.wait() == 1
        assert 5 * GIB < slow.disk.size < 8 * GIB
        assert f"({slow.disk.size} bytes)" in " ".join(terminal.text.split())


# --- against a daemon that says what it is told to ----------------------------------------------------------------


def test_the_bar(fake: FakeDaemon) -> None:
    for columns in (80, 40, 30):
        with OnTerminal(fake.address, "resize", "4G", "--yes", columns=columns) as terminal:
            waiting = job(pb.JOB_PREPARING, moved_bytes=0, total_to_move_bytes=0, progress=0)
            fake.says.send(report(waiting))
            terminal.wait_for("preparing")
            fake.says.send(report(job()))
            terminal.wait_for("41 %, 850 MiB of 2.00 GiB, 120 MiB/s, 3 min 24 s left" if columns == 80 else "41 %")
            fake.says.send(report(job(pb.JOB_DONE), size=4 * GIB))
            assert terminal.wait() == 0
            assert "done: the filesystem has 4.00 GiB (4294967296 bytes), 2.00 GiB moved" in terminal.text
        bars = [line for line in terminal.lines if line.startswith(("preparing", "moving"))]
        assert len(bars) >= 2
        assert all(len(line) <= columns for line in bars)
        fake.says.forget()


def test_plain_lines_when_nobody_looks(fake: FakeDaemon) -> None:
    fake.says.send(*(report(job(progress=progress)) for progress in (0.0, 0.01, 0.02, 0.30, 0.31)))
    fake.says.send(report(job(pb.JOB_CANCELLING)))
    fake.says.send(report(job(pb.JOB_DONE), size=4 * GIB))
    done = ctl(fake.address, "resize", "4G", "--yes")
    assert done.returncode == 0
    lines = done.stdout.splitlines()[4:]
    assert [line.split(",")[0] for line in lines] == [
        "moving",
        "moving",
        "cancelling",
        "done: the filesystem has 4.00 GiB (4294967296 bytes)",
    ]
    assert lines[1] == "moving, 30 %, 850 MiB of 2.00 GiB moved, 120 MiB/s, 3 min 24 s left"
    assert "\033" not in done.stdout


def test_a_best_effort_says_how_far_it_came_and_why_no_further(fake: FakeDaemon) -> None:
    fake.says.send(report(job(pb.JOB_DONE, current_size=5 * GIB, best_effort=True, reason="no hole of 64 MiB")))
    done = ctl(fake.address, "resize", "4G", "--best-effort", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert pb.ResizeRequest(size_bytes=4 * GIB, best_effort=True) in fake.says.asked
    said = " ".join(done.stdout.split())
    assert f"({5 * GIB} bytes)" in said
    assert "it went no further because: no hole of 64 MiB" in said


def test_a_failed_job(fake: FakeDaemon) -> None:
    fake.says.send(report(job(pb.JOB_FAILED, reason="no room below 4294967296")))
    done = ctl(fake.address, "resize", "4G", "--yes", "--json")
    assert done.returncode == 1
    assert done.stderr == (
        "storagectl: the resize failed: no room below 4294967296; the filesystem has 6.00 GiB (6442450944 bytes)\n"
    )
    assert json.loads(done.stdout)["outcome"] == "failed"


def test_a_resize_that_another_was_faster_than(fake: FakeDaemon) -> None:
    fake.says.started = False
    done = ctl(fake.address, "resize", "4G", "--yes")
    assert done.returncode == 1
    assert "another resize has begun just now" in done.stderr


def test_the_second_ctrl_c_only_stops_watching(fake: FakeDaemon) -> None:
    with OnTerminal(fake.address, "resize", "4G", "--yes") as terminal:
        fake.says.send(report(job()))
        terminal.wait_for("41 %")
        terminal.type("\x03")
        terminal.wait_for("asking storaged to cancel")
        assert fake.says.cancel_asked.wait(10)
        fake.says.send(report(job(pb.JOB_CANCELLING)))
        terminal.wait_for("cancelling")
        time.sleep(0.3)
        terminal.type("\x03")
        assert terminal.wait() == 1
        assert "no longer watching" in terminal.text
        assert "Traceback" not in terminal.text


def test_the_answer_to_a_cancel_is_an_end_too(fake: FakeDaemon) -> None:
    with OnTerminal(fake.address, "resize", "4G", "--yes") as terminal:
        fake.says.send(report(job()))
        terminal.wait_for("41 %")
        terminal.type("\x03")
        assert fake.says.cancel_asked.wait(10)
        fake.says.cancel_answer = job(pb.JOB_CANCELLED, reason="cancelled on request")
        assert terminal.wait() == 1
        assert "6442450944 bytes" in terminal.text


def test_a_daemon_that_went_away_and_came_back(fake: FakeDaemon) -> None:
    with OnTerminal(fake.address, "resize", "4G", "--yes") as terminal:
        fake.says.send(report(job()))
        terminal.wait_for("41 %")
        fake.stop()
        terminal.wait_for("lost storaged, looking for it")
        fake.start()
        fake.says.send(report(job(pb.JOB_DONE), size=4 * GIB))
        assert terminal.wait() == 0
        assert "done: the filesystem has 4.00 GiB" in terminal.text


def test_a_daemon_that_stays_away(fake: FakeDaemon) -> None:
    with OnTerminal(fake.address, "--timeout", "1", "resize", "4G", "--yes") as terminal:
        fake.says.send(report(job()))
        terminal.wait_for("41 %")
        fake.stop()
        assert terminal.wait() == 1
        said = " ".join(terminal.text.split())
        assert "how the resize goes on is not known" in said
        assert "gave up after 1 s" in said


def test_a_stream_that_the_daemon_ends_is_begun_again(fake: FakeDaemon) -> None:
    fake.says.send(report(job()))
    fake.says.send(None)
    fake.says.send(report(job(pb.JOB_DONE), size=4 * GIB))
    assert ctl(fake.address, "resize", "4G", "--yes").returncode == 0


def test_a_closed_pipe_is_quiet_and_does_not_say_done(fake: FakeDaemon) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        (*CTL, "--guest", fake.address, "resize", "4G", "--yes"),
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    os.close(writing)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (1, b"")


# --- which end it was ---------------------------------------------------------------------------------------------


def test_the_job_before_ours_is_not_ours() -> None:
    follower = Follower("old", 4 * GIB)
    outcome = follower.saw(report(job(pb.JOB_DONE, key="old")))
    assert outcome is not None
    assert outcome.name == "unknown"


@pytest.mark.parametrize(("size", "name"), [(4 * GIB, "done"), (6 * GIB, "unknown")])
def test_a_daemon_that_forgot_the_job_is_judged_by_the_size(size: int, name: str) -> None:
    follower = Follower("", 4 * GIB + 5)  # the kernel rounds down to a sector
    assert follower.saw(report(job(requested_size=4 * GIB + 5))) is None
    outcome = follower.saw(report(size=size))
    assert outcome is not None
    assert (outcome.name, outcome.size) == (name, size)


@pytest.mark.parametrize(("start", "name"), [(4 * GIB, "done"), (6 * GIB, "unknown")])
@pytest.mark.parametrize("seen", [True, False])
def test_a_later_job_tells_how_ours_ended(seen: bool, start: int, name: str) -> None:
    follower = Follower("old", 4 * GIB)
    if seen:
        assert follower.saw(report(job())) is None
    later = job(key="later", start_size=start, requested_size=20 * GIB, direction=pb.DIRECTION_GROW)
    outcome = follower.saw(report(later, size=start))
    assert outcome is not None
    assert (outcome.name, outcome.size) == (name, start)
