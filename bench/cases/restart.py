"""PostgreSQL is restarted under a modest load: who is back when, and what the requests meanwhile were told."""

from __future__ import annotations

import asyncio
import itertools
import math
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy.ext.asyncio import create_async_engine

from bench import shop
from bench.arrivals import arriving, evenly
from bench.cases.case import Scale
from bench.cases.rounds import Gathered, lanes, rotated
from bench.load import closed_loop, run
from bench.served import serving_subject
from bench.shop import Kind
from bench.subjects import Setting
from stanch.embedded import EmbeddedError, EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.arrivals import Arrived
    from bench.cases.case import Ground
    from bench.cases.rounds import Lane
    from bench.results import Figure

POOL: Final = 5
RATE: Final = 100.0
"""Requests a second: what every subject serves with ease."""
PATIENCE: Final = 5.0
AWAY: Final = 1.0
"""Seconds that the server is away for."""
STOPS_WITHIN: Final = 20.0
PART: Final = 0.9
"""Of the rate, at which it is back."""
WINDOW: Final = 0.5
"""Seconds over which a rate is taken."""
STARTING: Final = 1.0
READ: Final = Kind.READ.ask.path_of(0)
FEW: Final = frozenset({"article", "article-ping", "stanch", "stanch-reader"})


class Length(NamedTuple):
    """Of a run."""

    rounds: int
    before: float
    after: float


LENGTHS: Final = {Scale.QUICK: Length(1, 0.5, 2.0), Scale.FULL: Length(5, 2.0, 10.0)}


class Restart:
    """The case."""

    name = "restart"
    title = "Restart: PostgreSQL goes away and comes back"
    method = (
        f"One-row reads, {RATE:.0f} a second and evenly spaced, whoever still waits, on a pool of {POOL}; each client"
        f" has a patience of {PATIENCE:.0f} s. The server shuts down as an operator lets it (PostgreSQL's *fast*"
        f" shutdown, which ends every session), is away for {AWAY:.0f} s, and is started again. Told are the seconds"
        " from the moment when it accepts connections until the first good answer, and until good answers come at"
        f" {PART:.0%} of the rate, taken over {WINDOW} s; and what became of all requests that were made from the"
        " shutdown on, or were under way then. Each subject has a restart of its own."
    )

    def needs(self) -> str | None:
        """Nothing."""
        return None

    def seconds(self, ground: Ground) -> float:
        """By the number of subjects."""
        rounds, before, after = LENGTHS[ground.scale]
        each = STARTING + before + AWAY + after + 1.0
        return STARTING + rounds * len(lanes(ground, Kind.READ, quick=FEW)) * each

    def run(self, ground: Ground) -> Iterator[Figure]:
        """In turns, on a server of this case's own."""
        rounds, before, after = LENGTHS[ground.scale]
        gathered = Gathered(self.name)
        with EmbeddedPostgres() as server:
            asyncio.run(_furnish(server))
            for number in range(rounds):
                for lane in rotated(lanes(ground, Kind.READ, quick=FEW), number):
                    ground.step(f"restart {number + 1} of {rounds}: {lane}")
                    setting = Setting(server.url(lane.driver), POOL)
                    with serving_subject(lane.subject, setting) as served:
                        run(closed_loop(served.port, READ, clients=2 * POOL, seconds=0.2))
                        outage = run(_outage(server, served.port, before, after))
                    _add(gathered, lane, outage)
        yield from gathered.figures()


async def _furnish(server: EmbeddedPostgres) -> None:
    engine = create_async_engine(server.url())
    async with engine.begin() as connection:
        await shop.prepare(connection)
    await engine.dispose()


class Outage(NamedTuple):
    """One of them; moments are those of ``Arrived``."""

    arrived: Sequence[Arrived]
    shut_down: float
    returned: float

    @property
    def good(self) -> list[float]:
        """When good answers came after the return, in seconds since that."""
        since = (each.answered - self.returned for each in self.arrived if each.is_good)
        return sorted(moment for moment in since if moment >= 0)

    @property
    def back(self) -> float | None:
        """Seconds from the return until good answers come at nearly the old rate; None if they never did."""
        good, enough = self.good, math.ceil(PART * RATE * WINDOW)
        return next(
            (first for first, last in zip(good, good[enough - 1 :], strict=False) if last - first <= WINDOW),
            None,
        )

    @property
    def longest(self) -> float:
        """Seconds that the slowest of all answers took that were asked for from the shutdown on, or under way then."""
        return max(
            (each.answer.took for each in self.arrived if each.answered >= self.shut_down), default=0.0
        )

    @property
    def statuses(self) -> Counter[int]:
        """Of the requests that were made from the shutdown on, or were under way then."""
        return Counter(each.answer.status for each in self.arrived if each.answered >= self.shut_down)


async def _outage(server: EmbeddedPostgres, port: int, before: float, after: float) -> Outage:
    began = time.perf_counter()
    over = asyncio.Event()
    at_most = before + STOPS_WITHIN + AWAY + STOPS_WITHIN + after
    moments = itertools.takewhile(lambda _: not over.is_set(), evenly(RATE, at_most))
    load = asyncio.create_task(arriving(port, READ, moments, patience=PATIENCE))
    await asyncio.sleep(before)
    shut_down = time.perf_counter()
    await asyncio.to_thread(_shut_down, server)
    await asyncio.sleep(shut_down + AWAY - time.perf_counter())
    await asyncio.to_thread(server.start)
    returned = time.perf_counter()
    await asyncio.sleep(after)
    over.set()
    return Outage(await load, shut_down - began, returned - began)


def _shut_down(server: EmbeddedPostgres) -> None:
    server.kill(signal.SIGINT)
    give_up_at = time.monotonic() + STOPS_WITHIN
    while server.is_running:
        if time.monotonic() > give_up_at:
            raise EmbeddedError(f"the server did not shut down within {STOPS_WITHIN:.0f} s")
        time.sleep(0.01)


def _add(gathered: Gathered, lane: Lane, outage: Outage) -> None:
    of = gathered.of(lane.subject.name, driver=lane.driver, rate=RATE, pool=POOL)
    statuses = outage.statuses
    failed = sum(number for status, number in statuses.items() if status != 200)
    good = outage.good
    of.less("first good answer after", "s", good[0] if good else None)
    of.less(f"{PART:.0%} of the rate after", "s", outage.back)
    of.less("longest answer", "s", outage.longest)
    of.less("requests that failed", "1", failed)
    for status, told in ((500, "answered 500"), (503, "answered 503"), (0, "never answered")):
        of.neither(told, "1", statuses[status])
    of.neither("answered 200", "1", statuses[200])


CASE: Final = Restart()
