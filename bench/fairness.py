"""Thirty-two keep-alive clients on a pool of ten: who waits how long on stanch, and on SQLAlchemy's own pool.

    make bench          # both drivers; ends with 1 if stanch falls short

Each client reads, as it is written on stanch (ReaderDep) and by hand; the app by hand also runs on stanch's pool alone,
to tell the pool from the rest. All are served at the same time, each by uvicorn in a process of its own, and are loaded
in alternating slices, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from typing import Final, NamedTuple

from bench.load import Answer, Kind, closed_loop, serving, share
from stanch.embedded import EmbeddedPostgres

POOL: Final = 10
CLIENTS: Final = 32
SLICE: Final = 2.0
SLICES: Final = 4
READ: Final = "/read"

KINDS: Final[tuple[Kind, ...]] = ("stanch", "by hand on its pool", "by hand")

SPREAD: Final = 5.0
"""How many times the median the slowest but one in a hundred may take."""


class Rate(NamedTuple):
    """What the clients of one app got."""

    per_second: float
    p50: float
    p99: float

    def __str__(self) -> str:
        p50, p99 = self.p50 * 1000, self.p99 * 1000
        return f"{self.per_second:6.0f}/s, p50 {p50:5.1f} ms, p99 {p99:6.1f} ms = {p99 / p50:4.1f} x p50"


def compare(url: str, *, slices: int = SLICES, seconds: float = SLICE) -> dict[Kind, Rate]:
    """The apps under the same load, in turns; raises if anything but a 200 came back."""
    answers: dict[Kind, list[Answer]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        ports = {
            kind: stack.enter_context(serving(kind, url, pool_size=POOL, max_overflow=0)) for kind in KINDS
        }
        for port in ports.values():
            asyncio.run(closed_loop(port, READ, clients=CLIENTS, seconds=0.5))  # warm
        for _ in range(slices):
            for kind in KINDS:
                answers[kind] += asyncio.run(closed_loop(ports[kind], READ, clients=CLIENTS, seconds=seconds))
    return {kind: _rate(answers[kind], slices * seconds) for kind in KINDS}


def _rate(answers: list[Answer], seconds: float) -> Rate:
    if statuses := {answer.status for answer in answers} - {200}:
        raise RuntimeError(f"not only 200, but also {statuses}")
    took = [answer.took for answer in answers]
    return Rate(len(took) / seconds, share(took, 0.5), share(took, 0.99))


def main() -> int:
    """Compare on both drivers; 1 if stanch is less even, or slower than SQLAlchemy's pool."""
    fell_short = False
    with EmbeddedPostgres() as server:
        for driver in ("asyncpg", "psycopg"):
            rates = compare(server.url(driver))
            for kind, rate in rates.items():
                print(f"{driver:8} {kind:19} {rate}", flush=True)
            ours, theirs = rates["stanch"], rates["by hand"]
            fell_short |= ours.p99 > SPREAD * ours.p50 or ours.per_second < theirs.per_second
    return int(fell_short)


if __name__ == "__main__":
    sys.exit(main())
