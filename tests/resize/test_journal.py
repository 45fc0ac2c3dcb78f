"""The journal on a real disk: the old document or the new one, whatever happens; a damaged one is put aside."""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storaged.errors import FilesystemError
from storaged.resize.journal import NAME, FileJournal

OLD: dict[str, object] = {"version": 1, "limit": 1}
NEW: dict[str, object] = {"version": 1, "limit": 2, "text": "ä\n\0"}


def test_nothing_was_written(tmp_path: Path) -> None:
    assert FileJournal(str(tmp_path / "a" / "b")).load() is None


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    FileJournal(str(tmp_path)).save(NEW)
    assert FileJournal(str(tmp_path)).load() == NEW
    FileJournal(str(tmp_path)).save(OLD)
    assert FileJournal(str(tmp_path)).load() == OLD
    assert os.listdir(tmp_path) == [NAME], "nothing else is left"


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    journal = FileJournal(str(tmp_path / "state"))
    journal.save(OLD)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / NAME).stat().st_mode) == 0o600


@pytest.mark.parametrize("torn", [b"", b"0", b"00000000\n", b"\xff" * 5000])
def test_a_crash_before_the_rename_leaves_the_old_one(tmp_path: Path, torn: bytes) -> None:
    FileJournal(str(tmp_path)).save(OLD)
    (tmp_path / f"{NAME}.new").write_bytes(torn)
    again = FileJournal(str(tmp_path))
    assert again.load() == OLD
    again.save(NEW)
    assert FileJournal(str(tmp_path)).load() == NEW


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_on_the_way_leaves_the_old_one_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    journal = FileJournal(str(tmp_path))
    journal.save(OLD)

    def broken(*_: object) -> None:
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        with pytest.raises(FilesystemError, match="writing the journal") as caught:
            journal.save(NEW)
    assert caught.value.errno == 5
    assert FileJournal(str(tmp_path)).load() == OLD
    journal.save(NEW)
    assert FileJournal(str(tmp_path)).load() == NEW, "the next try writes it"


def test_it_is_durable_before_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        order.append("fsync")
        fsync(fd)

    def noted_replace(source: str, target: str) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    FileJournal(str(tmp_path)).save(OLD)
    assert order == ["fsync", "replace", "fsync"], "the file, then its name, then the directory"


def test_a_short_write_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = FileJournal(str(tmp_path))
    journal.save(OLD)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, text: write(fd, text[: len(text) // 2]))
        try:
            journal.save(NEW)
        except FilesystemError:
            assert FileJournal(str(tmp_path)).load() == OLD
            return
    assert FileJournal(str(tmp_path)).load() == NEW


def test_the_same_document_is_not_written_twice(tmp_path: Path) -> None:
    journal = FileJournal(str(tmp_path))
    journal.save(OLD)
    before = (tmp_path / NAME).stat().st_ino
    journal.save(dict(reversed(OLD.items())))
    assert (tmp_path / NAME).stat().st_ino == before


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"{NAME}.new").symlink_to(victim)
    with pytest.raises(FilesystemError):
        FileJournal(str(tmp_path)).save(OLD)
    assert victim.read_text() == "precious"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_any_byte_that_changed_is_noticed(tmp_path: Path, at: int, byte: int) -> None:
    FileJournal(str(tmp_path)).save(NEW)
    path = tmp_path / NAME
    raw = bytearray(path.read_bytes())
    at %= len(raw)
    before, raw[at] = raw[at], byte
    path.write_bytes(bytes(raw))
    found = FileJournal(str(tmp_path)).load()
    assert found in (None, NEW)
    if found is None:
        assert before != byte
        assert (tmp_path / f"{NAME}.damaged").read_bytes() == bytes(raw)
        assert not path.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=64))
def test_whatever_lies_there_is_no_journal(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / NAME).write_bytes(raw)
    assert FileJournal(str(tmp_path)).load() is None
    assert (tmp_path / f"{NAME}.damaged").read_bytes() == raw


@pytest.mark.parametrize("document", [[], 1, None, "text"])
def test_a_document_of_another_kind_is_put_aside(tmp_path: Path, document: object) -> None:
    body = json.dumps(document).encode()
    (tmp_path / NAME).write_bytes(b"%08x\n%s" % (zlib.crc32(body), body))
    assert FileJournal(str(tmp_path)).load() is None
    assert (tmp_path / f"{NAME}.damaged").exists()
