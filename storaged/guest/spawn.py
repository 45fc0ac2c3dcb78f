"""Real programs: started without a shell, each in its own session, and reaped when their pidfd says so."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from storaged.guest.processes import Child, Launch, Outcome, ProcessSettings, Status, base_environment

log = logging.getLogger(__name__)
_STARTS_AT_ONCE = 8
"""An exec from a filesystem that hangs takes a thread with it."""


def hand_down_default_signals() -> None:
    """Make signals that this process ignores, ignored by a handler instead: programs then start with the default.

    A handler does not outlive exec(2), "ignored" does. Call it from the main thread. What Python itself ignores
    (SIGPIPE, SIGXFSZ) subprocess resets.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _nothing)


def _nothing(*_: object) -> None:
    pass


def _no_blocked_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class RealSpawner:
    """Starts programs as children of this process."""

    def __init__(self, settings: ProcessSettings, environment: Mapping[bytes, bytes] | None = None) -> None:
        self._console = settings.console
        found = environment if environment is not None else os.environb
        self._environment = base_environment(os.getpid(), found)
        # A program inherits the blocked signals of the thread that starts it.
        self._threads = ThreadPoolExecutor(
            _STARTS_AT_ONCE, thread_name_prefix="launch", initializer=_no_blocked_signals
        )
        self._watched: dict[int, subprocess.Popen[bytes]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self, launch: Launch) -> Child:
        self._loop = asyncio.get_running_loop()
        program, pidfd = await self._loop.run_in_executor(self._threads, self._popen, launch)
        child = Child(program.pid, self._loop.create_future())
        self._watched[pidfd] = program
        self._loop.add_reader(pidfd, self._reap, pidfd, child)
        return child

    def _popen(self, launch: Launch) -> tuple[subprocess.Popen[bytes], int]:
        stream = self._stream(console=launch.console)
        try:
            program = subprocess.Popen(
                launch.argv,
                env={**self._environment, **dict(launch.env)},
                stdin=stream,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                umask=0o022,
                cwd="/",
            )
        except UnicodeError as error:  # no text of ours: subprocess found no words for an exec that failed
            raise OSError(str(error)) from error
        finally:
            os.close(stream)
        try:
            return program, os.pidfd_open(program.pid)
        except OSError:
            program.kill()
            program.wait()
            raise

    def _stream(self, *, console: bool) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        if console:
            try:
                # A serial line without a carrier would keep an open that may block waiting for ever.
                stream = os.open(self._console, flags | os.O_NOCTTY | os.O_NONBLOCK)
            except OSError as error:
                log.warning("console %s: %s; /dev/null takes its place", self._console, error.strerror)
            else:
                os.set_blocking(stream, True)
                return stream
        return os.open(os.devnull, flags)

    def _reap(self, pidfd: int, child: Child) -> None:
        program = self._watched[pidfd]
        code = program.poll()
        if code is None:
            return
        self._forget(pidfd)
        if not child.ended.done():
            child.ended.set_result(Outcome(Status.EXITED, code) if code >= 0 else Outcome(Status.SIGNALED, -code))

    def _forget(self, pidfd: int) -> None:
        del self._watched[pidfd]
        if self._loop is not None:
            self._loop.remove_reader(pidfd)
        os.close(pidfd)

    def close(self) -> None:
        for pidfd, program in list(self._watched.items()):
            self._forget(pidfd)
            if program.poll() is None:
                program.returncode = 0  # it is process 1's from now on: nothing here is to look for it
        with contextlib.suppress(RuntimeError):
            self._threads.shutdown(wait=False, cancel_futures=True)
