"""Text from messages: it fits, it says what matters, and nothing a daemon sends can harm a terminal."""

from __future__ import annotations

import json

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from storaged.ctl import encode, show
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.units import GIB, MIB
from tests.ctl.fake import job, report

BIG = st.integers(0, (1 << 63) - 1)
TEXT = st.text(max_size=200)


@st.composite
def reports(draw: st.DrawFn) -> pb.Report:
    """Any report, however absurd."""
    made = report()
    made.notes[:] = draw(st.lists(TEXT, max_size=8))
    fs, held, told = made.filesystem, made.balloon, made.pressure
    fs.mountpoint, fs.exclusive_operation = draw(TEXT), draw(TEXT)
    fs.size_bytes, fs.available_bytes, fs.device_bytes = draw(BIG), draw(BIG), draw(BIG)
    fs.read_only, fs.discard_supported = draw(st.booleans()), draw(st.booleans())
    held.size_bytes, held.target_bytes, held.failure_reason = draw(BIG), draw(BIG), draw(TEXT)
    held.state = draw(st.integers(0, 9))  # type: ignore[assignment]
    told.level = draw(st.integers(0, 9))  # type: ignore[assignment]
    if draw(st.booleans()):
        running = job(draw(st.integers(0, 9)), progress=draw(st.floats()), reason=draw(TEXT))  # type: ignore[arg-type]
        running.moved_bytes, running.total_to_move_bytes = draw(BIG), draw(BIG)
        made.job.CopyFrom(running)
    if draw(st.booleans()):
        made.bounds.minimum_size = draw(BIG)
        made.bounds.why = draw(TEXT)
    return made


@given(reports(), st.integers(10, 120))
def test_every_line_of_every_report_fits_and_is_harmless(made: pb.Report, width: int) -> None:
    lines = show.layout(show.status(made), width)
    assert all(len(line) <= width for line in lines)
    assert all(line.isprintable() for line in lines)
    assert len(show.summary(made, width)) <= width


@given(reports())
def test_json_has_the_same_shape_whatever_is_known(made: pb.Report) -> None:
    def shape(value: object, of: object) -> None:
        if isinstance(value, dict) and isinstance(of, dict):
            assert list(value) == list(of)
            for key in value:
                shape(value[key], of[key])

    full = encode.as_dict(report(job()))
    shape(encode.as_dict(made), full)
    assert list(encode.as_dict(pb.Report())) == list(full)
    assert "\n" not in encode.line(encode.as_dict(made))


def test_json_has_numbers_zeros_and_nulls() -> None:
    value = json.loads(encode.line(encode.as_dict(report())))
    assert value["filesystem"]["size_bytes"] == 8 * GIB
    assert value["filesystem"]["read_only"] is False
    assert value["reclaimed_bytes_total"] == 0
    assert value["balloon"]["retry_in_s"] is None
    assert value["job"] is None
    assert value["pressure"]["level"] == "LEVEL_LOW"
    assert value["time"] == "2023-11-14T22:15:00Z"
    assert encode.as_dict(report(job()))["job"]["requested_size"] == 4 * GIB


def test_the_status_screen() -> None:
    assert show.layout(show.status(report(job())), 80) == [
        "storaged    0.1.0, 2023-11-14 22:15:00 UTC",
        "Pressure    LOW, the host has 1.50 GiB free, told 1 min 40 s ago",
        "Filesystem  /mnt/stateful, 8.00 GiB",
        "            applications can write 512 MiB, 2.00 GiB is not allocated",
        "            data 4.00 GiB of 5.00 GiB, metadata 20.0 MiB of 256 MiB",
        "Balloon     2.00 GiB, idle; applications may write 512 MiB",
        "            [##############################################oooooooooooooooo....]",
        "            # in use 5.50 GiB  o balloon 2.00 GiB  . free 512 MiB",
        "Job         shrink 8.00 GiB -> 4.00 GiB: running",
        "            [###########################.......................................]",
        "            41 %, 850 MiB of 2.00 GiB moved, 120 MiB/s, 3 min 24 s left",
        "Minimum     3.00 GiB (3221225472 bytes)",
        "            6.00 GiB without moving anything",
        "            a data chunk ends at 3221225472",
        "Given back  0 B discarded in total, as the kernel counts",
        "Notes       shrink from 8.00 GiB to 4.00 GiB begins",
    ]


def test_the_status_screen_when_things_are_bad() -> None:
    made = report(job(pb.JOB_FAILED, reason="no room"))
    made.filesystem.read_only, made.filesystem.discard_supported = True, False
    made.filesystem.exclusive_operation = "balance paused"
    made.balloon.state, made.balloon.failure_reason = pb.BALLOON_FAILED, "no space for 4096 bytes"
    made.balloon.retry_in_s, made.balloon.target_bytes = 4.0, 3 * GIB
    made.balloon.metadata_relief_bytes = 32 * MIB
    made.pressure.pending_level, made.pressure.ignored_reports = pb.LEVEL_NORMAL, 3
    made.notes[:] = [f"note {number}" for number in range(8)]
    text = " ".join("\n".join(show.layout(show.status(made), 80)).split())
    for said in (
        "READ-ONLY",
        "cannot discard",
        "balance paused",
        "FAILED, target 3.00 GiB",
        "no space for 4096 bytes; next try in 4.0 s",
        "gave up 32.0 MiB",
        "NORMAL once it has lasted",
        "3 reports without a number",
        "shrink 8.00 GiB -> 4.00 GiB: FAILED",
        "after 40 s, 850 MiB moved",
        "no room",
        "note 7",
        "(3 older ones: --json)",
    ):
        assert said in text
    assert "note 2" not in text


def test_an_unknown_minimum_and_a_host_that_never_spoke() -> None:
    made = report()
    made.pressure.Clear()
    made.bounds.CopyFrom(pb.Bounds(why="the disk does not answer"))
    made.balloon.ClearField("limit_bytes")
    text = "\n".join(show.layout(show.status(made), 80))
    assert "unknown, no host has reported yet" in text
    assert "Minimum     not known: the disk does not answer" in text
    assert "no limit" in text


def test_colour_changes_nothing_but_colour() -> None:
    rows = show.status(report(job()))
    painted = "\n".join(show.layout(rows, 80, color=True))
    assert "\033[33mLOW" in painted
    for code in ("0", "1", "1;31", "32", "33"):
        painted = painted.replace(f"\033[{code}m", "")
    assert painted == "\n".join(show.layout(rows, 80))


@given(st.lists(st.tuples(st.sampled_from("#o."), st.integers(0, 1 << 62)), max_size=4), st.integers(3, 100))
def test_a_bar_has_its_width(parts: list[tuple[str, int]], width: int) -> None:
    assert len(show.bar(parts, width)) == width


def test_a_bar_is_drawn_to_scale_and_hides_nothing() -> None:
    assert show.bar([("#", 50), ("o", 25), (".", 25)], 22) == "[##########ooooo.....]"
    assert show.bar([("#", 10000), ("o", 1), (".", 1)], 22) == "[##################o.]"
    assert show.bar([], 6) == "[....]"


def test_progress_says_only_what_is_known() -> None:
    assert show.progress(job()) == ["41 %", "850 MiB of 2.00 GiB moved", "120 MiB/s", "3 min 24 s left"]
    fresh = job(moved_bytes=0, total_to_move_bytes=0, progress=0.999, rate_bytes_per_s=None, eta_s=None)
    assert show.progress(fresh) == ["99 %", "at 6.00 GiB"]


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    assert show.fit(["41 %", "850 MiB", "12 s left"], 17) == "41 %, 850 MiB"
    assert show.fit(["abcdef", "x"], 4) == "abcd"


def test_the_summary_names_a_running_job_first() -> None:
    made = report(job())
    made.time.CopyFrom(Timestamp(seconds=1_700_000_100))
    assert show.summary(made, 80).startswith("22:15:00  LOW  shrink 41 %  balloon 2.00 GiB  free 512 MiB")
    assert "shrink" not in show.summary(report(job(pb.JOB_DONE)), 80)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (4 * GIB, ["4.00 GiB of /mnt/stateful", "3.00 GiB (3221225472 bytes)"]),
        (16 * GIB, ["8.00 GiB more for /mnt/stateful", "waits for it to grow"]),
    ],
)
def test_the_plan(size: int, said: list[str]) -> None:
    text = "\n".join(show.layout(show.plan(report(), size, 3 * GIB), 80))
    assert "8.00 GiB (8589934592 bytes)" in text
    assert all(piece in text for piece in said)
