"""What one request costs on the wire, by a proxy that counts: round trips, statements, connections."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

from bench import shop
from bench.driven import caller
from bench.results import Figure
from bench.shop import Kind
from bench.subjects import Setting
from tests.support.proxy import FaultProxy  # the tests' own: it has tests of its own, and there is one truth

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator
    from types import TracebackType

    from fastapi import FastAPI

    from bench.cases.case import Ground
    from bench.subjects import Subject

T = TypeVar("T")

DRIVER: Final = "asyncpg"
WARMING: Final = 7
"""Requests before it counts: psycopg prepares a statement at the sixth time."""
COUNTED: Final = 3
"""Requests of each kind; their median is told."""
ROUND_TRIP: Final = 0.01
"""Seconds that each takes while it counts. What is written and not waited for is answered that much after the request
has ended, so that it is not taken for a wait."""
AWAY: Final = 0.1
"""Seconds that each takes while two requests hold a connection at the same time."""


class Wire(NamedTuple):
    """What passed, since the proxy was started."""

    round_trips: int = 0
    statements: int = 0
    connections: int = 0

    def __sub__(self, before: Wire) -> Wire:
        return Wire(*(now - was for now, was in zip(self, before, strict=True)))


class Counting:
    """A ``FaultProxy`` in a thread of its own: subjects may block theirs."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="counting proxy", daemon=True)
        self._proxy = FaultProxy(port)
        self._messages: Counter[str] = Counter()
        self._proxy.on_client_message = self._see

    def _see(self, kind: str, _payload: bytes) -> None:
        self._messages[kind] += 1

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._proxy.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._do(self._proxy.__aexit__(kind, error, trace))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _call(self, work: Callable[[], T]) -> T:
        async def called() -> T:
            return work()

        return self._do(called())

    def through(self, url: str) -> str:
        """*url* by way of this proxy."""
        return self._proxy.through(url)

    def delay(self, seconds: float) -> None:
        """Make each round trip take that much longer; 0 is not at all."""
        self._call(lambda: self._proxy.delay(seconds) if seconds else self._proxy.pass_through())

    def seen(self) -> Wire:
        """Until now. A statement is a Query or an Execute: BEGIN and COMMIT are among them."""
        return self._call(
            lambda: Wire(
                self._proxy.round_trips,
                self._messages["Q"] + self._messages["E"],
                self._proxy.connections - self._proxy.cancel_requests,
            )
        )


@contextmanager
def no_waiting_elsewhere() -> Generator[None]:
    """The slow call takes no time: it is no round trip."""
    before, shop.ELSEWHERE = shop.ELSEWHERE, 0.0  # type: ignore[misc]  # put back
    try:
        yield
    finally:
        shop.ELSEWHERE = before  # type: ignore[misc]


async def of_request(app: FastAPI, kind: Kind, wire: Counting) -> Wire:
    """What a warm request of this *kind* waits for."""
    call = caller(app, kind)
    for number in range(WARMING):
        await call(number)
    counted: list[Wire] = []
    wire.delay(ROUND_TRIP)
    for number in range(COUNTED):
        before = wire.seen()
        await call(number)
        awaited = wire.seen().round_trips
        await asyncio.sleep(2 * ROUND_TRIP)  # what was sent and not waited for arrives now
        counted.append(wire.seen()._replace(round_trips=awaited) - before)
    wire.delay(0)
    return Wire(*(int(median(values)) for values in zip(*counted, strict=True)))


async def of_subject(subject: Subject, url: str, wire: Counting) -> dict[Kind, Wire]:
    """What a warm request waits for, by kind, on a pool of one connection."""
    app = subject.build(Setting(url, pool_size=1))
    async with app.router.lifespan_context(app):
        return {kind: await of_request(app, kind, wire) for kind in Kind if kind in subject.kinds}


async def of_opening(subject: Subject, url: str, wire: Counting) -> tuple[Wire, Wire]:
    """What the first read of an app waits for, and then a read that opens one more connection.

    The logging in itself is not counted, for not every server asks for the same.
    """
    app = subject.build(Setting(url, pool_size=2))
    call = caller(app, Kind.READ)
    before = wire.seen()
    async with app.router.lifespan_context(app):
        await call(0)
        first = wire.seen() - before
        for number in range(WARMING):
            before = wire.seen()
            await call(number)
        warm = wire.seen() - before
        before = wire.seen()
        wire.delay(AWAY)  # so that both are under way at once
        await asyncio.gather(call(2), call(3))
        wire.delay(0)
        both = wire.seen() - before
    return first, both - warm


class Counts:
    """The case."""

    name = "counts"
    title = "Round trips, statements and connections"
    method = (
        "A proxy that understands PostgreSQL's protocol stands between the app and the server. *Round trips* are those "
        "that a warm request waited for: sent, and answered before the request ended; its client has the reply "
        "already where a dependency closes its session after that, as in the article's pattern. *Statements* are all "
        "that the server carried out, BEGIN, COMMIT and ROLLBACK among them, also where several travel together. "
        "*Connections* are those opened by a warm request. The pool has one connection "
        f"({DRIVER}; SQLModel's template: psycopg). Besides: the first read of an app, and a read that opens one more "
        "connection; logging in is not counted."
    )

    def needs(self) -> str | None:
        """Nothing."""
        return None

    def seconds(self, ground: Ground) -> float:
        """Most of it is the delay."""
        return sum(1 + COUNTED * ROUND_TRIP * 6 * len(subject.kinds) for subject in ground.subjects)

    def run(self, ground: Ground) -> Iterator[Figure]:
        """Count."""
        with Counting(ground.server.port) as wire, no_waiting_elsewhere():
            url = wire.through(ground.server.url(DRIVER))
            for subject in ground.subjects:
                ground.step(subject.title)
                yield from self._of(subject, url, wire)

    def _of(self, subject: Subject, url: str, wire: Counting) -> Iterator[Figure]:
        for kind, counted in asyncio.run(of_subject(subject, url, wire)).items():
            yield from self._figures(subject.name, {"kind": kind.ask.title}, counted)
        if Kind.READ in subject.kinds:
            opened = asyncio.run(of_opening(subject, url, wire))
            for connection, counted in zip(("first", "one more"), opened, strict=True):
                yield from self._figures(
                    subject.name, {"kind": Kind.READ.ask.title, "connection": connection}, counted
                )

    def _figures(self, subject: str, where: dict[str, str | float], counted: Wire) -> Iterator[Figure]:
        for quantity, value in zip(("round trips", "statements", "connections"), counted, strict=True):
            yield Figure(self.name, subject, where, quantity, "1", "less", (float(value),))


CASE: Final = Counts()
