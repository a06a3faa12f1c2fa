"""More load than can be served: what becomes of it on stanch, and on SQLAlchemy's own pool in the same run.

    make bench          # both drivers; ends with 1 if stanch serves less than 85 % of capacity in time

An open loop of clients at twice and four times the capacity, for ten seconds each; each client has a patience of a
second. A good answer is a 200 that came in time. Capacity is what a closed loop gets in the same run.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Final, NamedTuple

from bench.load import Kind, closed_loop, open_loop, serving, share
from stanch.embedded import EmbeddedPostgres

POOL: Final = 5
WORK: Final = 0.05
"""Seconds that a request keeps its connection for."""
PATIENCE: Final = 1.0
SECONDS: Final = 10.0
LOADS: Final = (2, 4)
SEED: Final = 20261126

GOOD: Final = 0.85
P99: Final = 0.25
TOLD: Final = 0.05


class Outcome(NamedTuple):
    """One run of one app at one load."""

    load: int
    capacity: float
    good: float
    """Good answers a second."""
    p99: float
    """Of the good answers, in seconds."""
    refused: int
    gone: int
    """Clients whose patience was over."""
    told: float
    """The slowest but one in a hundred refusals, in seconds from the decision to the reply; 0 without any."""

    @property
    def part(self) -> float:
        """Good answers as a part of the capacity."""
        return self.good / self.capacity

    def __str__(self) -> str:
        return (
            f"{self.load}x: good {self.good:5.1f}/s of {self.capacity:5.1f}/s = {self.part:4.0%},"
            f" p99 {self.p99 * 1000:4.0f} ms, refused {self.refused}, gone {self.gone},"
            f" told within {self.told * 1000:.1f} ms (p99)"
        )


async def capacity_of(port: int) -> float:
    """Answers a second of twice as many clients as connections, each coming again at once."""
    await closed_loop(port, f"/hold/{WORK}", clients=2 * POOL, seconds=1.0)
    answers = await closed_loop(port, f"/hold/{WORK}", clients=2 * POOL, seconds=3.0)
    return sum(answer.status == 200 for answer in answers) / 3.0


async def overload(port: int, load: int, capacity: float, *, seconds: float = SECONDS) -> Outcome:
    """*load* times as many clients as can be served."""
    answers = await open_loop(
        port,
        f"/hold/{WORK}",
        rate=load * capacity,
        seconds=seconds,
        patience=PATIENCE,
        chance=random.Random(SEED + load),  # noqa: S311  # arrivals, not cryptography
    )
    good = [answer.took for answer in answers if answer.status == 200]
    told = [answer.told_after for answer in answers if answer.told_after is not None]
    return Outcome(
        load,
        capacity,
        len(good) / seconds,
        share(good, 0.99),
        sum(answer.status == 503 for answer in answers),
        sum(answer.status == 0 for answer in answers),
        share(told, 0.99),
    )


def compare(
    url: str, *, loads: tuple[int, ...] = LOADS, kinds: tuple[Kind, ...] = ("stanch", "by hand")
) -> dict[Kind, list[Outcome]]:
    """Every app at every load, each in a process of its own: what waits in one must not be in the way of the next."""
    outcomes: dict[Kind, list[Outcome]] = {kind: [] for kind in kinds}
    with serving("stanch", url, pool_size=POOL, max_overflow=0) as port:
        capacity = asyncio.run(capacity_of(port))
    for load in loads:
        for kind in kinds:
            with serving(kind, url, timed=True, pool_size=POOL, max_overflow=0) as port:
                asyncio.run(closed_loop(port, f"/hold/{WORK}", clients=POOL, seconds=1.0))  # warm
                outcome = asyncio.run(overload(port, load, capacity))
            print(f"  {kind:8} {outcome}", flush=True)
            outcomes[kind].append(outcome)
    return outcomes


def main() -> int:
    """Compare on both drivers; 1 if stanch falls short on one of them."""
    fell_short = False
    with EmbeddedPostgres() as server:
        for driver in ("asyncpg", "psycopg"):
            print(driver)
            for outcome in compare(server.url(driver))["stanch"]:
                fell_short |= outcome.part < GOOD or outcome.p99 > P99 or outcome.told > TOLD
    return int(fell_short)


if __name__ == "__main__":
    sys.exit(main())
