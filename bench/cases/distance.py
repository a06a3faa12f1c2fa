"""One read after the other, the database at a distance: until the reply is there, and until the session has ended."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.apart import apart
from bench.cases.case import Scale
from bench.cases.rounds import Gathered, lanes, rotated, together
from bench.driven import caller
from bench.shop import Kind
from bench.subjects import Setting
from bench.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from bench.cases.case import Ground
    from bench.results import Figure

RTTS: Final = (0.5, 2.0)
"""Milliseconds that a round trip to PostgreSQL takes longer."""
PEERS: Final = frozenset({"advanced-alchemy", "context-async", "fastapi-async", "fastapi-toolsets"})
OTHERS: Final = frozenset(
    {"asyncpg", "commit-after-yield", "article", "article-ping", "stanch", "stanch-reader"}
)
SOME: Final = OTHERS | PEERS
WARMING: Final = 0.2
STARTING: Final = 1.0
LENGTHS: Final = {Scale.QUICK: (5, 0.2), Scale.FULL: (15, 1.0)}
"""Rounds, and seconds of one of them."""


class Distance:
    """The case."""

    name = "distance"
    title = "One read after the other, the database at a distance"
    method = (
        "One caller, in process, and a proxy that makes each round trip to PostgreSQL take so much longer. *requests*:"
        " those a second of a caller who makes the next one when the last has ended: the reply is there, the session"
        " closed, and its connection free again. *reply*: how long it takes until the reply is there, which is what a"
        " client waits for. *end*: until all has ended, which is what a connection is needed for. The two differ where"
        " a session is closed after the reply, as by a dependency with `yield` since FastAPI 0.118: there the ROLLBACK"
        " delays nobody but the next who needs the connection. Medians of each round."
    )

    def needs(self) -> str | None:
        """Nothing."""
        return None

    def seconds(self, ground: Ground) -> float:
        """By the number of subjects."""
        rounds, seconds = LENGTHS[ground.scale]
        return len(lanes(ground, Kind.READ, quick=SOME)) * (
            STARTING + len(RTTS) * (WARMING + rounds * (seconds + 0.02))
        )

    def run(self, ground: Ground) -> Iterator[Figure]:
        """In turns."""
        rounds, seconds = LENGTHS[ground.scale]
        gathered = Gathered(self.name)
        with ExitStack() as stack:
            wire = stack.enter_context(Wire(ground.server.port))
            apps = stack.enter_context(
                together(
                    {
                        lane: apart(
                            lane.subject.name,
                            Setting(wire.through(ground.server.url(lane.driver)), pool_size=1),
                        )
                        for lane in lanes(ground, Kind.READ, quick=SOME)
                    }
                )
            )
            for rtt in RTTS:
                wire.delay(rtt / 1000)
                for app in apps.values():
                    app.run(call_after_call, WARMING)
                for number in range(rounds):
                    for lane in rotated(list(apps), number):
                        ground.step(f"{rtt} ms, round {number + 1} of {rounds}: {lane}")
                        told = apps[lane].run(call_after_call, seconds)
                        of = gathered.of(lane.subject.name, driver=lane.driver, rtt_ms=rtt)
                        of.more("requests", "1/s", told.rate)
                        of.less("reply", "ms", told.reply * 1000)
                        of.less("end", "ms", told.end * 1000)
        yield from gathered.figures()


class Called(NamedTuple):
    """What came of one round; lengths in seconds."""

    rate: float
    reply: float
    end: float


async def call_after_call(app: FastAPI, seconds: float) -> Called:
    """One request after the other for so long; whatever is not answered with 200 raises."""
    begun: list[float] = []
    replied: list[float] = []
    ended: list[float] = []
    call = caller(app, Kind.READ, on_reply=lambda: replied.append(time.perf_counter()))
    while not ended or ended[-1] - begun[0] < seconds:
        begun.append(time.perf_counter())
        await call(len(begun))
        ended.append(time.perf_counter())
    return Called(
        len(ended) / (ended[-1] - begun[0]),
        median(reply - begin for begin, reply in zip(begun, replied, strict=True)),
        median(end - begin for begin, end in zip(begun, ended, strict=True)),
    )


CASE: Final = Distance()
