"""Who waits how long on a full pool: many clients on ten connections, six greedy loops on two."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.apart import apart, attempts
from bench.cases.case import Scale
from bench.cases.rounds import Gathered, lanes, rotated, together
from bench.load import Crowd, Load, requests_of, run, share
from bench.served import serving_subject
from bench.shop import Kind
from bench.subjects import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from bench.apart import Apart
    from bench.cases.case import Ground
    from bench.cases.rounds import Lane
    from bench.results import Figure

CLIENTS: Final = 32
POOL: Final = 10
LOOPS: Final = 6
LOOPS_POOL: Final = 2
PAUSE: Final = 0.02
"""Seconds between two requests of the one that is not greedy."""
WARMING: Final = 0.3
STARTING: Final = 1.0
"""Seconds that the start of a process takes, about."""
FEW: Final = frozenset({"article", "stanch", "stanch-reader"})
SOME: Final = FEW | {"asyncpg", "advanced-alchemy"}
"""Whom the clients ask in a quick run; *rates* has the same crowd before everybody."""
READS: Final = requests_of(Kind.READ.ask)


class Length(NamedTuple):
    """Of one of the two loads."""

    rounds: int
    slice: float
    """Seconds of one round of one subject."""


LENGTHS: Final = {
    Scale.QUICK: (Length(3, 2.0), Length(3, 1.0)),
    Scale.FULL: (Length(9, 3.0), Length(9, 3.0)),
}
"""The clients', and the loops'."""


class Fairness:
    """The case."""

    name = "fairness"
    title = "Fairness: who waits how long on a full pool"
    method = (
        f"Two loads, each of one-row reads. {CLIENTS} keep-alive clients of uvicorn on a pool of {POOL}, each of which"
        " asks again as soon as it is answered: requests per second, and how long they took; the median must not be"
        " told alone, for a pool that lets newcomers overtake has a good one and lets a few wait for ever."
        f" And {LOOPS} loops that do the same without a server on a pool of {LOOPS_POOL}, beside one client that comes"
        f" every {PAUSE * 1000:.0f} ms: how many requests the loop that got least had for each of the one that got"
        " most, and the longest wait of that client. No wait can be longer than the slice in which it is measured,"
        " so the worst are worse than they look."
    )

    def needs(self) -> str | None:
        """Nothing."""
        return None

    def seconds(self, ground: Ground) -> float:
        """By the number of subjects."""
        clients, loops = LENGTHS[ground.scale]
        return len(lanes(ground, Kind.READ, quick=SOME)) * (
            STARTING + WARMING + clients.rounds * clients.slice
        ) + len(lanes(ground, Kind.READ, quick=FEW)) * (STARTING + WARMING + loops.rounds * loops.slice)

    def run(self, ground: Ground) -> Iterator[Figure]:
        """One load, then the other."""
        clients, loops = LENGTHS[ground.scale]
        yield from self._clients(ground, *clients)
        yield from self._loops(ground, *loops)

    def _clients(self, ground: Ground, rounds: int, seconds: float) -> Iterator[Figure]:
        gathered = Gathered(self.name)
        serving = {
            lane: serving_subject(lane.subject, Setting(ground.server.url(lane.driver), POOL))
            for lane in lanes(ground, Kind.READ, quick=SOME)
        }
        with together(serving) as served:
            for each in served.values():
                run(_load(each.port, WARMING))
            for number in range(rounds):
                for lane in rotated(list(served), number):
                    ground.step(f"{CLIENTS} clients, round {number + 1} of {rounds}: {lane}")
                    _add_load(gathered, lane, run(_load(served[lane].port, seconds)))
        yield from gathered.figures()

    def _loops(self, ground: Ground, rounds: int, seconds: float) -> Iterator[Figure]:
        gathered = Gathered(self.name)
        driven = {
            lane: apart(lane.subject.name, Setting(ground.server.url(lane.driver), LOOPS_POOL))
            for lane in lanes(ground, Kind.READ, quick=FEW)
        }
        with together(driven) as apps:
            for app in apps.values():
                app.run(turns, WARMING)
            for number in range(rounds):
                for lane in rotated(list(apps), number):
                    ground.step(f"{LOOPS} loops, round {number + 1} of {rounds}: {lane}")
                    _add_turns(gathered, lane, _turns_of(apps[lane], seconds))
        yield from gathered.figures()


# Clients -----------------------------------------------------------------------------------------------------


async def _load(port: int, seconds: float) -> Load:
    async with Crowd(port, CLIENTS) as crowd:
        return await crowd.closed_loop(READS, seconds=seconds)


def _add_load(gathered: Gathered, lane: Lane, load: Load) -> None:
    of = gathered.of(lane.subject.name, driver=lane.driver, clients=CLIENTS, pool=POOL)
    took = [answer.took for answer in load.answers]
    p50, p99 = share(took, 0.5), share(took, 0.99)
    of.more("requests", "1/s", len(load.good) / load.seconds)
    of.less("p50", "ms", p50 * 1000)
    of.less("p99", "ms", p99 * 1000)
    of.less("p99/p50", "1", p99 / p50 if p50 else None)
    of.less("failed", "1", len(load.answers) - len(load.good))


# Loops -------------------------------------------------------------------------------------------------------


class Turns(NamedTuple):
    """What came of one round."""

    of_each: list[int]
    """Requests of each greedy loop."""
    waits: list[float]
    """Seconds that each request of the other client took."""
    failed: int

    @property
    def evenness(self) -> float:
        """What the loop that got least had for each request of the one that got most; 1 is fair.

        >>> Turns([50, 100, 80], [], 0).evenness
        0.5
        """
        return min(self.of_each) / max(1, *self.of_each)


async def turns(app: FastAPI, seconds: float) -> Turns:
    """The greedy loops and the client that is not, for so long."""
    attempt = attempts(app, Kind.READ)
    of_each, waits, failed = [0] * LOOPS, list[float](), 0
    over = time.perf_counter() + seconds

    async def greedy(loop: int) -> None:
        nonlocal failed
        while time.perf_counter() < over:
            if await attempt(of_each[loop]):
                of_each[loop] += 1
            else:
                failed += 1
                await asyncio.sleep(0)  # what fails at once would keep the others from their turns

    async def modest() -> None:
        nonlocal failed
        while time.perf_counter() < over:
            began = time.perf_counter()
            failed += not await attempt(len(waits))
            waits.append(time.perf_counter() - began)
            await asyncio.sleep(PAUSE)

    async with asyncio.TaskGroup() as group:
        for loop in range(LOOPS):
            group.create_task(greedy(loop))
        group.create_task(modest())
    return Turns(of_each, waits, failed)


def _turns_of(app: Apart, seconds: float) -> Turns:
    return app.run(turns, seconds)


def _add_turns(gathered: Gathered, lane: Lane, told: Turns) -> None:
    of = gathered.of(lane.subject.name, driver=lane.driver, loops=LOOPS, pool=LOOPS_POOL)
    of.more("least turns / most turns", "1", told.evenness)
    of.less("longest wait of one more client", "ms", max(told.waits) * 1000)
    of.less("median wait of one more client", "ms", share(told.waits, 0.5) * 1000)
    of.less("failed", "1", told.failed)


CASE: Final = Fairness()
