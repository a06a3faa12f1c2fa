"""Results that nobody has measured: of the size and the shape of a real run, with every number invented."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from bench.results import Better, Figure, Results
from bench.shop import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class InventedCase(NamedTuple):
    """What the page asks of a case."""

    name: str
    title: str
    method: str = "Invented, for a test: *nothing* was measured."


CASES = [
    InventedCase("counts", "Round trips, statements, connections"),
    InventedCase("instructions", "CPU instructions per request"),
    InventedCase("rates", "Requests per second, CPU and latency"),
    InventedCase("workers", "One, two and four workers"),
    InventedCase("fairness", "Fairness: who waits how long on a full pool"),
    InventedCase("hold_time", "How long a connection is held"),
    InventedCase("overload", "More load than can be served"),
    InventedCase("waiting", "Memory of a request that waits"),
    InventedCase("growth", "Growth over a million requests"),
    InventedCase("imports", "Import time"),
]

COSTS = {
    "bare": 0.28,
    "asyncpg": 0.36,
    "asyncpg-reset": 0.38,
    "core": 0.72,
    "orm-floor": 0.65,
    "article": 1.0,
    "article-ping": 1.09,
    "commit-after-yield": 1.02,
    "advanced-alchemy": 1.17,
    "context-async": 0.97,
    "fastapi-async": 1.18,
    "fastapi-toolsets": 1.11,
    "sqlmodel": 1.9,
    "stanch": 0.94,
    "stanch-reader": 0.84,
}
"""Of each subject, what everything is made of; the last two are the ones that are highlighted."""

TITLES = {name: f"an invented {name}" for name in COSTS}
MACHINE = {"processor": "invented", "cores": 2, "load": {"at the start": 0.25}}


def invented_results() -> Results:
    """A whole run."""
    return Results(
        dict(MACHINE),
        {"python": "3.0 (invented)", "sqlalchemy": "0.0 (invented)"},
        "invented",
        list(_figures(random.Random(20261126))),
        {"restart": "nothing is measured here", "some-peer": "it is not installed"},
    )


def figure(
    case: str,
    subject: str,
    where: Mapping[str, str | float],
    quantity: str,
    *rounds: float,
    better: Better = "less",
    unit: str = "ms",
) -> Figure:
    """One, in short."""
    return Figure(case, subject, where, quantity, unit, better, rounds)


def _figures(chance: random.Random) -> Iterator[Figure]:
    where: dict[str, str | float]

    def around(value: float, spread: float = 0.06) -> tuple[float, ...]:
        return tuple(value * chance.gauss(1, spread) for _ in range(7))

    for subject, cost in COSTS.items():
        reader, writer = subject == "stanch-reader", subject.startswith("stanch")
        trips = 6 if subject == "article-ping" else 3
        for number, kind in enumerate(Kind):
            if (subject == "bare") != (kind is Kind.BARE):
                continue
            where = {"kind": kind.ask.title}
            read = 1 if reader or subject == "asyncpg" else trips
            counted = {"READ": read, "SLOW": read, "FIVE": read + 4, "WRITE": 2 if writer else 3, "ORDER": 5}
            for quantity in ("round trips", "statements", "connections opened"):
                value = counted.get(kind.name, 0) if quantity != "connections opened" else 1
                yield figure("counts", subject, where, quantity, value, unit="1")
            instructions = round(cost * 1_850_000 * (1 + 0.35 * number) * chance.gauss(1, 0.01))
            yield figure("instructions", subject, where, "instructions", instructions, unit="1")
        if subject == "bare":
            continue
        yield figure("counts", subject, {"opening": "first"}, "round trips", trips + 9, unit="1")
        for rtt in (0, 0.5, 2):
            for clients in (1, 32):
                where = {"kind": "one-row read", "rtt_ms": rtt, "clients": clients, "pool": 10}
                took = (cost * 1.4 + rtt * (1 if reader or subject == "asyncpg" else trips)) * (
                    1 if clients == 1 else 14
                )
                rate = around(clients / took * 1000)
                yield figure("rates", subject, where, "requests", *rate, better="more", unit="1/s")
                yield figure("rates", subject, where, "cpu", *around(cost * 800), unit="us")
                for quantity, factor in (("p50", 1.0), ("p99", 2.2 if writer else 12), ("p99.9", 20)):
                    yield figure("rates", subject, where, quantity, *around(took * factor, 0.15))
        for workers in (1, 2, 4):
            rate = around(420 / cost * min(workers, 2.2) ** 0.9)
            where = {"driver": "asyncpg", "workers": workers}
            yield figure("workers", subject, where, "requests", *rate, better="more", unit="1/s")
        where = {"driver": "asyncpg", "clients": 32, "pool": 10}
        yield figure("fairness", subject, where, "requests", *around(500 / cost), better="more", unit="1/s")
        yield figure("fairness", subject, where, "p99", *around(70 if writer else 600, 0.2))
        yield figure("fairness", subject, where, "failed", 0, 0, 0 if subject != "stanch" else 1, unit="")
        held = around(1.1 if reader else 51 * cost)
        yield figure("hold_time", subject, {"driver": "asyncpg", "kind": Kind.SLOW.ask.title}, "held", *held)
        for load in (1, 2, 4):
            good = (0.96 if load == 1 else 0.94 if writer else 0.31) * 190
            where = {"driver": "asyncpg", "load": load}
            yield figure("overload", subject, where, "good answers", *around(good), better="more", unit="1/s")
            refused = 0 if load == 1 or not writer else 40 * load
            yield figure("overload", subject, where, "refused", refused, better="neither", unit="%")
        yield figure("waiting", subject, {"waiting": 500}, "memory", *around(31_000 * cost), unit="B")
        grown = [chance.gauss(0, 0.4) for _ in range(5)]
        yield figure("growth", subject, {"requests": 1_000_000}, "growth", *grown, unit="KiB")
        yield figure("imports", subject, {}, "import", *around(cost * 0.9 + 0.3, 0.02), unit="s")
