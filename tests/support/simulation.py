"""A seeded event loop with a virtual clock, and a server of make-believe, for the pool's own code.

The loop sleeps never: when nothing is ready it moves its clock to the next timer. Steps of tasks are taken in an order
that a seed decides; every other callback keeps the order that asyncio promises. When nothing is ready and nothing is
timed, whoever still waits would wait for ever: that is `Stuck`, not a test that hangs.

What runs on it is the real ``stanch.pool.Pool`` under SQLAlchemy's greenlets: its ledger, door, admission and turns.
Only the driver and its connections are made up.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import random
import selectors
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from stanch.drivers.base import Driver, Plan, unavailable
from stanch.events import Observers
from stanch.meters import Instruments
from stanch.pool import Pool
from stanch.settings import Settings
from stanch.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine

    from stanch.events import Event


class Stuck(AssertionError):
    """Somebody waits for what will never come."""


class _Instant(selectors.DefaultSelector):
    """Waits for nothing: a timeout is time that passes on the loop's own clock."""

    loop: Simulation

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("nothing is ready and nothing is timed")
        self.loop.now += timeout
        return []


class Simulation(asyncio.SelectorEventLoop):
    """An event loop on which time passes only when nobody has anything else to do."""

    def __init__(self, chance: random.Random) -> None:
        selector = _Instant()
        super().__init__(selector)
        selector.loop = self
        self.now = 1000.0
        self.chance = chance

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        ready: Any = vars(self)["_ready"]
        if len(ready) > 1:
            places = [place for place, handle in enumerate(ready) if _is_step(handle)]
            if len(places) > 1:
                steps = [ready[place] for place in places]
                self.chance.shuffle(steps)
                for place, step in zip(places, steps, strict=True):
                    ready[place] = step
        super()._run_once()  # type: ignore[misc]

    @contextmanager
    def clock(self) -> Generator[None]:
        """``time.monotonic()`` is the loop's time inside."""
        real = time.monotonic
        time.monotonic = self.time
        try:
            yield
        finally:
            time.monotonic = real


def simulate(seed: int, scene: Callable[[random.Random], Coroutine[Any, Any, None]]) -> None:
    """Run *scene* to its end, in the order that *seed* decides: the same every time."""
    chance = random.Random(seed)
    random.seed(seed)  # what jitters in the pool
    loop = Simulation(chance)
    try:
        with loop.clock():
            loop.run_until_complete(scene(chance))
    except BaseException as error:
        error.add_note(f"STANCH_SEED={seed}")
        loop.set_exception_handler(lambda _loop, _context: None)  # the first failure is the one that tells
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_soon(loop.stop)
        loop.run_forever()
        raise
    finally:
        loop.close()


def _is_step(handle: Any) -> bool:
    return isinstance(getattr(handle._callback, "__self__", None), asyncio.Task)


class Unreachable(ConnectionError):
    """Nobody listens there."""


class TooMany(Exception):
    """What PostgreSQL says when max_connections is reached."""

    sqlstate = "53300"


class Wire:
    """A connection of make-believe, its own driver's connection as well."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.is_open = True
        self.is_busy = False
        server.connections.add(self)

    @property
    def driver_connection(self) -> Wire:
        return self

    def close(self) -> None:
        self.is_open = False
        self.server.connections.discard(self)

    def rollback(self) -> None:
        """What the pool asks for at each return."""

    terminate = close


class Server:
    """Counts what is connected to it, is slow by chance, and fails as it is told."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.connections: set[Wire] = set()
        self.most = 0
        self.attempts: list[float] = []
        self.room: int | None = None
        self.is_away = False
        self.failures = 0.0
        """The part of connects that fail for no reason of the server's."""
        self.slowness = 0.02

    def connect(self) -> Wire:
        self.attempts.append(time.monotonic())
        await_only(asyncio.sleep(self.chance.randrange(5) / 4 * self.slowness))
        if self.is_away:
            error: Exception = Unreachable()
        elif self.room is not None and len(self.connections) >= self.room:
            error = TooMany()
        elif self.chance.random() < self.failures:
            raise RuntimeError("planted")
        else:
            wire = Wire(self)
            self.most = max(self.most, len(self.connections))
            return wire
        raise unavailable([("the server", error)], 5.0) from error


class _Nobody(Observers):
    """A hundred thousand runs have more to tell than a log can hold."""

    def tell(self, event: Event) -> None:
        """Nobody is told."""


class FakeDriver(Driver):
    """See `Driver`; nothing here waits."""

    name: ClassVar[str] = "fake"
    read_only_options: ClassVar[Mapping[str, Any]] = {}
    reader_options: ClassVar[Mapping[str, Any]] = {}

    def plan(self, url: Any, settings: Settings) -> Plan:
        raise NotImplementedError

    def adopt(self, connect_args: dict[str, Any], settings: Settings) -> None:
        raise NotImplementedError

    def sever(self, connection: Any) -> None:
        connection.close()

    def looks_dead(self, connection: Any) -> bool:
        return not connection.is_open

    def is_idle(self, connection: Any) -> bool:
        return connection.is_open and not connection.is_busy

    async def clean(self, connection: Any, sql: str) -> None:
        raise NotImplementedError

    def prepare_engine(self, engine: AsyncEngine, settings: Settings) -> None:
        raise NotImplementedError


class FakeDialect:
    """As much of a dialect as a pool asks for."""

    is_async = True
    has_terminate = True
    dbapi: Any = None

    def do_rollback(self, connection: Any) -> None:
        connection.rollback()

    def do_close(self, connection: Any) -> None:
        connection.close()

    do_terminate = do_close

    def do_ping(self, connection: Any) -> bool:
        return bool(connection.is_open)

    def get_driver_connection(self, connection: Any) -> Any:
        return connection


def make_pool(server: Server, pool: type[Pool] = Pool, **settings: Any) -> Pool:
    """The pool under test, on *server*."""
    driver = FakeDriver()
    replaced = NullPool(server.connect, dialect=FakeDialect())  # type: ignore[arg-type]
    return pool(
        replaced,
        Settings.judge(**settings),
        driver=driver,
        watch=Watch(driver),
        observers=_Nobody(),
        instruments=Instruments(),
        database="simulated",
    )
