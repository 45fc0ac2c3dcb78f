"""A short fuzz run: nothing that a peer or a file says makes the daemon stumble. `make fuzz` is the long one."""

from __future__ import annotations

import pytest

from lab import fuzz

RUNS, MANY = 4000, 20_000


def test_whatever_the_bytes_the_answer_is_an_answer() -> None:
    tried, finding = fuzz.run("everything", RUNS)
    print(f"fuzz: {tried} inputs")  # noqa: T201  # the count is a part of the answer
    assert not finding, finding
    assert tried >= RUNS


@pytest.mark.slow
@pytest.mark.parametrize("name", list(fuzz.targets()))
def test_each_by_itself(name: str) -> None:
    tried, finding = fuzz.run(name, MANY)
    print(f"fuzz: {name}: {tried} inputs")  # noqa: T201  # as above
    assert not finding, finding
    assert tried >= MANY


def test_a_finding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGED_FUZZ_BREAKS", "size")
    _, finding = fuzz.run("size", RUNS)
    assert "broken on purpose" in finding
