"""A small document that survives a crash: either the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib

from storaged.btrfs.filesystem import kernel

log = logging.getLogger(__name__)
NAME = "journal.json"


class FileJournal:
    """`<directory>/journal.json`, replaced atomically, with a checksum against a torn disk."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        with contextlib.suppress(OSError):  # said when it is needed: the daemon serves without, and says so
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self._last: bytes | None = None

    def load(self) -> dict[str, object] | None:
        """The document; None when there is none, or when it cannot be believed (logged, and put aside)."""
        path = os.path.join(self._directory, NAME)
        try:
            with open(path, "rb") as file:
                raw = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            checksum, _, body = raw.partition(b"\n")
            if int(checksum, 16) != zlib.crc32(body):
                raise ValueError("the checksum does not match")
            record = json.loads(body)
            if not isinstance(record, dict):
                raise ValueError("not an object")  # noqa: TRY004  # a damaged document, as the others here
        except ValueError as error:
            log.warning("journal %s cannot be believed (%s); it is put aside", path, error)
            os.replace(path, path + ".damaged")
            return None
        return record

    def save(self, record: dict[str, object]) -> None:
        body = json.dumps(record, sort_keys=True).encode()
        path = os.path.join(self._directory, NAME)
        if body == self._last and os.path.exists(path):
            return
        with kernel("writing the journal"):
            os.makedirs(self._directory, mode=0o700, exist_ok=True)  # someone may have removed it
            fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as file:
                file.write(b"%08x\n%s" % (zlib.crc32(body), body))
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".new", path)
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        self._last = body
