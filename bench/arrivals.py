"""An open loop: clients that come when they come, whether or not the others have been served.

Each request is told with the moment it was made, so that a case can say what became of those of a part of the run.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import TYPE_CHECKING, NamedTuple

from bench.load import Answer, Client

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Arrived(NamedTuple):
    """One request."""

    at: float
    """When it was made, in seconds since the first could have been."""
    answer: Answer

    @property
    def is_good(self) -> bool:
        """Answered in time, and with 200."""
        return self.answer.status == 200

    @property
    def answered(self) -> float:
        """When the answer was there, or the client gone."""
        return self.at + self.answer.took


def by_chance(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Moments of *seconds*, so many a second, that know nothing of each other.

    >>> 80 < len(list(by_chance(rate=100, seconds=1, seed=1))) < 120
    True
    """
    chance = random.Random(seed)  # noqa: S311  # arrivals, not cryptography
    moment = 0.0
    while (moment := moment + chance.expovariate(rate)) < seconds:
        yield moment


def evenly(rate: float, seconds: float) -> Iterator[float]:
    """Moments of *seconds*, all as far from each other.

    >>> list(evenly(rate=2, seconds=2))
    [0.0, 0.5, 1.0, 1.5]
    """
    return itertools.takewhile(
        lambda moment: moment < seconds, (number / rate for number in itertools.count())
    )


async def arriving(port: int, path: str, moments: Iterable[float], *, patience: float) -> list[Arrived]:
    """A client for each of *moments*, who leaves when its *patience* is over; all of them, as they were answered."""
    arrived: list[Arrived] = []
    idle: list[Client] = []
    asking: set[asyncio.Task[None]] = set()

    async def one() -> None:
        client = idle.pop() if idle else Client(port)
        at = time.perf_counter() - began
        arrived.append(Arrived(at, await client.get(path, timeout=patience)))
        idle.append(client)

    began = time.perf_counter()
    for moment in moments:
        await asyncio.sleep(began + moment - time.perf_counter())
        task = asyncio.create_task(one())
        asking.add(task)
        task.add_done_callback(asking.discard)
    while asking:
        await asyncio.wait(asking)
    for client in idle:
        client.close()
    return arrived
