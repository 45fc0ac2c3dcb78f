"""The kernel's command line: what it may say, and that nothing it says can stop the daemon."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.cmdline import KernelOptions, parse, read


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", KernelOptions(True, 7777)),
        ("ro quiet console=ttyS0\n", KernelOptions(True, 7777)),
        ("maitred.no_startup_processes", KernelOptions(False, 7777)),
        ("a maitred.listen_port=1234 b", KernelOptions(True, 1234)),
        ("maitred.listen_port=1 maitred.listen_port=2", KernelOptions(True, 2)),
        ("maitred.listen_port=5 maitred.listen_port=x", KernelOptions(True, 5)),
        ("maitred.listen_port=", KernelOptions(True, 7777)),
        ("maitred.listen_port", KernelOptions(True, 7777)),
        ("maitred.listen_port=0", KernelOptions(True, 7777)),
        ("maitred.listen_port=4294967295", KernelOptions(True, 7777)),
        ("maitred.listen_port=-1", KernelOptions(True, 7777)),
        ("maitred.listen_port=\N{ARABIC-INDIC DIGIT SEVEN}", KernelOptions(True, 7777)),
        ("xmaitred.no_startup_processes maitred.no_startup_processesx", KernelOptions(True, 7777)),
        ("init=/x -- maitred.no_startup_processes maitred.listen_port=3", KernelOptions(True, 7777)),
    ],
)
def test_options(text: str, options: KernelOptions) -> None:
    assert parse(text) == options


@given(st.text(max_size=200) | st.lists(st.sampled_from(["maitred.listen_port=", "7", " ", "--", "="])).map("".join))
def test_any_command_line_is_read(text: str) -> None:
    assert 0 < parse(text).listen_port < 0xFFFFFFFF


def test_it_is_read_from_a_file_and_a_missing_one_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "cmdline"
    assert read(str(file)) == KernelOptions()
    file.write_bytes(b"\xff maitred.listen_port=9")
    assert read(str(file)).listen_port == 9
    assert read().listen_port  # this machine's own
