"""Fails when stanch has become more costly: by a round trip, or by instructions. Counts only, so that noise cannot.

    python -m bench.guard              # measures, and compares with bench/baseline.json
    python -m bench.guard --store      # measures, and writes that file anew

Round trips are compared exactly. Instructions are compared as a ratio to the article's pattern in the same run, so that
a library that becomes slower for everybody is not held against stanch. On another minor release of Python than the
stored one the ratio is another by a few percent: there it is compared less strictly.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from sqlalchemy.ext.asyncio import create_async_engine

from bench import shop
from bench.cases.counts import DRIVER, Counting, no_waiting_elsewhere, of_subject
from bench.cases.instructions import Valgrinds, in_place
from bench.shop import Kind
from bench.subjects import BASELINE, OURS, SUBJECTS
from stanch.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE: Final = Path(__file__).with_name("baseline.json")
TOLERANCE: Final = 0.02
"""Of the ratio of instructions; repeats agree within 1 %."""
ELSEWHERE_TOLERANCE: Final = 0.1
"""The same, on another Python than the baseline's."""
ROUNDS_BY_CHANCE: Final = 3
"""Where addresses are left to chance; the median is taken."""
KINDS: Final = (Kind.BARE, Kind.UNUSED, Kind.READ, Kind.WRITE, Kind.ORDER)
"""Of which instructions are counted; round trips are of all."""
PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"

Counts = dict[str, dict[str, float]]
"""By subject and kind."""


class Measured(NamedTuple):
    """What one run says of our subjects; one of them is the baseline."""

    python: str
    round_trips: Counts
    instructions: Counts
    """Times the article's."""

    @classmethod
    def read(cls, file: Path = FILE) -> Self:
        """The one that was stored."""
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path = FILE) -> None:
        """Store it."""
        file.write_text(json.dumps(self._asdict(), indent=1) + "\n")


class Judgement(NamedTuple):
    """A sentence for each difference."""

    worse: list[str]
    better: list[str]


async def _prepare(url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await shop.prepare(connection)
    await engine.dispose()


async def _round_trips(server: EmbeddedPostgres) -> Counts:
    with Counting(server.port) as wire, no_waiting_elsewhere():
        url = wire.through(server.url(DRIVER))
        return {
            name: {
                kind.name: counted.round_trips
                for kind, counted in (await of_subject(SUBJECTS[name], url, wire)).items()
            }
            for name in OURS
        }


def _instructions(server: EmbeddedPostgres) -> Counts:
    wanted: dict[str, tuple[Kind, ...]] = dict.fromkeys((BASELINE, *OURS), KINDS)
    with Valgrinds(server.url(DRIVER)) as valgrinds:
        rounds = [dict(valgrinds.count(wanted)) for _ in range(1 if in_place() else ROUNDS_BY_CHANCE)]

    def counted(name: str, kind: Kind) -> float:
        return median(each[name][kind] for each in rounds)

    return {
        name: {kind.name: round(counted(name, kind) / counted(BASELINE, kind), 3) for kind in KINDS}
        for name in OURS
    }


def measure() -> Measured:
    """Count all, on a server of its own: about a minute. Needs valgrind."""
    with EmbeddedPostgres() as server:
        asyncio.run(_prepare(server.url(DRIVER)))
        return Measured(PYTHON, asyncio.run(_round_trips(server)), _instructions(server))


def judge(now: Measured, baseline: Measured) -> Judgement:
    """What has become worse, and what better. What the baseline lacks counts as worse, for nobody would guard it."""
    told = Judgement([], [])
    tolerance = TOLERANCE if now.python == baseline.python else ELSEWHERE_TOLERANCE
    for what, measured, stored, within in (
        ("round trips", now.round_trips, baseline.round_trips, 0.0),
        (f"times the instructions of {BASELINE}", now.instructions, baseline.instructions, tolerance),
    ):
        for subject, kind, value, was in _pairs(measured, stored):
            if was is None:
                told.worse.append(f"{subject} {kind}: {value:g} {what}, with no baseline")
            elif value > was * (1 + within):
                told.worse.append(f"{subject} {kind}: {value:g} {what}, was {was:g}")
            elif value < was * (1 - within):
                told.better.append(f"{subject} {kind}: {value:g} {what}, was {was:g}")
    return told


def _pairs(now: Counts, stored: Counts) -> Iterator[tuple[str, str, float, float | None]]:
    for subject, kinds in now.items():
        for kind, value in kinds.items():
            yield subject, kind, value, stored.get(subject, {}).get(kind)


def main(*arguments: str) -> int:
    """Guard, or store."""
    if arguments not in {(), ("--store",)}:
        print(f"{' '.join(arguments)}: only --store can be asked for")
        return 2
    now = measure()
    if arguments:
        now.write()
        print(f"stored in {FILE.name}")
        return 0
    told = judge(now, Measured.read())
    for sentence in told.worse:
        print(f"worse: {sentence}")
    for sentence in told.better:
        print(f"better: {sentence}")
    if told.worse:
        print("Where that is meant: python -m bench.guard --store")
    elif told.better:
        print("Hold on to it: python -m bench.guard --store")
    else:
        print("as the baseline says")
    return 1 if told.worse else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
