"""The startup folder: launch requests as text, carried out in the order of their names before the daemon serves."""

from __future__ import annotations

import asyncio
import logging
import os
import stat

from storaged.errors import InvalidRequest, StoragedError
from storaged.guest.processes import Launch, Processes
from storaged.rpc.decode_processes import launch
from storaged.rpc.proto import vm_guest_pb2

log = logging.getLogger(__name__)
MOST_BYTES = 1 << 20


def read_request(path: str) -> Launch:
    """The launch in the file at `path`. Raises InvalidRequest, OSError."""
    from google.protobuf import text_format  # only a guest with such files pays for it

    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest("is not a file")
        if found.st_mode & 0o022 or found.st_uid not in (0, os.geteuid()):
            raise InvalidRequest("may be written by others than its owner, root: it is not carried out")
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InvalidRequest(f"has more than {MOST_BYTES} bytes")
    request = vm_guest_pb2.LaunchProcessRequest()
    try:
        text_format.Parse(content.decode(), request)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"is no LaunchProcessRequest: {error}") from error
    return launch(request)


async def run_startup(processes: Processes) -> list[str]:
    """Carry out the folder's requests; what went wrong, a sentence each. A broken file keeps no other back."""
    folder = processes.settings.startup
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        return _told([f"startup folder {folder}: {error.strerror}"])
    wrong = []
    for name in names:
        path = os.path.join(folder, name)
        try:
            request = read_request(path)
            outcome = await asyncio.wait_for(processes.launch(request), processes.settings.startup_wait_s)
            log.info("%s: %s %s", path, request.name, outcome)
            if outcome.status.name == "FAILED":
                wrong.append(f"{path}: {request.name} could not be started")
        except StoragedError as error:
            wrong.append(f"{path} {error.message}")
        except TimeoutError:
            wrong.append(f"{path}: did not end within {processes.settings.startup_wait_s:g} s; it is left running")
        except OSError as error:
            wrong.append(f"{path}: {error.strerror}")
    return _told(wrong)


def _told(wrong: list[str]) -> list[str]:
    for sentence in wrong:
        log.warning("%s", sentence)
    return wrong
