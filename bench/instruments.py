"""What the instruments cost: a checkout and a statement with everything on, against the same with everything off.

    make bench            # both drivers; ends with 1 if a checkout costs more than 25 microseconds more

All ways take turns, a few rounds each, so that what else the machine does meets all of them; the median of the
differences is told. Called from as deep as a handler is, since the line of user code is looked for on the stack.
"""

from __future__ import annotations

import asyncio
import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from stanch import Database
from stanch.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MOST: Final = 25.0
"""Microseconds more for a checkout with everything on."""
ROUNDS: Final = 120
TIMES: Final = 40
"""Checkouts in each round."""
OFF: Final[dict[str, Any]] = {"track_holders": False, "leak_after": None}
ONE: Final = text("SELECT 1")

Way = "Callable[[Database[Any]], Awaitable[None]]"


async def checkout(db: Database[Any]) -> None:
    """A connection, which nothing is done with: no round trip blurs what it costs."""
    async with db.engine.connect():
        pass


async def read(db: Database[Any]) -> None:
    """A session that reads once."""
    async with db.reader() as session:
        await session.execute(ONE)


async def _round(db: Database[Any], way: Callable[[Database[Any]], Awaitable[None]]) -> float:
    began = time.perf_counter()
    for _ in range(TIMES):
        await way(db)
    return (time.perf_counter() - began) / TIMES * 1e6


async def compare(url: str) -> float:
    """Tell what each costs more than with everything off; the answer is a checkout with everything on."""
    databases = {
        "off": Database(url, **OFF),
        "off too": Database(url, **OFF),
        "as it is": Database(url),
        "measured": Database(url),
    }
    databases["measured"].measure()
    worst = 0.0
    for way in (checkout, read):
        rounds: dict[str, list[float]] = {name: [] for name in databases}
        for _ in range(ROUNDS):
            for name, db in databases.items():
                rounds[name].append(await _round(db, way))
        base = median(rounds["off"])
        print(f"  {way.__name__}: {base:.1f} µs off", end="")
        for name in ("off too", "as it is", "measured"):
            more = median(one - off for one, off in zip(rounds[name], rounds["off"], strict=True))
            print(f"; {name} {more:+.1f} µs", end="")
            if way is checkout:
                worst = max(worst, more)
        print()
    for db in databases.values():
        await db.close()
    return worst


def main() -> int:
    """Compare on both drivers."""
    with EmbeddedPostgres() as server:
        worst = 0.0
        for driver in ("asyncpg", "psycopg"):
            print(driver)
            worst = max(worst, asyncio.run(compare(server.url(driver))))
    print(f"a checkout costs {worst:.1f} µs more with everything on (limit {MOST:.0f})")
    return 0 if worst <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
