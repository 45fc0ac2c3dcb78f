"""What must survive a crash of the host's daemon: the sagas of one pool, in a file that is old or new, never half."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import zlib
from collections.abc import Sequence
from typing import Any

from storaged.errors import StoragedError
from storaged.host.saga_model import Direction, Outcome, Saga, Stage

log = logging.getLogger(__name__)
_FIELDS = {field.name for field in dataclasses.fields(Saga)}


class Journal:
    """The file at `path`: a checksum, then JSON. Blocks; belongs into a thread."""

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self) -> list[Saga]:
        """What was saved last; a file that cannot be believed is put aside, with a warning. Raises StoragedError."""
        try:
            with open(self.path, "rb", opener=_without_waiting) as file:
                raw = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoragedError(f"journal {self.path}: {error.strerror}") from error
        checksum, _, body = raw.partition(b"\n")
        try:
            if int(checksum, 16) != zlib.crc32(body):
                raise ValueError("the checksum does not match")
            return [_saga(record) for record in json.loads(body)]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.warning("journal %s cannot be believed (%s); it is put aside", self.path, error)
            os.replace(self.path, f"{self.path}.damaged")
            return []

    def save(self, sagas: Sequence[Saga]) -> None:
        """Write them, and wait until the disk has them. Raises OSError."""
        body = json.dumps([_record(saga) for saga in sagas], indent=1).encode()
        directory = os.path.dirname(self.path)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        new = f"{self.path}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(b"%08x\n%s\n" % (zlib.crc32(body + b"\n"), body))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for a writer


def _record(saga: Saga) -> dict[str, Any]:
    record = {name: getattr(saga, name) for name in sorted(_FIELDS)}
    record |= {"direction": saga.direction.value, "stage": saga.stage.value}
    record["outcome"] = saga.outcome.value if saga.outcome is not None else None
    return record


def _saga(record: dict[str, Any]) -> Saga:
    known = {name: value for name, value in record.items() if name in _FIELDS}
    known |= {"direction": Direction(record["direction"]), "stage": Stage(record["stage"])}
    known["outcome"] = Outcome(record["outcome"]) if record["outcome"] is not None else None
    saga = Saga(**known)
    if min(saga.to, saga.start, saga.image_start) < 0:
        raise ValueError(f"sizes of {saga.id}")
    return saga
