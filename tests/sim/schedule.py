"""One thread at a time, and the test says which: threads, locks, events, executors and the event loop under a schedule.

The threads are real. Each holds the baton from one *point* to the next: a call of a port of the simulation, a lock, an
event that it waits for, a sleep. There it gives the baton back, and whoever `choose`s says who goes on. Time is the
simulation's and moves only when nobody can do anything, or when the test says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

from storaged import writer
from storaged.balloon import engine, metadata
from storaged.resize import calls, heal, runner
from storaged.sim import SimClock, disk, resizer
from storaged.sim.faults import Faults

ENDLESS = 200_000
"""Turns after which nothing comes to rest any more."""


class Killed(BaseException):
    """The machine stops: the thread is to end here."""


class Choice(Protocol):
    """Which of `count` goes on."""

    def __call__(self, count: int) -> int: ...


class Actor:
    """A thread that runs only while it has the baton."""

    def __init__(self, schedule: Schedule, name: str, work: Callable[[], None]) -> None:
        self.name = name
        self._schedule = schedule
        self._work = work
        self._baton = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.until: float | None = None
        self.ended = self.killed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._baton.acquire()
        with contextlib.suppress(Killed):
            if not self.killed:
                self._work()
        self.ended = True
        self._schedule.back.release()

    def turn(self) -> None:
        """From the test's thread: let it run to its next point."""
        self._schedule.running = self
        self._baton.release()
        self._schedule.back.acquire()
        self._schedule.running = None
        if self.ended:
            self._thread.join()

    def point(self, ready: Callable[[], bool], until: float | None) -> None:
        """From the thread itself: give the baton back until `ready`, or until that time."""
        if self.killed:
            raise Killed
        self.ready, self.until = ready, until
        self._schedule.back.release()
        self._baton.acquire()
        if self.killed:
            raise Killed

    @property
    def can(self) -> bool:
        """True when it has something to do."""
        return self.ready() or (self.until is not None and self._schedule.clock.now >= self.until)


class Lock:
    """`threading.RLock` whose wait is a point, and the taking of it too."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._owner: object = None
        self._depth = 0

    def __enter__(self) -> bool:
        me = self._schedule.running
        if self._owner is not me or not self._depth:
            self._schedule.point(lambda: not self._depth)
            assert not self._depth, "the event loop may not wait for a lock"
        self._owner = me
        self._depth += 1
        return True

    def __exit__(self, *_: object) -> None:
        self._depth -= 1


class Event:
    """`threading.Event` whose wait is a point."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._flag = False

    def set(self) -> None:
        self._flag = True

    def clear(self) -> None:
        self._flag = False

    def is_set(self) -> bool:
        return self._flag

    def wait(self, timeout: float | None = None) -> bool:
        self._schedule.point(self.is_set, timeout)
        return self._flag


class Thread:
    """`threading.Thread` as an actor."""

    def __init__(self, schedule: Schedule, *, target: Callable[[], None], name: str, daemon: bool) -> None:
        self._schedule = schedule
        self._what = (name, target)
        self._actor: Actor | None = None

    def start(self) -> None:
        self._actor = self._schedule.actor(*self._what)

    def join(self) -> None:
        actor = self._actor
        assert actor is not None
        self._schedule.point(lambda: actor.ended)


class Executor:
    """A ThreadPoolExecutor of one thread, as an actor."""

    def __init__(self, schedule: Schedule, _threads: int, *, thread_name_prefix: str) -> None:
        self._schedule = schedule
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._closed = False
        schedule.actor(thread_name_prefix, self._work)

    def _work(self) -> None:
        while not self._closed:
            self._schedule.point(lambda: bool(self._queue) or self._closed)
            while self._queue:
                future, call = self._queue.popleft()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    result = call()
                except Exception as error:  # noqa: BLE001  # whatever the call raised is the future's
                    future.set_exception(error)
                else:
                    future.set_result(result)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.append((future, lambda: call(*arguments)))
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:  # as the real one is called
        self._closed = True
        for future, _ in self._queue:
            future.cancel()


class Loop(asyncio.SelectorEventLoop):
    """An event loop of the simulation's time, run a turn at a time."""

    def __init__(self, clock: SimClock) -> None:
        super().__init__()
        self._sim_clock = clock
        self.set_exception_handler(self._fails)
        self.failures: list[str] = []

    def _fails(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), asyncio.CancelledError):
            self.failures.append(str(context))

    def time(self) -> float:
        return self._sim_clock.now

    @property
    def next_timer(self) -> float | None:
        """When the next timer is due."""
        times = [handle.when() for handle in self._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
        return min(times, default=None)

    @property
    def can(self) -> bool:
        """True when it has something to do."""
        at = self.next_timer
        return bool(self._ready) or (at is not None and at <= self.time())  # type: ignore[attr-defined]

    def turn(self) -> None:
        """Run what is ready, once."""
        self.call_soon(self.stop)
        self.run_forever()


class Schedule:
    """Who runs when. Made, used and closed by the test's thread."""

    def __init__(self, clock: SimClock, choose: Choice) -> None:
        self.clock = clock
        self.choose = choose
        self.back = threading.Semaphore(0)
        self.running: Actor | None = None
        self.loop = Loop(clock)
        self._actors: list[Actor] = []
        self._patches = contextlib.ExitStack()
        self._take_over()

    def _take_over(self) -> None:
        logging.disable(logging.ERROR)  # what is noted is in the snapshot
        self._patches.callback(logging.disable, logging.NOTSET)
        time = SimpleNamespace(monotonic=lambda: self.clock.now, sleep=self._sleep)
        threads = SimpleNamespace(
            Event=lambda: Event(self), RLock=lambda: Lock(self), Thread=lambda **how: Thread(self, **how)
        )
        names = {"time": (engine, metadata, calls, heal, runner, resizer), "threading": (engine, calls, runner, disk)}
        for name, stands_in in (("time", time), ("threading", threads)):
            for module in names[name]:
                self._patches.enter_context(mock.patch.object(module, name, stands_in))
        executor = mock.patch.object(writer, "ThreadPoolExecutor", lambda *a, **k: Executor(self, *a, **k))
        self._patches.enter_context(executor)
        meet = Faults.meet

        def point_and_meet(faults: Faults, operation: str) -> None:
            self.point(lambda: True)
            meet(faults, operation)

        self._patches.enter_context(mock.patch.object(Faults, "meet", point_and_meet))

    def actor(self, name: str, work: Callable[[], None]) -> Actor:
        """A thread that runs when it is chosen."""
        one = Actor(self, name, work)
        self._actors.append(one)
        return one

    def point(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        """Another may go on here. The event loop, which waits for nobody, goes on."""
        if self.running is not None:
            self.running.point(ready, None if timeout is None else self.clock.now + timeout)

    def _sleep(self, seconds: float) -> None:
        self.point(lambda: False, seconds)

    def _able(self) -> list[Callable[[], None]]:
        self._actors = [actor for actor in self._actors if not actor.ended]
        able = [actor.turn for actor in self._actors if actor.can]
        return [self.loop.turn, *able] if self.loop.can else able

    def run(self, turns: int) -> None:
        """So many turns, each of whoever is chosen; time stands."""
        for _ in range(turns):
            if not (able := self._able()):
                return
            able[self.choose(len(able))]()

    def rest(self, until: float | None = None) -> None:
        """Run until nobody can do anything; with `until`, let time pass up to it."""
        for _ in range(ENDLESS):
            if able := self._able():
                able[self.choose(len(able))]()
                continue
            times = [actor.until for actor in self._actors if actor.until is not None]
            if (timer := self.loop.next_timer) is not None:
                times.append(timer)
            following = min(times, default=None)
            if until is None or following is None or following > until:
                self.clock.now = max(self.clock.now, until or 0)
                return
            self.clock.now = max(self.clock.now, following)
        raise AssertionError(f"no rest after {ENDLESS} turns: {[actor.name for actor in self._actors if actor.can]}")

    def ends(self, task: asyncio.Future[Any], within_s: float = 120.0) -> Any:
        """The result of `task`, with all the time that it needs."""
        end = self.clock.now + within_s
        for _ in range(ENDLESS):
            if task.done():
                return task.result()
            able = self._able()
            if able:
                able[self.choose(len(able))]()
                continue
            times = [*(a.until for a in self._actors if a.until is not None), *self._timers()]
            assert min(times, default=end + 1) <= end, "it never ends"
            self.clock.now = max(self.clock.now, min(times))
        raise AssertionError("it does not end")

    def _timers(self) -> Iterator[float]:
        if (timer := self.loop.next_timer) is not None:
            yield timer

    def kill(self) -> None:
        """The machine stops: every thread ends at the point where it is, and what the loop had to do is forgotten."""
        for actor in self._actors:
            actor.killed = True
        for actor in self._actors:
            while not actor.ended:
                actor.turn()
        self._actors.clear()
        old, self.loop = self.loop, Loop(self.clock)
        for _ in range(ENDLESS):  # no thread works for it any more: it can change nothing
            if not (left := asyncio.all_tasks(old)):
                break
            for task in left:
                task.cancel()
            old.turn()
        old.close()

    def close(self) -> None:
        """Nothing of it is left."""
        self.kill()
        self.loop.close()
        self._patches.close()
