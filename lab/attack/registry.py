"""The list of attack scenarios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.attack.testbed import Testbed

Run = Callable[[Testbed], list[str]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One attack. `run` returns a sentence for each fault it found."""

    name: str
    run: Run
    places: tuple[str, ...]
    quick: bool
    """Part of `make test`."""

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return (self.run.__doc__ or "").strip().splitlines()[0] if self.run.__doc__ else ""


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, *, places: tuple[str, ...] = ("shm", "disk"), quick: bool = False) -> Callable[[Run], Run]:
    """Register a function as a scenario. `places`: where its images may lie."""

    def register(run: Run) -> Run:
        add(name, run, places=places, quick=quick)
        return run

    return register


def add(name: str, run: Run, *, places: tuple[str, ...] = ("shm", "disk"), quick: bool = False) -> None:
    """Register a scenario made from a table."""
    if name in SCENARIOS:
        raise ValueError(f"two scenarios named {name}")
    SCENARIOS[name] = Scenario(name, run, places, quick)
