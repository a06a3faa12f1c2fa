"""What stanch's own instruments cost: a checkout and a read with them, against the same with everything off."""

from __future__ import annotations

import asyncio
import importlib
import time
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from bench.cases.case import Scale
from bench.cases.rounds import DRIVERS, Gathered, rotated
from stanch import Database

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from bench.cases.case import Ground
    from bench.results import Figure

    Way = Callable[[Database[Any]], Awaitable[None]]

TIMES: Final = 40
"""Checkouts or reads in each round."""
ROUNDS: Final = {Scale.QUICK: 60, Scale.FULL: 400}
OFF: Final[dict[str, Any]] = {"track_holders": False, "leak_after": None}
SWITCHED_OFF: Final = "everything off"
OPENTELEMETRY: Final = "OpenTelemetry"
ONE: Final = text("SELECT 1")
EACH: Final = 0.0007
"""Seconds of a checkout and a read, about."""


class Instruments:
    """The case."""

    name = "instruments"
    title = "Instruments: what it costs to know who holds what"
    method = (
        "A checkout without any statement, so that no round trip blurs what it costs, and a read by `db.reader()`:"
        " with the holders' book and the leak report off; the same once more, which shows what is noise; as stanch is"
        " by default; measured (`db.measure()`, for the pages and Prometheus); and told to OpenTelemetry, with an SDK"
        f" that samples every span and exports none. They take turns, {TIMES} at a time; *more* is the difference to"
        " everything off in the same round."
    )

    def needs(self) -> str | None:
        """Nothing; without OpenTelemetry's SDK that one is left out."""
        return None

    def seconds(self, ground: Ground) -> float:
        """By the number of rounds."""
        return len(_drivers(ground)) * ROUNDS[ground.scale] * TIMES * len(WITH) * EACH

    def run(self, ground: Ground) -> Iterator[Figure]:
        """Each driver."""
        for driver in _drivers(ground):
            gathered = Gathered(self.name)
            asyncio.run(_compare(gathered, driver, ground))
            yield from gathered.figures()


def _drivers(ground: Ground) -> tuple[str, ...]:
    return DRIVERS if ground.scale is Scale.FULL else DRIVERS[:1]


# The databases -----------------------------------------------------------------------------------------------


def _off(url: str) -> Database[Any]:
    return Database(url, **OFF)


def _by_default(url: str) -> Database[Any]:
    return Database(url)


def _measured(url: str) -> Database[Any]:
    database = Database(url)
    database.measure()
    return database


def _told_to_opentelemetry(url: str) -> Database[Any] | None:
    try:
        trace: Any = importlib.import_module("opentelemetry.sdk.trace")
        metrics: Any = importlib.import_module("opentelemetry.sdk.metrics")
        ours: Any = importlib.import_module("stanch.opentelemetry")
    except ImportError:
        return None
    database = Database(url)
    ours.instrument(
        database,
        tracer_provider=trace.TracerProvider(shutdown_on_exit=False),
        meter_provider=metrics.MeterProvider(shutdown_on_exit=False),
    )
    return database


WITH: Final[Mapping[str, Callable[[str], Database[Any] | None]]] = {
    SWITCHED_OFF: _off,
    "everything off, again": _off,
    "as it is": _by_default,
    "measured": _measured,
    OPENTELEMETRY: _told_to_opentelemetry,
}
"""By name; None where a package is missing."""


# The ways ----------------------------------------------------------------------------------------------------


async def checkout(database: Database[Any]) -> None:
    """A connection, which nothing is done with."""
    async with database.engine.connect():
        pass


async def read(database: Database[Any]) -> None:
    """A session that reads once."""
    async with database.reader() as session:
        await session.execute(ONE)


async def _compare(gathered: Gathered, driver: str, ground: Ground) -> None:
    made = {name: make(ground.server.url(driver)) for name, make in WITH.items()}
    databases = {name: database for name, database in made.items() if database is not None}
    for way in (checkout, read):
        ground.step(f"{way.__name__}, {driver}")
        for database in databases.values():
            await _time(database, way)
        for number in range(ROUNDS[ground.scale]):
            took = {name: await _time(databases[name], way) for name in rotated(list(databases), number)}
            for name in databases:
                of = gathered.of(name, driver=driver, what=way.__name__)
                of.less("time", "µs", took[name])
                more = None if name == SWITCHED_OFF else took[name] - took[SWITCHED_OFF]
                of.less("more", "µs", more)
    for name, database in databases.items():
        if name == OPENTELEMETRY:
            importlib.import_module("stanch.opentelemetry").uninstrument(database)
        await database.close()


async def _time(database: Database[Any], way: Way) -> float:
    began = time.perf_counter()
    for _ in range(TIMES):
        await way(database)
    return (time.perf_counter() - began) / TIMES * 1e6


CASE: Final = Instruments()
