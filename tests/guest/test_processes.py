"""What may be asked for, and when a program is started again: pure, and on the simulation."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.guest.processes import (
    Child,
    Launch,
    Outcome,
    Processes,
    ProcessSettings,
    Status,
    base_environment,
    may_start,
    parse_launch,
)
from storaged.sim.processes import SimSpawner

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
names = st.text(st.characters(exclude_characters="\0=", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(words, min_size=1), st.dictionaries(names, words), st.booleans(), st.booleans())
def test_what_is_sound_arrives_as_it_was_sent(
    argv: list[str], env: dict[str, str], respawn: bool, console: bool
) -> None:
    launch = parse_launch(argv, env, respawn=respawn, console=console)
    assert [word.decode() for word in launch.argv] == argv
    assert {name.decode(): value.decode() for name, value in launch.env} == env
    assert (launch.respawn, launch.console, launch.wait) == (respawn, console, False)


@pytest.mark.parametrize(
    ("argv", "env", "both", "field"),
    [
        ([], {}, False, "argv"),
        (["true"], {}, True, "respawn"),
        (["true", "a\0b"], {}, False, "argv[1]"),
        (["\0"], {}, False, "argv[0]"),
        (["true"], {"A=B": "c"}, False, "env name 'A=B'"),
        (["true"], {"": "c"}, False, "env name ''"),
        (["true"], {"A\0": "c"}, False, "env name"),
        (["true"], {"A": "c\0d"}, False, "env A"),
    ],
)
def test_what_is_not_is_refused_by_name(argv: list[str], env: dict[str, str], both: bool, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_launch(argv, env, respawn=both, wait=both)
    assert field in caught.value.message


def test_process_1_hands_down_a_path_and_nothing_else() -> None:
    found = {b"HOME": b"/", b"PATH": b"/odd", b"NOTIFY_SOCKET": b"/run/n", b"WATCHDOG_USEC": b"1", b"LISTEN_FDS": b"1"}
    assert base_environment(1, found) == {b"PATH": b"/usr/bin:/usr/sbin:/bin:/sbin"}
    assert base_environment(2, found) == {b"HOME": b"/", b"PATH": b"/odd"}


@given(st.lists(st.floats(0, 8, allow_nan=False), max_size=200), st.integers(1, 12), st.floats(1, 60))
def test_no_window_ever_has_more_starts_than_are_allowed(gaps: list[float], most: int, window: float) -> None:
    settings = ProcessSettings(respawn_starts=most, respawn_window_s=window)
    starts, now = [0.0], 0.0
    for gap in gaps:
        now += gap
        allowed = may_start(starts, now, settings)
        lately = [start for start in starts if now - start < window]
        assert allowed == (len(lately) < most)
        if not allowed:
            break
        starts.append(now)


class Respawned:
    """A service on the simulation with a clock of its own and a host that takes reports."""

    def __init__(self, settings: ProcessSettings | None = None) -> None:
        self.now = 0.0
        self.reports: list[tuple[str, int]] = []
        self.spawner = SimSpawner()
        self.processes = Processes(self.spawner, settings, report=self.report, clock=lambda: self.now)

    async def report(self, name: str) -> None:
        """Notes how many starts there had been when it came."""
        self.reports.append((name, len(self.spawner.started)))

    async def end(self) -> None:
        """The newest child ends by a signal, and everybody who waits for that runs."""
        self.spawner.kill(max(self.spawner._children))
        for _ in range(20):
            await asyncio.sleep(0)


SLEEP = parse_launch(["/bin/sleep", "1000"], respawn=True)


async def test_the_tenth_start_in_30_seconds_is_the_last_and_every_end_is_reported_first() -> None:
    world = Respawned()
    assert (await world.processes.launch(SLEEP)).status is Status.LAUNCHED
    for starts in range(1, 10):
        world.now += 3.3
        await world.end()
        assert len(world.spawner.started) == starts + 1
    world.now = 29.99
    await world.end()
    assert len(world.spawner.started) == 10
    assert world.reports == [("sleep", starts) for starts in range(1, 11)], "each report comes before the next start"
    assert world.processes.running == 0
    await world.processes.close()


async def test_one_that_ends_more_slowly_is_started_again_for_ever() -> None:
    world = Respawned()
    await world.processes.launch(SLEEP)
    for starts in range(1, 40):
        world.now += 3.34
        await world.end()
        assert len(world.spawner.started) == starts + 1
    await world.processes.close()


async def test_a_host_that_takes_no_reports_keeps_nothing_down() -> None:
    world = Respawned(ProcessSettings(report_within_s=0.02))

    async def deaf(_: str) -> None:
        await asyncio.Event().wait()

    async def broken(_: str) -> None:
        raise StoragedError("gone", Kind.UNAVAILABLE)

    for report in (deaf, broken):
        world.processes._report = report
        before = len(world.spawner.started)
        if not before:
            await world.processes.launch(SLEEP)
            before = 1
        await world.end()
        await asyncio.sleep(0.1)
        assert len(world.spawner.started) == before + 1
    await world.processes.close()


async def test_a_named_service_is_started_once_while_it_is_looked_after() -> None:
    world = Respawned(ProcessSettings(respawn_starts=1))
    for _ in range(3):
        assert (await world.processes.ensure("one", SLEEP)).status is Status.LAUNCHED
    assert len(world.spawner.started) == 1
    await world.end()
    assert (await world.processes.ensure("one", SLEEP)).status is Status.LAUNCHED
    assert len(world.spawner.started) == 2, "what stays down is started anew when somebody asks"
    await world.processes.close()


async def test_more_than_may_run_is_refused_until_one_ends() -> None:
    world = Respawned(ProcessSettings(most_running=2))
    sleep = parse_launch(["sleep", "1000"])
    answers = await asyncio.gather(*(world.processes.launch(sleep) for _ in range(5)), return_exceptions=True)
    refusals = [answer for answer in answers if isinstance(answer, StoragedError)]
    assert len(refusals) == 3
    assert all(refusal.kind is Kind.BUSY and "most_running" in refusal.message for refusal in refusals)
    await world.end()
    assert (await world.processes.launch(sleep)).status is Status.LAUNCHED
    await world.end()
    assert (await world.processes.launch(parse_launch(["no-such-program"]))).status is Status.FAILED
    assert world.processes.running == 1, "what did not start does not count"
    await world.processes.close()


async def test_nothing_starts_once_the_daemon_stops() -> None:
    world = Respawned()
    await world.processes.launch(SLEEP)
    await world.processes.close()
    with pytest.raises(StoragedError) as caught:
        await world.processes.launch(SLEEP)
    assert caught.value.kind is Kind.UNAVAILABLE
    assert len(world.spawner.started) == 1


class SlowSpawner(SimSpawner):
    """Whose starts take until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def start(self, launch: Launch) -> Child:
        await self.go.wait()
        return await super().start(launch)


async def test_a_call_that_is_given_up_during_the_start_leaves_a_whole_child() -> None:
    spawner = SlowSpawner()
    processes = Processes(spawner)
    call = asyncio.create_task(processes.launch(SLEEP))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    spawner.go.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(spawner.started) == 1
    spawner.kill(1000)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(spawner.started) == 2, "it is looked after like any other"
    await processes.close()


def test_outcomes_read_like_sentences() -> None:
    assert str(Outcome(Status.EXITED, 3)) == "ended with status 3"
    assert str(Outcome(Status.SIGNALED, 9)) == "was ended by signal 9"
    assert str(Outcome(Status.LAUNCHED)) == "launched"
