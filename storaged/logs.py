"""Logs with the request they belong to: fields for the journal, lines for people."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import sys
import uuid
from collections.abc import Mapping
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
RPC_METHOD: ContextVar[str] = ContextVar("rpc_method", default="")
JOURNAL = "/run/systemd/journal/socket"
MOST_FIELD = 16 << 10
"""Longest field; with it an entry always fits into one datagram."""
_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}", re.ASCII)
_PRIORITY = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))


def request_id(offered: object) -> str:
    """`offered` when it is fit for a log and a header, else a new one."""
    return offered if isinstance(offered, str) and _SANE.fullmatch(offered) else uuid.uuid4().hex[:16]


class _WithRequest(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        identity = REQUEST_ID.get()
        record.request = f" [{identity}]" if identity else ""
        return True


class JournalHandler(logging.Handler):
    """Sends entries to journald in its native protocol: a datagram of fields."""

    def __init__(self, path: str = JOURNAL) -> None:
        super().__init__()
        # A journal that does not read must not stop us: what does not fit into its queue is counted, not waited for.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._path = path
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._lost:
                self._socket.sendto(encode(_lost(self._lost)), self._path)
                self._lost = 0
            self._socket.sendto(encode(record), self._path)
        except BlockingIOError:
            self._lost += 1
        except OSError:
            # The journal is away: the line is better on stderr than nowhere.
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{record.levelname} {record.name}: {record.getMessage()}\n")
        except Exception:  # noqa: BLE001  # a record that cannot be formatted is the library's to report
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


def _lost(count: int) -> logging.LogRecord:
    text = f"{count} lines are lost: the journal did not take them"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (), None)


def encode(record: logging.LogRecord) -> bytes:
    """`record` as journald wants it."""
    message = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        import traceback

        message += "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    fields: dict[str, str] = {
        "MESSAGE": message,
        "PRIORITY": str(next((number for level, number in _PRIORITY if record.levelno >= level), 7)),
        "SYSLOG_IDENTIFIER": "storaged",
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
        "THREAD_NAME": record.threadName or "",
        "REQUEST_ID": REQUEST_ID.get(),
        "RPC_METHOD": RPC_METHOD.get(),
    }
    entry = b""
    for name, text in fields.items():
        value = text.encode("utf-8", "replace")[:MOST_FIELD]
        if b"\n" in value:
            entry += name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
        elif value:
            entry += name.encode() + b"=" + value + b"\n"
    return entry


def stderr_is_journal(environment: Mapping[str, str], descriptor: int = 2) -> bool:
    """True when what is written to `descriptor` goes to the journal (`$JOURNAL_STREAM`, systemd.exec(5))."""
    device, separator, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(descriptor)
        return bool(separator) and (found.st_dev, found.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False


def setup(level: str) -> None:
    """Log from `level` on, to the journal if that is where stderr goes."""
    handler: logging.Handler
    if stderr_is_journal(os.environ):
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s:%(request)s %(message)s"))
        handler.addFilter(_WithRequest())
    for talkative in ("grpc", "asyncio"):
        logging.getLogger(talkative).setLevel(logging.INFO)
    logging.basicConfig(level=level.upper(), handlers=[handler])
