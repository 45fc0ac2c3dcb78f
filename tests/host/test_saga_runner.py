"""The runner, with a guest and an image that fail, die and are cancelled at every single call."""

from __future__ import annotations

import asyncio
import errno
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.host.guests import Lost, Refused
from storaged.host.images import ImageError
from storaged.host.journal import Journal
from storaged.host.saga_model import Outcome, Saga, Stage
from storaged.units import GIB, MIB
from tests.host.resizable import LARGE, SMALL, Bench, Guest, running

BOTH = pytest.mark.parametrize(("start", "to"), [(SMALL, LARGE), (LARGE, SMALL)], ids=["grow", "shrink"])


@BOTH
async def test_undisturbed(tmp_path: Path, start: int, to: int) -> None:
    bench = Bench(tmp_path, start)
    async with running(bench):
        saga = await bench.ends((await bench.resizes.begin("g", to + 17)).id)
    assert (saga.outcome, saga.reason, saga.to) == (Outcome.DONE, "", to)
    assert bench.sizes() == (to, to)
    assert bench.told == [to]
    assert [each.id for each in Journal(f"{tmp_path}/state/resizes-p.json").load()] == [saga.id]


def _breaks(what: str) -> None:
    if what in {"grow", "shrink", "filesystem_size"}:
        raise ImageError("broken on purpose")
    raise Lost("broken on purpose")


def _refuses(what: str) -> None:
    if what in {"grow", "shrink", "filesystem_size"}:
        raise ImageError("broken on purpose")
    raise Refused("broken on purpose")


@BOTH
@pytest.mark.parametrize("breaks", [_breaks, _refuses], ids=["lost", "refused"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_failure_at_every_call(
    tmp_path: Path, start: int, to: int, breaks: Callable[[str], None], after: bool
) -> None:
    failed = 0
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        bench.at = at
        if after:
            bench.after = breaks
        else:
            bench.before = breaks
        async with running(bench):
            try:
                begun = await bench.resizes.begin("g", to)
            except StoragedError:
                assert bench.sizes() == (start, start), "nothing had begun"
                continue
            saga = await bench.ends(begun.id)
            image, filesystem = bench.sizes()
            if saga.outcome is Outcome.DONE:
                assert (image, filesystem) == (to, to)
            else:
                failed += 1
                assert saga.outcome is Outcome.FAILED
                assert "broken on purpose" in saga.reason
                assert (saga.image, saga.filesystem) == (image, filesystem), "it says what is true"
                assert f"({image} bytes), the filesystem" in saga.reason
            if bench.calls <= at:
                break
            bench.at = -1
            bench.guest.left = 0
            again = await bench.ends((await bench.resizes.begin("g", to)).id)
            assert again.outcome is Outcome.DONE, "nothing that failed stands in the way"
            assert bench.sizes() == (to, to)
    assert failed >= 3


@BOTH
async def test_a_guest_that_dies_at_every_call(tmp_path: Path, start: int, to: int) -> None:
    failed = 0
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        bench.at = at
        bench.before = lambda _, bench=bench: setattr(bench, "runs", False)  # type: ignore[misc]
        async with running(bench):
            try:
                saga = await bench.ends((await bench.resizes.begin("g", to)).id)
            except StoragedError:
                continue
        if bench.calls <= at:
            break
        image, filesystem = bench.sizes()
        failed += saga.outcome is Outcome.FAILED
        assert (saga.image, saga.filesystem) == (image, filesystem) or saga.outcome is Outcome.DONE
    assert failed >= 4


@BOTH
async def test_a_cancel_at_every_call(tmp_path: Path, start: int, to: int) -> None:
    outcomes = []
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        bench.at = at
        asked: list[asyncio.Task[Saga]] = []

        def cancel(_: str, bench: Bench = bench, asked: list[asyncio.Task[Saga]] = asked) -> None:
            asked.append(asyncio.create_task(bench.resizes.cancel("", "g")))

        bench.before = cancel
        async with running(bench):
            saga = await bench.ends((await bench.resizes.begin("g", to)).id)
            told = await asyncio.gather(*asked, return_exceptions=True)
            refused = bool(told) and isinstance(told[0], StoragedError)
        if bench.calls <= at:
            break
        if refused:
            assert saga.outcome is Outcome.DONE
            continue
        outcomes.append(saga.outcome)
        assert bench.sizes() == ((start, start) if saga.outcome is Outcome.CANCELLED else (to, to)), (at, saga)
    assert outcomes.count(Outcome.CANCELLED) >= 4
    assert set(outcomes) <= {Outcome.CANCELLED, Outcome.DONE}


@BOTH
async def test_an_end_at_every_call_is_taken_up_again(tmp_path: Path, start: int, to: int) -> None:
    resumed = 0
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        bench.at = at
        async with running(bench) as task:
            bench.before = lambda _, task=task: task.cancel()  # type: ignore[misc]
            begun = await bench.resizes.begin("g", to)
            ends = asyncio.create_task(bench.ends(begun.id))
            await asyncio.wait({task, ends}, return_when=asyncio.FIRST_COMPLETED)
            ends.cancel()
        if bench.calls <= at:
            break
        bench.new()
        async with running(bench):
            ended = await bench.ends(begun.id)
        resumed += ended.resumed
        assert ended.outcome is Outcome.DONE, ended
        assert bench.sizes() == (to, to)
    assert resumed >= 4


@BOTH
async def test_an_end_at_every_call_of_a_cancel_is_taken_up_again(tmp_path: Path, start: int, to: int) -> None:
    """Cancelled while the guest is at work (or its image just made larger); then ended at every call that follows."""
    resumed = 0
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        bench = Bench(directory, start)
        async with running(bench) as task:
            begun = await bench.resizes.begin("g", to)
            await bench.moves()
            bench.before = lambda _, task=task: task.cancel()  # type: ignore[misc]
            bench.at = bench.calls + at
            await bench.resizes.cancel(begun.id)
            ends = asyncio.create_task(bench.ends(begun.id))
            await asyncio.wait({task, ends}, return_when=asyncio.FIRST_COMPLETED)
            ends.cancel()
        if bench.calls <= bench.at:
            break
        bench.new()
        async with running(bench):
            ended = await bench.ends(begun.id)
        resumed += ended.resumed
        assert ended.outcome is Outcome.CANCELLED, ended
        assert bench.sizes() == (start, start)
    assert resumed >= 3


async def test_a_disk_that_takes_no_journal_stops_it_before_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Journal.save
    saved = 0

    def full(journal: Journal, known: Any) -> None:
        nonlocal saved
        saved += 1
        if saved > 3:
            raise OSError(28, "No space left on device")
        save(journal, known)

    monkeypatch.setattr(Journal, "save", full)
    bench = Bench(tmp_path, SMALL)
    async with running(bench):
        saga = await bench.ends((await bench.resizes.begin("g", LARGE)).id)
        assert saga.outcome is Outcome.FAILED
        assert "No space left" in saga.reason
        with pytest.raises(StoragedError, match="No space left"):
            await bench.resizes.begin("g", LARGE)
    bench.sizes()


async def _given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
    """A caller who gives up while the host's disk, full or busy, takes its time with the first page."""
    writing, go_on, save = threading.Event(), threading.Event(), Journal.save

    def slow(journal: Journal, sagas: Sequence[Saga]) -> None:
        writing.set()
        assert go_on.wait(10)
        if error is not None:
            raise error
        save(journal, sagas)

    monkeypatch.setattr(Journal, "save", slow)
    caller = asyncio.create_task(bench.resizes.begin("g", LARGE))
    assert await asyncio.to_thread(writing.wait, 10)
    caller.cancel()  # as gRPC does when the call's deadline has passed
    with pytest.raises(asyncio.CancelledError):
        await caller
    with pytest.raises(StoragedError, match="running already"):
        await bench.resizes.begin("g", LARGE)
    monkeypatch.setattr(Journal, "save", save)
    go_on.set()


async def test_a_caller_who_gives_up_leaves_no_resize_that_nobody_drives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, SMALL)
    async with running(bench):
        await _given_up(bench, monkeypatch)
        saga = await bench.ends(bench.resizes.snapshot[0].id)
        assert saga.outcome is Outcome.DONE, "what was begun is finished"
        assert bench.sizes() == (LARGE, LARGE)
        again = await bench.ends((await bench.resizes.begin("g", SMALL)).id)
        assert again.outcome is Outcome.DONE, "it stands in nobody's way"


async def test_a_caller_who_gives_up_before_the_disk_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, SMALL)
    async with running(bench):
        await _given_up(bench, monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
        for _ in range(1000):
            await asyncio.sleep(0.002)
            if not bench.resizes.snapshot:
                break
        saga = await bench.ends((await bench.resizes.begin("g", LARGE)).id)
        assert saga.outcome is Outcome.DONE


async def test_what_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    async with running(bench):
        with pytest.raises(InvalidRequest):
            await bench.resizes.begin("g", 4096)
        with pytest.raises(StoragedError, match="no such guest"):
            await bench.resizes.begin("other", SMALL)
        bench.guest.least = 3 * GIB
        with pytest.raises(StoragedError, match="below the least") as refused:
            await bench.resizes.begin("g", SMALL)
        assert refused.value.kind is Kind.OUT_OF_RANGE
        bench.guest.least = GIB
        begun = await bench.resizes.begin("g", SMALL)
        with pytest.raises(StoragedError, match="running already") as busy:
            await bench.resizes.begin("g", SMALL)
        assert busy.value.kind is Kind.BUSY
        await bench.ends(begun.id)
        with pytest.raises(StoragedError, match="has ended"):
            await bench.resizes.cancel(begun.id)
        with pytest.raises(StoragedError, match="there is no resize"):
            await bench.resizes.cancel("nope")
        bench.runs = False
        with pytest.raises(StoragedError, match="does not run"):
            await bench.resizes.begin("g", LARGE)


NEEDS = 64 * MIB + 9 * MIB
"""For 8 MiB that may move."""


@pytest.mark.parametrize("taken", [8 * MIB, None], ids=["by the image", "by what is cut"])
async def test_a_shrink_that_the_pool_cannot_carry_is_not_begun(tmp_path: Path, taken: int | None) -> None:
    bench = Bench(tmp_path, LARGE)
    to = SMALL if taken else LARGE - 8 * MIB
    with bench.path.open("r+b") as file:  # what a guest wrote
        file.seek(GIB)
        file.write(b"x" * ((taken or 16 * MIB) - bench.path.stat().st_blocks * 512))
    if taken:
        assert bench.path.stat().st_blocks * 512 == taken
    bench.room = NEEDS - 1
    async with running(bench):
        with pytest.raises(
            StoragedError, match=rf"g may move {8 * MIB} bytes .* {NEEDS} bytes, .* {NEEDS - 1} "
        ) as error:
            await bench.resizes.begin("g", to)
        assert error.value.kind is Kind.PRECONDITION
        assert bench.resizes.snapshot == ()
        saga = await bench.ends((await bench.resizes.begin("g", LARGE + GIB)).id)
        assert saga.outcome is Outcome.DONE, "a growth moves nothing"
    assert bench.guest.target == LARGE + GIB


async def test_a_pool_that_fills_up_before_the_guest_is_asked(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    async with running(bench):
        begun = await bench.resizes.begin("g", SMALL)
        bench.room = 0  # it is written down once more before anybody is asked
        saga = await bench.ends(begun.id)
    assert saga.outcome is Outcome.FAILED
    assert "the pool cannot carry it" in saga.reason
    assert bench.sizes() == (LARGE, LARGE)
    assert bench.guest.target == 0, "the guest was not asked"


async def test_what_a_shrink_moves_is_claimed_before_the_guest_is_asked_and_given_up_after(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    bench.short = 5
    async with running(bench):
        begun = await bench.resizes.begin("g", SMALL)
        async with asyncio.timeout(5):
            while not bench.claims:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert bench.guest.target == 0, "others may still write what it needs"
        assert bench.claims[0] > 64 * MIB
        bench.short = 0
        assert (await bench.ends(begun.id)).outcome is Outcome.DONE
        assert bench.claims[-1] == 0
        bench.claims.clear()
        assert (await bench.ends((await bench.resizes.begin("g", LARGE)).id)).outcome is Outcome.DONE
    assert set(bench.claims) == {0}, "a growth moves nothing"


async def test_a_shrink_that_waits_for_room_can_be_cancelled_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    bench.settings = replace(bench.settings, patience_s=30.0)
    bench.new()
    bench.short = 5
    async with running(bench):
        begun = await bench.resizes.begin("g", SMALL)
        async with asyncio.timeout(5):
            while not bench.claims:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.005)
        await bench.resizes.cancel(begun.id)
        async with asyncio.timeout(5):
            saga = await bench.ends(begun.id)
    assert saga.outcome is Outcome.CANCELLED
    assert bench.guest.target == 0
    assert bench.claims[-1] == 0


async def test_a_shrink_whose_room_others_do_not_give_up_is_not_asked_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    bench.short = 64 * MIB
    async with running(bench):
        saga = await bench.ends((await bench.resizes.begin("g", SMALL)).id)
    assert saga.outcome is Outcome.FAILED
    assert "other guests may still write 64.0 MiB of that" in saga.reason
    assert bench.guest.target == 0
    assert bench.claims[-1] == 0
    assert bench.sizes() == (LARGE, LARGE)


async def test_a_shrink_waits_for_the_first_look_at_the_pool(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    bench.room = None
    async with running(bench):
        with pytest.raises(StoragedError, match="not looked at yet"):
            await bench.resizes.begin("g", SMALL)
        bench.room = 100 * GIB
        begun = await bench.resizes.begin("g", SMALL)
        bench.room = None
        await asyncio.sleep(0.05)
        assert bench.guest.target == 0
        bench.room = 100 * GIB
        assert (await bench.ends(begun.id)).outcome is Outcome.DONE


async def test_a_kernel_that_never_sees_its_disk_gets_the_old_one_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SMALL)
    bench.guest.blind = True
    async with running(bench):
        saga = await bench.ends((await bench.resizes.begin("g", LARGE)).id)
    assert saga.outcome is Outcome.FAILED
    assert "does not see its larger disk" in saga.reason
    assert bench.sizes() == (SMALL, SMALL)
    assert bench.told == [LARGE, SMALL], "what it may take is told in time, and taken back"


@BOTH
async def test_a_guest_that_knows_maitred_alone(tmp_path: Path, start: int, to: int) -> None:
    bench = Bench(tmp_path, start)

    class Plain(Guest):
        async def fresh_report(self) -> None:
            return None

        async def cancel_resize(self) -> None:
            raise Refused("what answers does not know this call", Kind.UNSUPPORTED)

    bench.guest = Plain(bench)
    async with running(bench):
        saga = await bench.ends((await bench.resizes.begin("g", to)).id)
        assert saga.outcome is Outcome.DONE
        assert bench.sizes() == (to, to)
        back = await bench.resizes.begin("g", start)
        await bench.resizes.cancel(back.id)
        ended = await bench.ends(back.id)
    assert ended.outcome is Outcome.CANCELLED
    assert bench.sizes() == (to, to)


async def test_a_guest_that_somebody_else_resizes_is_left_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, LARGE)
    bench.guest.target, bench.guest.left = 3 * GIB, 1000
    async with running(bench):
        with pytest.raises(StoragedError, match="somebody else") as busy:
            await bench.resizes.begin("g", SMALL)
        assert busy.value.kind is Kind.BUSY
        bench.guest.left = 0
        begun = await bench.resizes.begin("g", SMALL)
        bench.guest.target, bench.guest.left = 3 * GIB, 1000
        ended = await bench.ends(begun.id)
    assert ended.outcome is Outcome.FAILED
    assert "somebody else" in ended.reason
    assert bench.sizes()[0] == LARGE


async def test_only_so_many_are_remembered(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SMALL)
    bench.settings = replace(bench.settings, keep=2)
    bench.new()
    async with running(bench):
        ended = [await bench.ends((await bench.resizes.begin("g", size)).id) for size in (LARGE, SMALL, LARGE, SMALL)]
    assert list(bench.resizes.snapshot) == ended[:0:-1]


def test_a_journal_that_cannot_be_believed_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "state" / "j.json"
    journal = Journal(str(path))
    assert journal.load() == []
    kept = [Saga("a", "g", LARGE, 1.5), Saga("b", "g", SMALL, 2.0, stage=Stage.ENDED, outcome=Outcome.CANCELLED)]
    journal.save(kept)
    assert journal.load() == kept
    assert path.stat().st_mode & 0o777 == 0o600
    for damage in (path.read_bytes()[:-9], b"", b"00000000\n[]", path.read_bytes().replace(b'"a"', b'"b"')):
        path.write_bytes(damage)
        assert journal.load() == []
        assert not path.exists()
        journal.save(kept)
