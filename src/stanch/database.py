"""The ``Database``: one object that lives as long as the app and opens everything else."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from functools import cached_property
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    ParamSpec,
    Self,
    TypeVar,
    TypeVarTuple,
    Unpack,
    cast,
    overload,
)

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from stanch.attempts import Attempts
from stanch.callers import place_of_caller
from stanch.completion import run_to_completion
from stanch.deadlines import Deadline, earlier, in_force
from stanch.engines import beside_engine, from_engine, from_url
from stanch.errors import ConfigError
from stanch.events import Event, Observer, Observers, WorkDropped
from stanch.gather import Gathering
from stanch.guards import Guard, Owner
from stanch.hooks import Runner
from stanch.lifetime import Lifetime, State
from stanch.meters import Instruments, Meter
from stanch.readiness import until_it_answers
from stanch.retry import Retry
from stanch.sessions import Terms, guard_of, guarded, guarded_session, refuse_changes
from stanch.settings import Settings, judge_url
from stanch.stopping import all_sent
from stanch.transactions import Ending, IsolationLevel, close_for_good, connection_options, finish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence

    from sqlalchemy import URL

    from stanch.callers import Place
    from stanch.drivers import Driver
    from stanch.engines import Equipped
    from stanch.ledger import Checkout, Stats
    from stanch.measuring import Holding, Measuring
    from stanch.settings.options import Options

S = TypeVar("S", bound=AsyncSession)
T = TypeVar("T")
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")

_BETWEEN_LOOKS: Final = 0.02
"""Seconds between two looks at the pool while it drains."""


class Database(Gathering[S], Generic[S]):
    """A database of the app: its engine, its pool, its sessions and transactions.

    Construction judges every setting and opens nothing. ``async with db`` (or ``open()`` and ``close()``)
    opens and drains it; it nests, and can be opened again. Without it, the first use opens.

    *source* is a URL (``str`` or SQLAlchemy ``URL``) or an existing ``AsyncEngine``, whose pool is then
    replaced by ours of the same size (``adopt=False`` leaves it alone; what is promised about the pool then
    does not hold). *session_class* is the class of every session, typed through. All settings are those of
    ``Settings``, under SQLAlchemy's and PostgreSQL's own names; a wrong one raises ``ConfigError`` here,
    before anything opens.

    >>> Database("sqlite+aiosqlite:///:memory:", name="shop")
    <Database 'shop', not opened yet>
    """

    @overload
    def __init__(
        self: Database[AsyncSession],
        source: str | URL | AsyncEngine,
        *,
        name: str = ...,
        adopt: bool = ...,
        **settings: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        source: str | URL | AsyncEngine,
        *,
        session_class: type[S],
        name: str = ...,
        adopt: bool = ...,
        **settings: Unpack[Options],
    ) -> None: ...

    def __init__(
        self,
        source: str | URL | AsyncEngine,
        *,
        session_class: type[Any] = AsyncSession,
        name: str = "main",
        adopt: bool = True,
        **settings: Unpack[Options],
    ) -> None:
        self.name = name
        self._observers = Observers()
        self._instruments = Instruments()
        self._measuring: Measuring | None = None
        self._lifetime = Lifetime(name)
        self._session_class = _judge_session_class(session_class)
        if not isinstance(source, AsyncEngine):
            self._blueprint = from_url(
                judge_url(source),
                settings,
                observers=self._observers,
                instruments=self._instruments,
                database=name,
            )
        elif adopt:
            self._blueprint = from_engine(
                source, settings, observers=self._observers, instruments=self._instruments, database=name
            )
        else:
            self._blueprint = beside_engine(source, settings)

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, *, name: str = "main"
    ) -> Database[AsyncSession]:
        """From ``DATABASE_URL`` and ``STANCH_<SETTING>``, as in ``STANCH_POOL_SIZE=20``.

        Raises ``ConfigError`` for a missing URL, an unknown ``STANCH_`` name or a value that does not parse.
        """
        url, settings = Settings.from_environ(os.environ if environ is None else environ)
        return Database(url, name=name, **cast("Options", settings))

    # What it is -----------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._blueprint.settings

    @property
    def state(self) -> State:
        """Where it stands in its life: not opened yet, open, closing or closed."""
        return self._lifetime.state

    @property
    def engine(self) -> AsyncEngine:
        """SQLAlchemy's engine, for those who must; its pool is ours."""
        return self._equipped.engine

    @property
    def reader_engine(self) -> AsyncEngine:
        """The engine of the readers: the same, unless ``reader_pool_size`` gives them one of their own."""
        return (self._equipped.readers or self._equipped).engine

    @property
    def driver(self) -> Driver:
        """What is particular to the database driver in use; for stanch's own shells."""
        return self._blueprint.driver

    @cached_property
    def session_factory(self) -> async_sessionmaker[S]:
        """The ``async_sessionmaker``, for libraries that ask for one. Its sessions are guarded, and yours to close."""
        return async_sessionmaker(
            self.engine,
            class_=self._session_class,
            sync_session_class=guarded(self._session_class, self._terms),
            autoflush=self.settings.autoflush,
            expire_on_commit=self.settings.expire_on_commit,
            close_resets_only=False,
        )

    def stats(self) -> Stats:
        """How many connections are in use and idle, and how many callers wait, at this moment.

        Readers with connections of their own are counted in; ``readers`` of it is their part.
        """
        return self._equipped.stats()

    def observe(self, observer: Observer) -> None:
        """Tell *observer* of every event as it happens, after the log."""
        self._observers.add(observer)

    def measure(self) -> Measuring:
        """Begin to keep numbers of what is waited, held and executed, and give them; the same object at every call.

        Costs a few microseconds for each checkout and statement from now on; nothing before it is asked for.
        """
        if self._measuring is None:
            from stanch.measuring import Measuring  # noqa: PLC0415  # only for those who ask

            self._measuring = Measuring(self.name, stats=self.stats, holders=self.holdings)
            self.meter(self._measuring)
            self.observe(self._measuring.note)
        return self._measuring

    def meter(self, meter: Meter) -> Callable[[], None]:
        """Tell *meter* of every measurable step from now on, on the hot path; see ``Meter``. The answer ends it."""
        return self._instruments.add(meter)

    def holdings(self) -> Sequence[Holding]:
        """Who holds a connection now, longest held first; of all pools, readers' included.

        Not known of an engine that keeps its own pool (``adopt=False``): then it is empty.
        """
        from stanch.measuring import holding_of  # noqa: PLC0415  # only for those who ask

        now = time.monotonic()
        held = (checkout for pool in self._equipped.pools for checkout in pool.held())
        return [holding_of(checkout, now) for checkout in sorted(held, key=lambda checkout: checkout.since)]

    def tell(self, event: Event) -> None:
        """Tell the log and every observer of *event*; for stanch's own shells."""
        self._observers.tell(event)

    def __repr__(self) -> str:
        return f"<Database {self.name!r}, {self._lifetime.state.value}>"

    # Opening and closing --------------------------------------------------------------------------------

    async def open(self, *, wait: float = 0.0) -> Self:
        """Make sure the database answers; the first of several openers does, the others are counted.

        While the server is starting or unreachable, try again for up to *wait* seconds (jittered backoff),
        then raise what stood in the way. Any other failure is raised at once.
        """
        if self._lifetime.open():
            try:
                await until_it_answers(self.engine, wait=wait)
            except BaseException:
                await self.close()
                raise
        return self

    async def close(self) -> None:
        """The last opener's close drains: refuse new sessions, wait for open ones, then close every connection.

        Waits at most ``drain_timeout`` seconds; what is held even then is severed and told as ``StillHeld``.
        Closing twice does nothing.
        """
        if self._lifetime.close():
            await run_to_completion(self._drain())

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    @asynccontextmanager
    async def lifespan(self, _app: object = None) -> AsyncGenerator[None]:
        """``async with db`` in the shape of an ASGI lifespan: ``FastAPI(lifespan=db.lifespan)``."""
        async with self:
            yield

    # Connections ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[AsyncConnection]:
        """A connection as ``AsyncEngine.connect()`` gives it: you commit; what you did not commit rolls back."""
        self._lifetime.enter()
        try:
            connection = await self.engine.connect()
            try:
                yield connection
            finally:
                await run_to_completion(connection.close())
        finally:
            self._lifetime.leave()

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[AsyncConnection]:
        """A connection in a transaction, as ``AsyncEngine.begin()``: commits at the end, rolls back on an error."""
        async with self.connect() as connection, connection.begin():
            yield connection

    # Sessions -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def session(self, *, timeout: float | None = None) -> AsyncGenerator[S]:
        """A plain session. You commit; uncommitted work rolls back at the end, and a ``WorkDropped`` event says so.

        Where only the server knows whether something was written (by a function, in ``text()`` that begins with WITH,
        DDL) it is asked at the end, within ``close_timeout``: one round trip, in a case of doubt alone. If it cannot
        answer, because the transaction has failed, what was executed counts as written.
        After the block the session is closed for good: using it raises ``SessionClosed``. *timeout* is as for
        ``transaction()``.
        """
        session, ending = self._opened("session", timeout)
        try:
            yield session
        except BaseException:
            await finish(ending, commit=False)
            raise
        await close_for_good(ending)

    @asynccontextmanager
    async def reader(self, *, timeout: float | None = None) -> AsyncGenerator[S]:
        """A session for reading, which holds a connection only while a statement runs: no BEGIN, one round trip each.

        Each statement sees what was committed when it began; two of them may see different states. For one state of
        all: ``db.transaction(read_only=True, isolation_level="REPEATABLE READ")``. Raises ``WriteRefused`` for what
        could write (a flush, DML, locking, functions of known names), and at the end of the block if objects were
        changed. Not seen is what a function of yours writes inside. *timeout* is as for ``transaction()``.
        """
        session, ending = self._opened("reader", timeout)
        guarded_session(session).start_reading()
        try:
            yield session
            refuse_changes(session)
        except BaseException:
            await finish(ending, commit=False)
            raise
        await close_for_good(ending)

    @asynccontextmanager
    async def transaction(
        self,
        *,
        isolation_level: IsolationLevel | None = None,
        read_only: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerator[S]:
        """A session in a transaction that commits at the end of the block and rolls back if the block raises.

        Raises ``CommitRefused`` if the server rolled back instead, and ``CommitUnknown`` if the connection
        was lost while COMMIT was on its way. ``rollback_only(session)`` makes the end a rollback without an
        error. *isolation_level* and *read_only* are those of PostgreSQL's ``SET TRANSACTION`` and cost no
        round trip.

        *timeout* (seconds, from now) bounds the wait for a connection, opening one, every statement, COMMIT and
        the return, together. When it has passed the connection in hand is severed, and whoever waited is told
        ``DeadlinePassed`` (``PoolExhausted`` or ``DatabaseUnavailable`` before there was a connection,
        ``CommitUnknown`` at COMMIT); later uses of the session raise ``DeadlinePassed`` at once. Code in the
        block that waits for something else is not interrupted.
        """
        options = connection_options(self.driver, isolation_level=isolation_level, read_only=read_only)
        session, ending = self._opened("transaction", timeout, options)
        guard = guard_of(session)
        guard.owners.append(Owner(f"db.transaction() at {guard.holder}"))
        try:
            yield session
        except BaseException:
            await finish(ending, commit=False)
            raise
        await finish(ending, commit=not guard.rollback_only)

    async def run_transaction(
        self,
        work: Callable[[S, *Ts], Awaitable[T]],
        /,
        *args: *Ts,
        retry: Retry | int = 3,
        isolation_level: IsolationLevel | None = None,
    ) -> T:
        """What ``await work(session, *args)`` returns, committed; the whole of it is done again where that may help.

        Each attempt has a session and a transaction of its own. Another one follows a serialization failure or a
        deadlock (also one that shows at COMMIT), SQLite's busy, a server that cannot be reached, and a connection
        lost before COMMIT was sent; never a ``CommitUnknown``, or an attempt that has committed by hand, unless
        ``Retry(idempotent=True)`` says that doing it twice does no harm; and nothing else. *retry* is a ``Retry``,
        or the number of attempts. The work sees by ``attempt_of(session)`` which attempt it is in. Keep mail,
        HTTP calls and the like out of it: they are not undone.

        Raises the error of the last attempt itself, the earlier ones as its notes; ``InsideTransaction`` if the
        calling task already holds a connection of this database. ``rollback_only(session)`` is no error.
        """
        return await Attempts(self, Retry.of(retry), isolation_level).at(work, *args)

    def transactional(
        self, *, retry: Retry | int = 3, isolation_level: IsolationLevel | None = None
    ) -> Callable[[Callable[Concatenate[S, P], Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
        """A decorator: the function is called without its session, and is ``run_transaction`` each time.

        ``async def transfer(session, a, b, *, amount)`` becomes ``await transfer(a, b, amount=3)``. The plain
        function, for work that has a session already, is ``transfer.__wrapped__``. Functions, not methods.
        """
        return Attempts(self, Retry.of(retry), isolation_level).service

    def held_by(self, task: asyncio.Task[object] | None) -> Checkout | None:
        """What *task* has held of the pool for longest, or None; not known of a pool that is not ours. For shells."""
        held = [checkout for pool in self._equipped.pools if (checkout := pool.held_by(task)) is not None]
        return min(held, key=lambda checkout: checkout.since, default=None)

    def refuse_overload(self, *, reads: bool) -> None:
        """Raise ``PoolOverloaded`` if a caller who came now would not be let wait for a connection; for shells.

        Costs next to nothing while nobody waits. *reads*: it would be a connection of the readers.
        """
        equipped = self._equipped.readers if reads and self._equipped.readers is not None else self._equipped
        if equipped.pool is not None:
            equipped.pool.refuse_early()

    def new_session(
        self, holder: str, options: Mapping[str, Any] | None = None, *, place: Place | None = None
    ) -> S:
        """A session on the books of this ``Database``, for stanch's own shells; its ``Ending`` must close it."""
        guard = Guard(holder, database=self.name, place=place, on_end=self._session_ended)
        if options:
            guard.connection_options = options
        factory = self.session_factory
        # As the factory's own call, which goes through its settings one by one for whoever overrides some of them.
        session: S = factory.class_(**factory.kw, guard=guard)
        self._lifetime.enter()
        return session

    # Private --------------------------------------------------------------------------------------------

    def _opened(
        self, what: str, timeout: float | None, options: Mapping[str, Any] | None = None
    ) -> tuple[S, Ending]:
        """A session of the calling line, within *timeout* and whatever deadline is in force, and what must end it."""
        deadline = earlier(Deadline.given(timeout, f"{what}(timeout=)"), in_force())
        place = place_of_caller()
        session = self.new_session(str(place), options, place=place)
        ending = Ending(session)
        ending.keep_to(deadline)
        return session, ending

    @cached_property
    def _terms(self) -> Terms:
        settings = self.settings
        runner = Runner(database=self.name, observers=self._observers, timeout=settings.hook_timeout)
        return Terms(
            self.name,
            self.driver,
            settings,
            self._observers,
            runner,
            self._instruments,
            judges_statements=self._equipped.pool is not None,
            readers=None if self._equipped.readers is None else self._equipped.readers.engine.sync_engine,
        )

    @cached_property
    def _equipped(self) -> Equipped:
        equipped = self._blueprint.build()
        for pool in equipped.pools:
            pool.admit = self._lifetime.refuse_closed
        return equipped

    def _session_ended(self, guard: Guard, dropped: tuple[str, ...]) -> None:
        self._lifetime.leave()
        if dropped:
            self._observers.tell(WorkDropped(database=self.name, holder=guard.holder, writes=dropped))

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self._lifetime.empty()
                await self._all_returned()
        except TimeoutError:
            for pool in self._equipped.pools:
                pool.sever_held()
        self._lifetime.closed()  # from here on the pool admits nobody, so that nothing opens behind dispose()
        if "_equipped" in self.__dict__:
            for engine in self._equipped.engines:
                await engine.dispose()
        await all_sent()

    async def _all_returned(self) -> None:
        """Wait for sessions of the factory and users of the engine, which are on the pool's books alone."""
        while "_equipped" in self.__dict__ and self.stats().in_use:  # noqa: ASYNC110  # it may be another loop's
            await asyncio.sleep(_BETWEEN_LOOKS)


def _judge_session_class(session_class: type[Any]) -> type[Any]:
    if issubclass(session_class, AsyncSession):
        return session_class
    raise ConfigError(
        f"session_class: expected a subclass of sqlalchemy.ext.asyncio.AsyncSession, got {session_class!r}",
        remedies=["For SQLModel, use sqlmodel.ext.asyncio.session.AsyncSession."],
    )
