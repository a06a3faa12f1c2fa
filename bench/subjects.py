"""The adapters: the shop on each session layer, written as its own documentation tells, and nothing more.

``SUBJECTS`` names them. Each builds an app of its own on a pool of a given size, with the same handlers; what differs
is where the session comes from, and who commits. A peer is imported by its builder only: who is not asked for is not
needed.
"""

# Not `from __future__ import annotations`: FastAPI evaluates those of handlers, whose names are local here.

import asyncio
import importlib
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib import metadata
from itertools import takewhile
from typing import Any, Final, NamedTuple, cast

from fastapi import Depends, FastAPI
from sqlalchemy import Table, insert, make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from bench import shop
from bench.shop import Item, Kind, Line, Order, Reply
from stanch import Database
from stanch.fastapi import get_reader, get_session, install


class Setting(NamedTuple):
    """What a subject is built for."""

    url: str
    """With ``+asyncpg`` or ``+psycopg``; a subject that takes another form makes it of this one."""
    pool_size: int = 10
    pool_timeout: float = 30.0
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed
    """More for stanch's ``Database``; of no meaning to the others."""

    @property
    def pool(self) -> dict[str, Any]:
        """The pool, in SQLAlchemy's words."""
        return {"pool_size": self.pool_size, "max_overflow": 0, "pool_timeout": self.pool_timeout}

    def on(self, driver: str) -> str:
        """The URL for this driver; for none it is libpq's form."""
        name = f"postgresql+{driver}" if driver else "postgresql"
        return make_url(self.url).set(drivername=name).render_as_string(hide_password=False)


class Subject(NamedTuple):
    """One session layer, and the kinds of request it can serve."""

    name: str
    title: str
    build: Callable[[Setting], FastAPI]
    kinds: frozenset[Kind] = frozenset(Kind)
    package: str = ""
    """The distribution it cannot be built without, as it is called in the index; none for what stanch needs itself."""
    since: tuple[int, ...] = ()
    """The release of the *package* that brought what is used."""

    def needs(self) -> str | None:
        """What this environment lacks for it, or None."""
        if not self.package:
            return None
        try:
            found = metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        parts = (int(part) for part in takewhile(str.isdecimal, found.split(".")))
        if tuple(parts) < self.since:
            wanted = ".".join(map(str, self.since))
            return f"{self.package} is {found}; {wanted} or newer is needed"
        return None


BASELINE: Final = "article"
"""What ratios are to: the pattern as most apps have it."""
OURS: Final = ("stanch", "stanch-reader")
"""What is guarded against becoming slower."""


# Nothing -----------------------------------------------------------------------------------------------------


def bare(_setting: Setting) -> FastAPI:
    """FastAPI alone: what no session layer can save."""
    app = FastAPI()
    _add_bare(app)
    return app


# The limits --------------------------------------------------------------------------------------------------

READ: Final = "SELECT id, name FROM bench_items WHERE id = $1"
WRITE: Final = "INSERT INTO bench_items (name, price) VALUES ($1, $2)"
ORDER: Final = "INSERT INTO bench_orders (customer) VALUES ($1) RETURNING id"
LINES: Final = "INSERT INTO bench_lines (order_id, item) VALUES ($1, $2), ($1, $3)"


async def _do_not_reset(_connection: Any) -> None:
    """Leave whatever a request has set."""


def raw_asyncpg(setting: Setting, **more: Any) -> FastAPI:
    """The pool of asyncpg, as in its *Usage*: ``pool.fetchrow``, and ``pool.acquire`` for more than one statement.

    A single statement needs no transaction of its own and has none. Waiting for a connection has no limit.
    """
    driver: Any = importlib.import_module("asyncpg")
    pool: Any = None

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        nonlocal pool
        # It would open all at the start; the other pools open one when it is wanted.
        async with driver.create_pool(setting.on(""), min_size=0, max_size=setting.pool_size, **more) as pool:
            yield

    app = FastAPI(lifespan=lifespan)
    _add_bare(app)

    async def read_from(source: Any, number: int) -> Reply:
        item = await source.fetchrow(READ, number)
        return {"id": item["id"], "name": item["name"]}

    @app.get("/items/{number}")
    async def read(number: int) -> Reply:
        return await read_from(pool, number)

    @app.post("/items/{number}")
    async def write(number: int) -> Reply:
        await pool.execute(WRITE, "new", number)
        return {"id": number, "name": "new"}

    @app.get("/slow/{number}")
    async def slow(number: int) -> Reply:
        reply = await read_from(pool, number)
        await asyncio.sleep(shop.ELSEWHERE)
        return reply

    @app.get("/five/{number}")
    async def five(number: int) -> Reply:
        async with pool.acquire() as connection:
            names = [(await read_from(connection, each))["name"] for each in shop.five_of(number)]
        return {"id": number, "name": names[-1]}

    @app.post("/orders/{number}")
    async def order(number: int) -> Reply:
        customer = f"customer {number}"
        async with pool.acquire() as connection, connection.transaction():
            order_id = await connection.fetchval(ORDER, customer)
            await connection.execute(LINES, order_id, "tea", "milk")
        return {"id": order_id, "name": customer}

    return app


def core(setting: Setting) -> FastAPI:
    """SQLAlchemy without the ORM, as in its *Unified Tutorial*: ``connect()`` to read, ``begin()`` to write."""
    engine = create_async_engine(setting.url, **setting.pool)
    app = FastAPI(lifespan=_disposing(engine))
    _add_bare(app)
    items, orders, lines = (cast("Table", model.__table__) for model in (Item, Order, Line))

    async def read_from(connection: Any, number: int) -> Reply:
        item = (await connection.execute(select(items.c.id, items.c.name).where(items.c.id == number))).one()
        return {"id": item.id, "name": item.name}

    @app.get("/items/{number}")
    async def read(number: int) -> Reply:
        async with engine.connect() as connection:
            return await read_from(connection, number)

    @app.post("/items/{number}")
    async def write(number: int) -> Reply:
        async with engine.begin() as connection:
            await connection.execute(insert(items).values(name="new", price=number))
        return {"id": number, "name": "new"}

    @app.get("/slow/{number}")
    async def slow(number: int) -> Reply:
        async with engine.connect() as connection:
            reply = await read_from(connection, number)
        await asyncio.sleep(shop.ELSEWHERE)
        return reply

    @app.get("/five/{number}")
    async def five(number: int) -> Reply:
        async with engine.connect() as connection:
            names = [(await read_from(connection, each))["name"] for each in shop.five_of(number)]
        return {"id": number, "name": names[-1]}

    @app.post("/orders/{number}")
    async def order(number: int) -> Reply:
        customer = f"customer {number}"
        async with engine.begin() as connection:
            stored = await connection.execute(insert(orders).values(customer=customer).returning(orders.c.id))
            order_id = stored.scalar_one()
            await connection.execute(
                insert(lines).values(
                    [{"order_id": order_id, "item": "tea"}, {"order_id": order_id, "item": "milk"}]
                )
            )
        return {"id": order_id, "name": customer}

    return app


def orm_floor(setting: Setting) -> FastAPI:
    """What the ORM costs without any session layer: sessions that are open from the start, and are never given back.

    Each has a connection of its own, on which every statement stands for itself (SQLAlchemy's AUTOCOMMIT). No app
    can be written so: nothing is atomic, and one error spoils a session for good. Hence it serves single statements.
    """
    engine = create_async_engine(setting.url, isolation_level="AUTOCOMMIT", **setting.pool)
    free: asyncio.LifoQueue[AsyncSession] = asyncio.LifoQueue()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        sessions = [AsyncSession(engine, expire_on_commit=False) for _ in range(setting.pool_size)]
        for session in sessions:
            await session.connection()
            free.put_nowait(session)
        yield
        for session in sessions:
            await session.close()
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    _add_bare(app)

    @app.get("/items/{number}")
    async def read(number: int) -> Reply:
        session = await free.get()
        try:
            return await shop.read(session, number)
        finally:
            free.put_nowait(session)

    @app.post("/items/{number}")
    async def write(number: int) -> Reply:
        session = await free.get()
        try:
            return await shop.write(session, number)
        finally:
            free.put_nowait(session)

    @app.get("/five/{number}")
    async def five(number: int) -> Reply:
        session = await free.get()
        try:
            return await shop.five(session, number)
        finally:
            free.put_nowait(session)

    return app


# By hand -----------------------------------------------------------------------------------------------------


def article(setting: Setting, **more: Any) -> FastAPI:
    """A dependency that yields a session and closes it; the handler commits."""
    engine = create_async_engine(setting.url, **setting.pool, **more)
    factory = async_sessionmaker(engine, expire_on_commit=False)

    async def get_db() -> AsyncGenerator[AsyncSession]:
        session = factory()
        try:
            yield session
        except Exception:
            await session.rollback()
            raise
        finally:
            await session.close()

    app = FastAPI(lifespan=_disposing(engine))
    _add_routes(app, Depends(get_db), commits=True)
    return app


def commit_after_yield(setting: Setting) -> FastAPI:
    """The article's dependency, but that it commits itself; before the reply, by FastAPI's ``scope="function"``.

    After FastAPI's *Dependencies with yield*, early exit and scope.
    """
    engine = create_async_engine(setting.url, **setting.pool)
    factory = async_sessionmaker(engine, expire_on_commit=False)

    async def get_db() -> AsyncGenerator[AsyncSession]:
        session = factory()
        try:
            yield session
            await session.commit()
        except Exception:
            await session.rollback()
            raise
        finally:
            await session.close()

    app = FastAPI(lifespan=_disposing(engine))
    _add_routes(app, Depends(get_db, scope="function"), commits=False)
    return app


# Peers -------------------------------------------------------------------------------------------------------


def advanced_alchemy(setting: Setting) -> FastAPI:
    """After its *FastAPI Integration*: ``commit_mode="autocommit"`` and ``alchemy.provide_session()``."""
    peer: Any = importlib.import_module("advanced_alchemy.extensions.fastapi")
    config = peer.SQLAlchemyAsyncConfig(
        connection_string=setting.url,
        engine_config=peer.EngineConfig(**setting.pool),
        session_config=peer.AsyncSessionConfig(expire_on_commit=False),
        commit_mode="autocommit",
    )
    app = FastAPI()
    alchemy = peer.AdvancedAlchemy(config=config, app=app)
    _add_routes(app, Depends(alchemy.provide_session()), commits=False)
    return app


def context_async_sqlalchemy(setting: Setting, *, pure: bool = False) -> FastAPI:
    """After its *Getting started*: its middleware for FastAPI or, *pure*, for ASGI; and ``db_session(connection)``.

    The one commits before the reply, the other after it. The engine is as everybody's here: without the
    ``pool_pre_ping`` that its example turns on.
    """
    peer: Any = importlib.import_module("context_async_sqlalchemy")

    def create_engine(_host: str) -> AsyncEngine:
        return create_async_engine(setting.url, **setting.pool)

    def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, expire_on_commit=False)

    connection = peer.DBConnect(
        engine_creator=create_engine, session_maker_creator=create_session_maker, host="127.0.0.1"
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        await connection.close()

    app = FastAPI(lifespan=lifespan)
    if pure:
        app.add_middleware(peer.ASGIHTTPDBSessionMiddleware)
    else:
        fastapi_utils = importlib.import_module("context_async_sqlalchemy.fastapi_utils")
        fastapi_utils.add_fastapi_http_db_session_middleware(app)
    _add_routes_that_ask(app, lambda: peer.db_session(connection))
    return app


def fastapi_async_sqlalchemy(setting: Setting) -> FastAPI:
    """After its README: ``SQLAlchemyMiddleware`` with ``commit_on_exit``, and ``db.session``.

    Its engine is made by us, for it does not close its own. Its session is SQLAlchemy's: where SQLModel is installed
    it would take that one's.
    """
    with _without("sqlmodel.ext.asyncio.session"):
        peer: Any = importlib.import_module("fastapi_async_sqlalchemy")
    Middleware, db = peer.create_middleware_and_session_proxy()  # noqa: N806  # a class
    engine = create_async_engine(setting.url, **setting.pool)

    async def session() -> AsyncSession:
        found: AsyncSession = db.session
        return found

    app = FastAPI(lifespan=_disposing(engine))
    app.add_middleware(Middleware, custom_engine=engine, commit_on_exit=True)
    _add_routes_that_ask(app, session)
    return app


def fastapi_toolsets(setting: Setting) -> FastAPI:
    """After its page *DB*: a ``Database``, installed so that it commits before the response, and ``Depends(db)``."""
    peer: Any = importlib.import_module("fastapi_toolsets.db")
    app = FastAPI()
    db = peer.Database(setting.url, **setting.pool)
    db.install(app)
    _add_routes(app, Depends(db), commits=False)
    return app


def sqlmodel(setting: Setting) -> FastAPI:
    """After the full-stack-fastapi-template: ``def`` endpoints in threads, on psycopg; see ``bench.template``."""
    template: Any = importlib.import_module("bench.template")
    app = FastAPI()
    _add_bare(app)
    template.add_routes(app, setting.on("psycopg"), **setting.pool)
    return app


# stanch ------------------------------------------------------------------------------------------------------


def stanch(setting: Setting) -> FastAPI:
    """``SessionDep`` everywhere; the reply commits."""
    app = FastAPI()
    install(app, Database(setting.url, **setting.pool, **setting.options))
    _add_routes(app, Depends(get_session), commits=False)
    return app


def stanch_reader(setting: Setting) -> FastAPI:
    """``ReaderDep`` where nothing is written."""
    app = FastAPI()
    install(app, Database(setting.url, **setting.pool, **setting.options))
    _add_routes(app, Depends(get_session), reader=Depends(get_reader), commits=False)
    return app


WITHOUT_SESSION: Final = frozenset(Kind) - {Kind.UNUSED}
STATEMENTS: Final = frozenset({Kind.BARE, Kind.READ, Kind.WRITE, Kind.FIVE})

SUBJECTS: Final = {
    subject.name: subject
    for subject in (
        Subject("bare", "FastAPI alone", bare, frozenset({Kind.BARE})),
        Subject(
            "asyncpg",
            "raw asyncpg, no reset query",
            partial(raw_asyncpg, reset=_do_not_reset),
            WITHOUT_SESSION,
            package="asyncpg",
            since=(0, 30),
        ),
        Subject(
            "asyncpg-reset", "raw asyncpg, its reset query", raw_asyncpg, WITHOUT_SESSION, package="asyncpg"
        ),
        Subject("core", "SQLAlchemy Core", core, WITHOUT_SESSION),
        Subject("orm-floor", "the ORM's own floor, sessions never closed", orm_floor, STATEMENTS),
        Subject("article", "the article's pattern", article),
        Subject(
            "article-ping",
            "the article's pattern, pool_pre_ping",
            partial(article, pool_pre_ping=True),
        ),
        Subject(
            "commit-after-yield",
            'commit after yield, scope="function"',
            commit_after_yield,
            package="fastapi",
            since=(0, 121),
        ),
        Subject("advanced-alchemy", "advanced-alchemy", advanced_alchemy, package="advanced-alchemy"),
        Subject(
            "context-async",
            "context-async-sqlalchemy",
            context_async_sqlalchemy,
            package="context-async-sqlalchemy",
        ),
        Subject(
            "context-async-asgi",
            "context-async-sqlalchemy, pure ASGI",
            partial(context_async_sqlalchemy, pure=True),
            package="context-async-sqlalchemy",
        ),
        Subject(
            "fastapi-async",
            "fastapi-async-sqlalchemy",
            fastapi_async_sqlalchemy,
            package="fastapi-async-sqlalchemy",
        ),
        Subject("fastapi-toolsets", "fastapi-toolsets", fastapi_toolsets, package="fastapi-toolsets"),
        Subject("sqlmodel", "SQLModel's template (sync, psycopg)", sqlmodel, package="sqlmodel"),
        Subject("stanch", "stanch SessionDep", stanch),
        Subject("stanch-reader", "stanch ReaderDep", stanch_reader),
    )
}


# The handlers ------------------------------------------------------------------------------------------------


def _add_bare(app: FastAPI) -> None:
    @app.get("/bare/{number}")
    async def bare(number: int) -> Reply:
        return {"id": number, "name": "nothing"}


def _add_routes(app: FastAPI, writer: Any, *, reader: Any = None, commits: bool) -> None:
    """The handlers by dependency; with *commits* those that write commit by hand."""
    reader = writer if reader is None else reader
    _add_bare(app)

    @app.get("/unused/{number}")
    async def unused(number: int, _session: AsyncSession = reader) -> Reply:
        return {"id": number, "name": "nothing"}

    @app.get("/items/{number}")
    async def read(number: int, session: AsyncSession = reader) -> Reply:
        return await shop.read(session, number)

    @app.post("/items/{number}")
    async def write(number: int, session: AsyncSession = writer) -> Reply:
        reply = await shop.write(session, number)
        if commits:
            await session.commit()
        return reply

    @app.get("/slow/{number}")
    async def slow(number: int, session: AsyncSession = reader) -> Reply:
        return await shop.slow(session, number)

    @app.get("/five/{number}")
    async def five(number: int, session: AsyncSession = reader) -> Reply:
        return await shop.five(session, number)

    @app.post("/orders/{number}")
    async def order(number: int, session: AsyncSession = writer) -> Reply:
        reply = await shop.order(session, number)
        if commits:
            await session.commit()
        return reply


def _add_routes_that_ask(app: FastAPI, session: Callable[[], Awaitable[AsyncSession]]) -> None:
    """The handlers of those who keep the session in the context; their middleware commits."""
    _add_bare(app)

    @app.get("/unused/{number}")
    async def unused(number: int) -> Reply:
        await session()
        return {"id": number, "name": "nothing"}

    @app.get("/items/{number}")
    async def read(number: int) -> Reply:
        return await shop.read(await session(), number)

    @app.post("/items/{number}")
    async def write(number: int) -> Reply:
        return await shop.write(await session(), number)

    @app.get("/slow/{number}")
    async def slow(number: int) -> Reply:
        return await shop.slow(await session(), number)

    @app.get("/five/{number}")
    async def five(number: int) -> Reply:
        return await shop.five(await session(), number)

    @app.post("/orders/{number}")
    async def order(number: int) -> Reply:
        return await shop.order(await session(), number)


def _disposing(engine: AsyncEngine) -> Any:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        await engine.dispose()

    return lifespan


@contextmanager
def _without(module: str) -> Generator[None]:
    """Inside, *module* cannot be imported."""
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]  # what Python's import takes for "there is none"
    try:
        yield
    finally:
        del sys.modules[module]
        if before is not None:
            sys.modules[module] = before
