"""A great many requests in one process: does its memory stay where it is?"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.apart import apart, attempts
from bench.cases.case import Scale
from bench.cases.rounds import Gathered, lanes, together
from bench.memory import lacks, resident
from bench.shop import Kind
from bench.subjects import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from bench.cases.case import Ground
    from bench.cases.rounds import Lane
    from bench.results import Figure

POOL: Final = 5
CLIENTS: Final = 10
LOOKS: Final = 10
"""How often the memory is looked at, from the end of the warm-up to the last request."""
STARTING: Final = 2.0
EACH: Final = 0.0015
"""Seconds that a request takes, about, while another process is driven, too."""
AT_A_TIME: Final = 2
FEW: Final = frozenset({"article", "stanch"})


class Length(NamedTuple):
    """Of a run."""

    warming: int
    requests: int


LENGTHS: Final = {Scale.QUICK: Length(1_000, 5_000), Scale.FULL: Length(50_000, 1_000_000)}


class Growth:
    """The case."""

    name = "growth"
    title = "Growth: memory over a great many requests"
    method = (
        f"One-row reads by {CLIENTS} clients on a pool of {POOL}, without a server, in a process of their own. Told is"
        " by how much its resident memory has grown since the end of a warm-up, each time after garbage was collected;"
        " and how much it grew in the second half for 100 000 requests: what is flat stays near zero there. A quick run"
        " is short, shows but a coarse leak, and is not judged."
    )

    def needs(self) -> str | None:
        """Linux."""
        return lacks()

    def seconds(self, ground: Ground) -> float:
        """By the number of subjects."""
        length = LENGTHS[ground.scale]
        each = STARTING + (length.warming + length.requests) * EACH
        return -(-len(lanes(ground, Kind.READ, quick=FEW)) // AT_A_TIME) * each

    def run(self, ground: Ground) -> Iterator[Figure]:
        """Two at a time: what is measured is not the time."""
        length = LENGTHS[ground.scale]
        all_of_them = lanes(ground, Kind.READ, quick=FEW)
        for first in range(0, len(all_of_them), AT_A_TIME):
            some = all_of_them[first : first + AT_A_TIME]
            driven = {
                lane: apart(lane.subject.name, Setting(ground.server.url(lane.driver), POOL)) for lane in some
            }
            ground.step(f"{length.requests} requests: {'; '.join(map(str, some))}")
            with together(driven) as apps:
                growing = {lane: app.begin(grow, *length) for lane, app in apps.items()}
                for lane, grown in growing.items():
                    yield from _figures(lane, grown(), ground.scale)


class Grown(NamedTuple):
    """What became of the memory."""

    by: list[int]
    """Bytes more than after the warm-up, at each look."""
    requests: int
    failed: int

    @property
    def slope(self) -> float:
        """Bytes that a request left behind in the second half.

        >>> Grown([50, 60, 80, 100], requests=4, failed=0).slope
        20.0
        """
        half = len(self.by) // 2
        return (self.by[-1] - self.by[half - 1]) / (self.requests * (len(self.by) - half) / len(self.by))


async def grow(app: FastAPI, warming: int, requests: int) -> Grown:
    """Make so many *requests* after the warm-up, and look at the memory in between."""
    attempt = attempts(app, Kind.READ)
    failed = 0

    async def client(numbers: Iterator[int]) -> None:
        nonlocal failed
        for number in numbers:
            failed += not await attempt(number)

    async def make(number: int) -> None:
        numbers = iter(range(number))
        await asyncio.gather(*(client(numbers) for _ in range(CLIENTS)))

    await make(warming)
    before, by = resident(), list[int]()
    for _ in range(LOOKS):
        await make(requests // LOOKS)
        by.append(resident() - before)
    return Grown(by, requests, failed)


def _figures(lane: Lane, grown: Grown, scale: Scale) -> Iterator[Figure]:
    gathered = Gathered(CASE.name)
    name, driver = lane.subject.name, lane.driver
    for look, by in enumerate(grown.by, start=1):
        after = grown.requests * look // LOOKS
        gathered.of(name, driver=driver, pool=POOL, requests=after).neither(
            "growth since the warm-up", "KiB", by / 1024
        )
    of = gathered.of(name, driver=driver, pool=POOL, requests=grown.requests)
    tell = (
        of.less if scale is Scale.FULL else of.neither
    )  # a page more or less is all that a short run can tell
    tell("growth, second half", "KiB/100k", grown.slope * 1e5 / 1024)
    of.less("failed", "1", grown.failed)
    yield from gathered.figures()


CASE: Final = Growth()
