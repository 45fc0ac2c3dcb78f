"""storagectl and storaged-host: a simulated pool in a process of its own, asked as people ask it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.simulated import SimulatedHost
from storaged.ctl import host_show
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.units import GIB
from tests.ctl.conftest import CTL, OnTerminal, environment

NAMES = ["build", "ci", "db", "desktop", "mail", "web"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedHost]:
    with SimulatedHost(tmp_path_factory.mktemp("host")) as running:
        yield running


def ask(host: SimulatedHost, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """storagectl without a terminal, told by its environment where the host is."""
    return subprocess.run(
        (*CTL, *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(STORAGED_HOST=host.control, **more),
        check=False,
    )


def guests(host: SimulatedHost) -> dict[str, dict[str, int]]:
    return {guest["name"]: guest for guest in json.loads(ask(host, "guests", "--json").stdout)["guests"]}


def test_guests_are_a_table_with_bars(host: SimulatedHost) -> None:
    done = ask(host, "guests")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "SIZE", "COST", "AVAIL", "BALLOON", "LEAST", "USE"]
    assert [line.split()[0] for line in lines[1:7]] == NAMES
    assert all("[#" in line and "o" in line.partition("[")[2] for line in lines[1:7])
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in ask(host, "guests", COLUMNS="40").stdout.splitlines()[1:7]] == NAMES
    assert all(len(line) <= 40 for line in ask(host, "guests", COLUMNS="40").stdout.splitlines())


def test_guests_as_json(host: SimulatedHost) -> None:
    found = guests(host)
    assert list(found) == NAMES
    assert found["web"]["filesystem_bytes"] % GIB == 0
    assert found["web"]["minimum_bytes"] < found["web"]["filesystem_bytes"]


def test_the_pool(host: SimulatedHost) -> None:
    done = ask(host, "pool")
    assert done.returncode == 0
    assert "\nFree " in done.stdout
    assert "what guests may still write fits" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    value = json.loads(ask(host, "pool", "vms", "--json").stdout)
    assert value["promised_bytes"] + value["unbound_bytes"] <= value["free_bytes"]
    done = ask(host, "pool", "none")
    assert (done.returncode, done.stderr) == (1, "storagectl: no pool is called 'none'; known: vms\n")


def test_a_resize_from_beginning_to_end(host: SimulatedHost) -> None:
    size = guests(host)["web"]["filesystem_bytes"] - GIB
    done = ask(host, "resize", "web", str(size), "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Returns     1.00 GiB to the host" in done.stdout
    assert f"done: web has {size / GIB:.1f} GiB ({size} bytes)" in done.stdout
    assert guests(host)["web"]["filesystem_bytes"] == size
    value = json.loads(ask(host, "resize", "web", str(size + GIB), "--json").stdout)
    assert (value["outcome"], value["size_bytes"], value["resize"]["state"]) == ("done", size + GIB, "RESIZE_DONE")


def test_a_size_that_it_has_is_asked_for_all_the_same(host: SimulatedHost) -> None:
    # What the guest last reported may be old: only the host can say that there is nothing to do.
    size = guests(host)["ci"]["filesystem_bytes"]
    done = ask(host, "resize", "ci", str(size), "--json")
    value = json.loads(done.stdout)
    assert (done.returncode, value["outcome"], value["size_bytes"]) == (0, "done", size)
    assert value["resize"]["guest"] == "ci"
    assert "nothing to do: ci has" in ask(host, "resize", "ci", str(size)).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("resize", "web", "1G"), 1, "cannot shrink to 1.00 GiB"),
        (("resize", "nobody", "1G"), 1, "known: build, ci, db, desktop, mail, web"),
        (("resize", "web", "90T"), 1, "sharing.overcommit_limit"),
        (("resize", "90T", "--allow-overcommit"), 2, "with NAME"),
        (("resize", "mail", "60G"), 2, "a shrink needs a yes"),
        (("resize", "web", "much"), 2, "argument SIZE"),
        (("resize", "web", "1G", "2G"), 2, "NAME and SIZE are accepted"),
        (("cancel", "web"), 1, "nothing was cancelled"),
        (("--host", "unix:/none/such", "guests"), 1, "cannot reach storaged-host at unix:/none/such"),
        (("--host", "tcp:192.0.2.1:1", "guests"), 2, "a unix socket, or a loopback address"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    host: SimulatedHost, arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = ask(host, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_cancels_the_resize(host: SimulatedHost) -> None:
    before = guests(host)["mail"]
    with OnTerminal("unix:/none", "--host", host.control, "resize", "mail", str(before["minimum_bytes"] + GIB)) as on:
        on.wait_for("Shrink it? [y/N]")
        on.type("y\n")
        on.wait_for("MiB/s")
        on.type("\x03")
        on.wait_for("asking storaged-host to cancel")
        assert on.wait() == 1
        assert "the resize of mail was cancelled" in on.text
    assert guests(host)["mail"]["filesystem_bytes"] == before["filesystem_bytes"]


def test_a_running_resize_is_seen_and_cancelled_by_another(host: SimulatedHost) -> None:
    least = guests(host)["db"]["minimum_bytes"]
    command = (*CTL, "resize", "db", str(least + GIB), "--yes")
    with subprocess.Popen(
        command, env=environment(STORAGED_HOST=host.control), stderr=subprocess.PIPE, text=True
    ) as one:
        while "shrinking" not in ask(host, "guests").stdout:
            assert one.poll() is None
        assert "is being resized already" in ask(host, "resize", "db", "63G", "--yes").stderr
        done = ask(host, "cancel", "db")
        assert (done.returncode, done.stderr) == (0, "")
        assert one.wait(20) == 1


def test_watching_is_a_line_for_each_report_or_a_screen(host: SimulatedHost) -> None:
    with subprocess.Popen(
        (*CTL, "watch", "--json"), env=environment(STORAGED_HOST=host.control), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(2)
        assert process.wait(20) == 0
    assert second["sequence"] > first["sequence"]
    assert first["pools"][0]["history"]
    with OnTerminal("unix:/none", "watch") as on:
        assert on.wait() == 1  # --guest says that a guest is meant
    with OnTerminal("", "--host", host.control, "watch") as on:
        on.wait_for("desktop")
        on.wait_for("Pressure")
        on.type("\x03")
        assert on.wait() == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [("storagectl resize d", ["db", "desktop"]), ("storagectl pool ", ["vms"]), ("storagectl gue", ["guests"])],
)
def test_tab_completes_commands_and_names(host: SimulatedHost, tmp_path: Path, line: str, expected: list[str]) -> None:
    output = tmp_path / "out"
    subprocess.run(
        CTL,
        env=environment(
            STORAGED_HOST=host.control,
            _ARGCOMPLETE="1",
            _ARGCOMPLETE_IFS="\n",
            _ARGCOMPLETE_STDOUT_FILENAME=str(output),
            COMP_LINE=line,
            COMP_POINT=str(len(line)),
            COMP_TYPE="9",
        ),
        timeout=30,
        check=False,
        capture_output=True,
    )
    found = [word.strip() for word in output.read_text().split("\n") if not word.startswith("-")]
    assert found == expected


def test_bash_takes_the_completion(host: SimulatedHost) -> None:
    code = ask(host, "completion", "bash").stdout
    checked = subprocess.run(
        ("bash", "-c", f"{code}\ncomplete -p storagectl"), capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "#compdef storagectl" in ask(host, "completion", "zsh").stdout


SIZES = st.integers(0, 1 << 62)
GUESTS = st.lists(
    st.builds(
        pb.Guest,
        name=st.text(max_size=70),
        state=st.sampled_from(list(pb.GuestState.values())),
        logical_bytes=SIZES,
        allocated_bytes=SIZES,
        balloon_bytes=SIZES,
        available_bytes=SIZES,
        minimum_bytes=SIZES,
        stale_reason=st.sampled_from(["", "it does not answer"]),
    ),
    max_size=4,
)


@given(GUESTS, st.integers(1, 200))
def test_a_table_fits_any_width(found: list[pb.Guest], width: int) -> None:
    lines = host_show.table(found, width)
    assert all(len(line) <= max(width, host_show.NAME_MOST, len("no guests are known")) for line in lines)
    assert all(character.isprintable() for line in lines for character in line)
