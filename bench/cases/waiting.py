"""Thousands of requests that wait for a full pool: the memory of each, and how long they take to be cancelled."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from bench.apart import apart, attempts
from bench.cases.case import Scale
from bench.cases.rounds import Gathered, lanes, rotated
from bench.memory import lacks, resident
from bench.shop import Item, Kind
from bench.subjects import Setting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import AsyncConnection

    from bench.cases.case import Ground
    from bench.results import Figure

POOL: Final = 10
FIRST: Final = 50
"""Requests that wait, and are cancelled, before it is measured: what is needed once is then there."""
LONGEST: Final = 60.0
"""Seconds in which all must wait, or be cancelled."""
LOOK_AGAIN: Final = 0.1
IDLE: Final = 0.02
"""Seconds of processor time between two looks, below which a process does nothing any more."""
STARTING: Final = 2.0
EACH: Final = 0.002
"""Seconds that a request takes to come and to go, about."""
FEW: Final = frozenset({"article", "stanch", "stanch-reader"})
PATIENT: Final[dict[str, Any]] = {"queue_target": None, "lock_timeout": None, "statement_timeout": None}
"""stanch would refuse all but a few of them, and its holders would give up: that is not what is measured here."""
LOCK: Final = text(f"LOCK TABLE {Item.__tablename__} IN ACCESS EXCLUSIVE MODE")
LOCKED_OUT: Final = text("SELECT count(*) FROM pg_locks WHERE NOT granted")

LENGTHS: Final = {Scale.QUICK: (1, 2_000), Scale.FULL: (3, 10_000)}
"""Rounds, and requests that wait."""


class Waiting:
    """The case."""

    name = "waiting"
    title = "Waiting: thousands of requests before a full pool"
    method = (
        f"A pool of {POOL}, all of whose connections wait for a lock on a table; then thousands of one-row reads, in a"
        " process of their own and without a server. Told is by how much the process's resident memory has grown for"
        " each of them, once all wait, everything of a request included; and how long it takes for each until all are"
        " cancelled. stanch's refusal of load beyond its capacity is off, for else hardly anybody would wait."
    )

    def needs(self) -> str | None:
        """Linux."""
        return lacks()

    def seconds(self, ground: Ground) -> float:
        """By the number of subjects."""
        rounds, requests = LENGTHS[ground.scale]
        return rounds * len(lanes(ground, Kind.READ, quick=FEW)) * (STARTING + requests * EACH)

    def run(self, ground: Ground) -> Iterator[Figure]:
        """In turns, in a new process each time: memory that was freed is used again before it is asked for."""
        rounds, requests = LENGTHS[ground.scale]
        gathered = Gathered(self.name)
        for number in range(rounds):
            for lane in rotated(lanes(ground, Kind.READ, quick=FEW), number):
                ground.step(f"{requests} wait, round {number + 1} of {rounds}: {lane}")
                setting = Setting(ground.server.url(lane.driver), POOL, pool_timeout=600.0, options=PATIENT)
                with apart(lane.subject.name, setting) as app:
                    waited = app.run(wait, ground.server.url(), requests)
                of = gathered.of(lane.subject.name, driver=lane.driver, requests=requests, pool=POOL)
                of.less("memory of each", "KiB", waited.memory / 1024)
                cancelled = None if waited.cancelled is None else waited.cancelled * 1e6
                of.less("cancelling each", "µs", cancelled)
        yield from gathered.figures()


class Waited(NamedTuple):
    """For each request."""

    memory: float
    """Bytes."""
    cancelled: float | None
    """Seconds; None where they had not all ended in time, for a thread cannot be cancelled."""


async def wait(app: FastAPI, url: str, requests: int) -> Waited:
    """Let so many *requests* wait for the pool, whose connections wait for a lock that is taken by *url*."""
    engine = create_async_engine(url, poolclass=NullPool)
    attempt = attempts(app, Kind.READ)
    await asyncio.gather(*(attempt(number) for number in range(POOL)))  # all connections are there
    async with engine.begin() as connection:
        await connection.execute(LOCK)
        holders = [asyncio.create_task(attempt(number)) for number in range(POOL)]
        await _until_locked_out(connection)
        await _come_and_go(attempt, FIRST)
        before = resident()
        waiting = [asyncio.create_task(attempt(number)) for number in range(requests)]
        await _until_idle()
        memory = (resident() - before) / requests
        began = time.perf_counter()
        in_time = await _cancelled(waiting)
        took = (time.perf_counter() - began) / requests
    await asyncio.gather(*waiting, *holders, return_exceptions=True)
    await engine.dispose()
    return Waited(memory, took if in_time else None)


async def _until_locked_out(connection: AsyncConnection) -> None:
    async with asyncio.timeout(LONGEST):
        async for _ in _looks():
            if await connection.scalar(LOCKED_OUT) >= POOL:
                return


async def _come_and_go(attempt: Callable[[int], Coroutine[Any, Any, bool]], requests: int) -> None:
    waiting = [asyncio.create_task(attempt(number)) for number in range(requests)]
    await _until_idle()
    await _cancelled(waiting)


async def _until_idle() -> None:
    async with asyncio.timeout(LONGEST):
        spent = time.process_time()
        async for _ in _looks():
            if (now := time.process_time()) - spent < IDLE:
                return
            spent = now


async def _looks() -> AsyncIterator[None]:
    while True:
        await asyncio.sleep(LOOK_AGAIN)
        yield


async def _cancelled(waiting: list[asyncio.Task[bool]]) -> bool:
    for task in waiting:
        task.cancel()
    _, pending = await asyncio.wait(waiting, timeout=LONGEST)
    return not pending


CASE: Final = Waiting()
