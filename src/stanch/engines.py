"""Makes an engine stanch's own: from a URL, or by taking an existing one over.

Both ways meet in ``_equip``: the engine's pool is replaced by ours (``Engine.pool`` is an attribute; its
listeners are carried over), the ends of its transactions are bounded, its errors are translated. The private
names of the replaced pool (``_recycle``, ``_pre_ping``, ``_timeout``, ``_max_overflow``, ``_do_get``) are used
in this module only.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from stanch.cancellation import keep_cancelled_connections
from stanch.drivers import driver_of, driver_of_engine
from stanch.errors import ConfigError
from stanch.ledger import Stats
from stanch.pool import Pool
from stanch.seams import TransactionEnds, translate_errors
from stanch.settings import Settings
from stanch.statements import judge_statements
from stanch.timing import Clock, Sending
from stanch.unverified import Unverified
from stanch.values import Value
from stanch.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool as SQLAlchemyPool

    from stanch.drivers import Driver, Plan
    from stanch.events import Observers
    from stanch.meters import Instruments
    from stanch.unverified import Verifier


class Equipped(Value):
    """An engine, and the pool of ours inside it; *pool* is None where the engine keeps its own."""

    engine: AsyncEngine
    pool: Pool | None
    readers: Equipped | None = None
    """The engine of the readers, where they have connections of their own."""

    @property
    def own(self) -> tuple[AsyncEngine, Pool | None]:
        """The engine of all but the readers, and its pool."""
        return self.engine, self.pool

    @property
    def engines(self) -> Sequence[AsyncEngine]:
        """All of them."""
        return [self.engine] if self.readers is None else [self.engine, *self.readers.engines]

    @property
    def pools(self) -> Sequence[Pool]:
        """Those that are ours."""
        own = [] if self.pool is None else [self.pool]
        return own if self.readers is None else [*own, *self.readers.pools]

    def stats(self) -> Stats:
        """The counts of this moment, of whichever pools there are."""
        return self._stats() if self.readers is None else self._stats().with_readers(self.readers.stats())

    def _stats(self) -> Stats:
        if self.pool is not None:
            return self.pool.stats()
        foreign = self.engine.sync_engine.pool
        if isinstance(foreign, QueuePool):
            return Stats(
                pool_size=foreign.size(),
                max_overflow=foreign._max_overflow,
                in_use=foreign.checkedout(),
                idle=foreign.checkedin(),
                waiting=0,
                adopted=False,
            )
        return Stats(pool_size=1, max_overflow=0, in_use=0, idle=0, waiting=0, adopted=False)


class Blueprint(Value):
    """Settings that were judged as a whole, and how to build the engine from them once it is needed."""

    settings: Settings
    driver: Driver
    build: Callable[[], Equipped]


def from_url(
    url: URL, given: Mapping[str, Any], *, observers: Observers, instruments: Instruments, database: str
) -> Blueprint:
    """A new engine for *url*, built on first use; every setting and URL parameter is judged now."""
    driver = driver_of(url)
    plan = driver.plan(url, Settings.judge(**given))
    settings = plan.settings
    equip = partial(_equip, driver=driver, observers=observers, instruments=instruments, database=database)
    if settings.reader_pool_size is None:
        return Blueprint(settings, driver, lambda: equip(_made(plan), settings=settings))
    of_readers = driver.plan(url, settings.for_readers())

    def build() -> Equipped:
        readers = equip(_made(of_readers), settings=of_readers.settings, reads_only=True)
        return Equipped(*equip(_made(plan), settings=settings).own, readers)

    return Blueprint(settings, driver, build)


def _made(plan: Plan) -> AsyncEngine:
    options = {"hide_parameters": True, **plan.engine_options}
    return create_async_engine(plan.url, poolclass=NullPool, connect_args=plan.connect_args, **options)


def from_engine(
    engine: AsyncEngine,
    given: Mapping[str, Any],
    *,
    observers: Observers,
    instruments: Instruments,
    database: str,
) -> Blueprint:
    """Take an existing *engine* over: its pool is replaced now by ours of the same size, its listeners are kept.

    Raises ``ConfigError`` while connections of its own pool are out: they would be lost to our books.
    """
    sync_engine = engine.sync_engine
    _refuse_used(sync_engine.pool)
    driver = driver_of_engine(engine)
    choice = dict(given)
    sync_engine.hide_parameters = bool(choice.pop("hide_parameters", True))
    settings = Settings.judge(**{**_habits_of(sync_engine.pool), **choice})
    _refuse_reader_pool(settings)
    _sever_idle(sync_engine.pool, driver)

    def adopt(_dialect: object, _record: object, _arguments: object, parameters: dict[str, Any]) -> None:
        driver.adopt(parameters, settings)

    event.listen(sync_engine, "do_connect", adopt)
    equipped = _equip(
        engine,
        settings=settings,
        driver=driver,
        observers=observers,
        instruments=instruments,
        database=database,
    )
    return Blueprint(settings, driver, lambda: equipped)


def beside_engine(engine: AsyncEngine, given: Mapping[str, Any]) -> Blueprint:
    """Use *engine* as it is, pool and all: only its sessions are ours."""
    settings = Settings.judge(**{**_habits_of(engine.sync_engine.pool), **given})
    _refuse_reader_pool(settings)
    if settings.verify_commits:
        raise ConfigError(
            "verify_commits=True has no COMMIT to watch: with adopt=False the engine keeps its own",
            remedies=[
                "Leave out adopt=False, so that the engine is taken over.",
                "Leave out verify_commits.",
            ],
        )
    return Blueprint(settings, driver_of_engine(engine), lambda: Equipped(engine, None))


def _equip(
    engine: AsyncEngine,
    *,
    settings: Settings,
    driver: Driver,
    observers: Observers,
    instruments: Instruments,
    database: str,
    reads_only: bool = False,
) -> Equipped:
    sync_engine = engine.sync_engine
    watch = Watch(driver)
    driver.prepare_engine(engine, settings)
    sending = Sending(sync_engine.dialect)
    clock = Clock(settings, observers=observers, instruments=instruments, database=database)
    if settings.track_holders:
        sending.keep_time(clock)
    else:
        instruments.prepare(partial(sending.keep_time, clock))
    judge_statements(sync_engine, settings, sending)
    translate_errors(sync_engine, redacted=sync_engine.hide_parameters, reads_only=reads_only)
    keep_cancelled_connections(sync_engine, driver=driver)
    pool = Pool(
        sync_engine.pool,
        settings,
        driver=driver,
        watch=watch,
        observers=observers,
        instruments=instruments,
        database=database,
        sized_by="reader_pool_size" if reads_only else "pool_size or max_overflow",
    )
    sync_engine.pool = pool
    verifier: Verifier = Unverified()
    if settings.verify_commits and sync_engine.dialect.name == "postgresql":
        from stanch.verdict import Asking  # noqa: PLC0415  # a tenth of what importing stanch costs, for those who ask

        verifier = Asking(
            sync_engine.dialect,
            settings,
            driver=driver,
            watch=watch,
            observers=observers,
            database=database,
            open_beside=pool.open_beside,
        )
    verifier.attach(pool)
    TransactionEnds(
        sync_engine, settings, driver=driver, watch=watch, verifier=verifier, sending=sending
    ).replace()
    return Equipped(engine, pool)


def _refuse_reader_pool(settings: Settings) -> None:
    if settings.reader_pool_size is not None:
        raise ConfigError(
            "reader_pool_size needs connections that stanch starts itself, and this engine brings its own",
            remedies=["Make the Database from a URL.", "Leave out reader_pool_size: readers share the pool."],
        )


def _refuse_used(pool: SQLAlchemyPool) -> None:
    if isinstance(pool, Pool):
        raise ConfigError(
            "engine: this engine already belongs to a Database",
            remedies=["Use that Database, or pass adopt=False to only look on."],
        )
    if isinstance(pool, StaticPool):
        raise ConfigError(
            "engine: its StaticPool lends one connection to everybody at once, so units would share transactions",
            remedies=[
                "Write Database('sqlite+aiosqlite:///:memory:'): one connection, lent to one unit at a time."
            ],
        )
    if isinstance(pool, QueuePool) and pool.checkedout():
        raise ConfigError(
            f"engine: {pool.checkedout()} of its connections are checked out, so its pool cannot be replaced",
            remedies=["Hand the engine over before its first use.", "Close its connections first."],
        )


def _sever_idle(pool: SQLAlchemyPool, driver: Driver) -> None:
    """Cut off what an earlier use of *pool* left open: nobody would ever close it. There is no loop to await in."""
    if isinstance(pool, QueuePool):
        for _ in range(pool.checkedin()):
            driver.sever(pool._do_get().driver_connection)


def _habits_of(pool: SQLAlchemyPool) -> dict[str, Any]:
    """The size and habits of a pool, under their public names."""
    habits: dict[str, Any] = {"pool_recycle": pool._recycle, "pool_pre_ping": pool._pre_ping}
    if isinstance(pool, QueuePool):
        habits |= {
            "pool_size": pool.size(),
            "max_overflow": pool._max_overflow,
            "pool_timeout": pool._timeout,
        }
    if isinstance(pool, NullPool | StaticPool):
        habits["poolclass"] = type(pool)
    return habits
