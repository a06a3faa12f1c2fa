"""One read and then 50 ms elsewhere: a connection that is held meanwhile serves nobody."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.apart import apart, attempts
from bench.cases.case import Scale
from bench.cases.rounds import Gathered, lanes, rotated, together
from bench.shop import ELSEWHERE, Kind
from bench.subjects import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from bench.cases.case import Ground
    from bench.results import Figure

POOL: Final = 10
CLIENTS: Final = 100
PATIENCE: Final = 5.0
"""Of the pool, in seconds: ten times what the last in the queue waits. Threads can lock each other out for good."""
PEERS: Final = frozenset({"advanced-alchemy", "context-async", "fastapi-async", "fastapi-toolsets"})
SOME: Final = frozenset({"asyncpg", "article", "stanch", "stanch-reader"}) | PEERS
"""Who has a turn in a quick run: nobody who runs in threads, for a round of those takes twice the patience."""
WARMING: Final = 0.3
STARTING: Final = 1.0
LENGTHS: Final = {Scale.QUICK: (3, 0.5), Scale.FULL: (9, 3.0)}
"""Rounds, and seconds of one of them."""


class HoldTime:
    """The case."""

    name = "hold_time"
    title = "Hold time: one read, then 50 ms elsewhere"
    method = (
        f"{CLIENTS} clients on a pool of {POOL}; each request reads one row and then waits {ELSEWHERE * 1000:.0f} ms"
        " for something that is not the database. Whoever keeps the connection meanwhile cannot serve more than"
        f" {POOL / ELSEWHERE:.0f} a second, whatever the machine; what one reaches who does not is a matter of its"
        f" processor. Who has waited {PATIENCE:.0f} s for a connection has failed. Called in process: what a server"
        " costs it costs all, and only blurs the difference."
    )

    def needs(self) -> str | None:
        """Nothing."""
        return None

    def seconds(self, ground: Ground) -> float:
        """By the number of subjects."""
        rounds, seconds = LENGTHS[ground.scale]
        each = STARTING + 2 * ELSEWHERE + WARMING + rounds * (seconds + CLIENTS / POOL * ELSEWHERE)
        return len(lanes(ground, Kind.SLOW, quick=SOME)) * each

    def run(self, ground: Ground) -> Iterator[Figure]:
        """In turns."""
        rounds, seconds = LENGTHS[ground.scale]
        gathered = Gathered(self.name)
        driven = {
            lane: apart(lane.subject.name, Setting(ground.server.url(lane.driver), POOL, PATIENCE))
            for lane in lanes(ground, Kind.SLOW, quick=SOME)
        }
        with together(driven) as apps:
            for app in apps.values():
                app.run(drive, WARMING)
            for number in range(rounds):
                for lane in rotated(list(apps), number):
                    ground.step(f"round {number + 1} of {rounds}: {lane}")
                    told = apps[lane].run(drive, seconds)
                    of = gathered.of(lane.subject.name, driver=lane.driver, clients=CLIENTS, pool=POOL)
                    of.more("requests", "1/s", told.rate)
                    of.less("failed", "1", told.failed)
        yield from gathered.figures()


class Driven(NamedTuple):
    """What came of one round."""

    answered: int
    failed: int
    took: float

    @property
    def rate(self) -> float:
        """Answers a second.

        >>> Driven(300, 0, 1.5).rate
        200.0
        """
        return self.answered / self.took


async def drive(app: FastAPI, seconds: float) -> Driven:
    """The clients, each of which asks again as soon as it is answered, for so long and until the last is answered."""
    attempt = attempts(app, Kind.SLOW)
    answered = failed = 0
    began = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal answered, failed
        while time.perf_counter() - began < seconds:
            if await attempt(number):
                answered += 1
            else:
                failed += 1
                await asyncio.sleep(0)  # what fails at once would keep the others from their turns

    async with asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(client(number))
    return Driven(answered, failed, time.perf_counter() - began)


CASE: Final = HoldTime()
