"""Law 11: secrets stay in. Unique markers go in everywhere; then everything anybody can see is searched for them.

Handlers are made in the test, so no ``from __future__ import annotations`` here: FastAPI reads the annotations.
"""

import asyncio
import json
import logging
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.background import BackgroundTask

from stanch import Database
from stanch.fastapi import ReaderDep, SessionDep, install
from stanch.settings import Settings
from tests.faults.subject import Entry
from tests.faults.wire import Reply, Wire
from tests.support.judge import FreshDatabase
from tests.support.uvicorn_server import serve

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PASSWORD = "canary-password-7d1f"
PARAMETER = "canary-url-parameter-92ab"
BOUND = "canary-bound-c3e8"
CONTENT = "canary-row-content-5f60"
DETAIL = "canary-detail-e417"
SETTING = "canary-setting-0b9d"
MARKERS = (PASSWORD, PARAMETER, BOUND, CONTENT, DETAIL, SETTING)

TABLES = f"""
    CREATE TABLE guarded (
        key text PRIMARY KEY, note text NOT NULL, short varchar(3), amount int CHECK (amount > 0),
        EXCLUDE USING btree (note WITH =)
    );
    CREATE TABLE late (
        key text PRIMARY KEY REFERENCES guarded DEFERRABLE INITIALLY DEFERRED
    );
    CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN RAISE EXCEPTION ''this will not do: %'', NEW.key; END';
    CREATE TABLE complaining (key text PRIMARY KEY);
    CREATE TRIGGER complain BEFORE INSERT ON complaining FOR EACH ROW EXECUTE FUNCTION complain();
    INSERT INTO guarded VALUES ('{DETAIL}', '{CONTENT}');
    INSERT INTO entries VALUES ('{DETAIL}', '{CONTENT}');
"""


class Everything(logging.Handler):
    """Every log record there is, formatted with its traceback, and every other text that was found."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
        self.texts: list[tuple[str, str]] = []
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append((f"log {record.name}", self.format(record)))

    def add(self, where: str, *things: object) -> None:
        """What a person or a debugger would see of each of *things*."""
        for thing in things:
            self.texts += [(where, repr(thing)), (where, str(thing))]

    def add_error(self, where: str, error: BaseException) -> None:
        """*error* and its whole chain, as any logger would print it."""
        self.errors.append(error)
        self.add(where, error)
        self.texts.append((where, "".join(traceback.format_exception(error))))

    def add_reply(self, where: str, reply: Reply) -> None:
        self.texts.append((where, f"{reply.status} {reply.headers} {reply.body.decode(errors='replace')}"))

    @property
    def lines(self) -> int:
        return sum(len(text.splitlines()) for _, text in self.texts)

    def hits(self) -> list[str]:
        return [
            f"{marker} in {where}: …{found[max(0, found.index(marker) - 150) : found.index(marker) + 60]}…"
            for where, found in self.texts
            for marker in MARKERS
            if marker in found
        ]


@pytest.fixture
def everything() -> Any:
    handler = Everything()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.setLevel(level)
    root.removeHandler(handler)


Handler = Callable[[AsyncSession], Awaitable[Any]]

STATEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "unique": ("INSERT INTO guarded (key, note) VALUES (:key, :note)", {"key": DETAIL, "note": BOUND}),
    "exclusion": ("INSERT INTO guarded (key, note) VALUES (:key, :note)", {"key": BOUND, "note": CONTENT}),
    "not null": ("INSERT INTO guarded (key, note) VALUES (:key, NULL)", {"key": BOUND}),
    "check": ("INSERT INTO guarded (key, note, amount) VALUES (:key, :key, -1)", {"key": BOUND}),
    "too long": (
        "INSERT INTO guarded (key, note, short) VALUES (:key, 'x', CAST(:key AS text))",
        {"key": BOUND},
    ),
    "foreign key": ("INSERT INTO late VALUES (:key); SET CONSTRAINTS ALL IMMEDIATE", {"key": BOUND}),
    "not a number": ("SELECT CAST(CAST(:key AS text) AS int)", {"key": BOUND}),
    "not a number either": ("SELECT CAST(:key AS int)", {"key": BOUND}),
    "not a number in a row": ("SELECT CAST(note AS int) FROM guarded", {}),
    "not a date": ("SELECT CAST(CAST(:key AS text) AS date)", {"key": BOUND}),
    "not json": ("SELECT CAST(CAST(:key AS text) AS jsonb)", {"key": BOUND}),
    "division": ("SELECT 1 / 0 FROM guarded WHERE note <> :key", {"key": BOUND}),
    "raised by a trigger": ("INSERT INTO complaining VALUES (:key)", {"key": BOUND}),
    "no such table": ("SELECT * FROM nowhere WHERE key = :key", {"key": BOUND}),
    "no such column": ("SELECT nothing FROM guarded WHERE key = :key", {"key": BOUND}),
    "no such cast": ("SELECT * FROM guarded WHERE key = CAST(:key AS nothing)", {"key": BOUND}),
    "statement timeout": (
        "SET LOCAL statement_timeout = 20; SELECT pg_sleep(5) FROM guarded WHERE note <> :key",
        {"key": BOUND},
    ),
    "terminated": (
        "SELECT pg_terminate_backend(pg_backend_pid()) FROM guarded WHERE note <> :key",
        {"key": BOUND},
    ),
}


async def _by_orm(session: AsyncSession) -> None:
    session.add(Entry(key=DETAIL, note=BOUND))
    await session.flush()


async def _many(session: AsyncSession) -> None:
    await session.execute(insert(Entry), [{"key": BOUND, "note": BOUND}, {"key": DETAIL, "note": BOUND}])


async def _at_commit(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO late VALUES (:key)"), {"key": BOUND})


async def _own_commit(session: AsyncSession) -> None:
    await _at_commit(session)
    await session.commit()


async def _swallowed(session: AsyncSession) -> None:
    with suppress(Exception):
        await _many(session)


async def _own_error(session: AsyncSession) -> None:
    row = (await session.scalars(select(Entry).where(Entry.key == DETAIL))).one()
    assert row.note == CONTENT
    raise LookupError("an error of the app's own, which knows how to keep a secret")


async def _wrapped(session: AsyncSession) -> None:
    try:
        await _by_orm(session)
    except Exception as error:
        raise RuntimeError("wrapped") from error


async def _in_a_task_group(session: AsyncSession) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_by_orm(session))


async def _behind_the_back(session: AsyncSession) -> None:
    await _read(session)
    await (await session.connection()).commit()


async def _two_at_once(session: AsyncSession) -> None:
    slow = text("SELECT pg_sleep(0.2) FROM guarded WHERE note <> :key")
    await asyncio.gather(*(session.execute(slow, {"key": BOUND}) for _ in range(2)))


async def _closed(session: AsyncSession) -> None:
    await _read(session)
    await session.close()
    await _read(session)


async def _too_many_rows(session: AsyncSession) -> None:
    (await session.scalars(text("SELECT note FROM guarded, generate_series(1, 2)"))).one()


async def _read(session: AsyncSession) -> None:
    assert (await session.scalars(select(Entry.note).where(Entry.key == DETAIL))).one() == CONTENT


SCENES: dict[str, Handler] = {
    handler.__name__: handler
    for handler in (
        *(_by_orm, _many, _at_commit, _own_commit, _swallowed, _own_error, _wrapped, _in_a_task_group),
        *(_behind_the_back, _two_at_once, _closed, _too_many_rows, _read),
    )
}


def _app(db: Database[Any], everything: Everything, *, debug: bool) -> FastAPI:
    app = FastAPI(debug=debug)
    install(app, db)

    @app.post("/statement")
    async def statement(session: SessionDep, request: Request) -> None:
        sql, parameters = STATEMENTS[(await request.json())["name"]]
        try:
            for part in sql.split("; "):
                await session.execute(text(part), parameters if ":" in part else {})
        except Exception as error:
            everything.add_error("caught in the handler", error)
            raise

    @app.post("/scene")
    async def scene(session: SessionDep, request: Request) -> None:
        try:
            await SCENES[(await request.json())["name"]](session)
        except Exception as error:
            everything.add_error("caught in the handler", error)
            raise
        finally:
            everything.add("session", session, session.sync_session)

    @app.post("/reader")
    async def reader(session: ReaderDep) -> None:
        session.add(Entry(key=BOUND, note=BOUND))
        await session.flush()

    @app.post("/stream")
    async def stream(session: SessionDep) -> Response:
        async def body() -> AsyncIterator[str]:
            yield "begun"
            await _by_orm(session)

        return StreamingResponse(body())

    @app.post("/background")
    async def background(session: SessionDep) -> Response:
        return Response(background=BackgroundTask(_by_orm, session))

    @app.post("/hold")
    async def hold(session: SessionDep) -> None:
        await session.execute(text("SELECT pg_sleep(0.6) FROM guarded WHERE note <> :key"), {"key": BOUND})

    return app


@asynccontextmanager
async def _role(judged: FreshDatabase) -> AsyncGenerator[str]:
    """A role of the server whose password is a marker."""
    role = f"canary_{judged.name}"
    await judged.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}' SUPERUSER")
    try:
        yield role
    finally:
        await judged.execute(f"ALTER ROLE {role} NOLOGIN")


def _url(
    judged: FreshDatabase, driver: str, role: str, password: str = PASSWORD, port: int | None = None
) -> str:
    parts = urlsplit(judged.url(driver))
    return f"{parts.scheme}://{role}:{password}@{parts.hostname}:{port or parts.port}{parts.path}"


def _add_database(everything: Everything, db: Database[Any]) -> None:
    pool = db.engine.sync_engine.pool
    everything.add(
        "database", db, db.settings, db.stats(), db.engine, db.engine.sync_engine, pool, pool.status()
    )
    everything.add("database", db.engine.url, db.session_factory, db.driver, vars(db))


async def _provoke(everything: Everything, port: int, statuses: Counter[int]) -> None:
    async def post(path: str, name: str = "") -> None:
        async with Wire(port) as wire:
            reply = await wire.request("POST", path, json.dumps({"name": name}).encode())
        statuses[reply.status] += 1
        everything.add_reply(f"reply to {path} {name}", reply)

    for name in STATEMENTS:
        await post("/statement", name)
    for name in SCENES:
        await post("/scene", name)
    for path in ("/reader", "/stream", "/background"):
        await post(path)
    await asyncio.gather(
        *(post("/hold") for _ in range(6))
    )  # more than there are connections: the pool is full


async def _refused(everything: Everything, url: str, **settings: Any) -> None:
    """A database that cannot be reached, through every door."""
    db = Database(url, connect_timeout=0.5, **settings)
    for door in (db.open, db.transaction().__aenter__):
        try:
            session = await door()
            assert isinstance(session, AsyncSession)
            await session.execute(text("SELECT 1"))
        except Exception as error:
            everything.add_error("connecting", error)
        else:
            pytest.fail("connected")
    _add_database(everything, db)
    await db.close()


async def _run(driver: str, judged: FreshDatabase, everything: Everything, **settings: Any) -> list[str]:
    """Provoke everything in a running app, and search everything that was said; the hits."""
    await judged.execute(TABLES)
    statuses: Counter[int] = Counter()
    debug = bool(settings.pop("debug", False))
    async with _role(judged) as role:
        url = _url(judged, driver, role)
        db = Database(url, pool_size=2, max_overflow=0, pool_timeout=0.2, **settings)
        app = _app(db, everything, debug=debug)
        async with serve(app, log_level="debug", access_log=True) as base:
            port = urlsplit(base).port
            assert port is not None
            await _provoke(everything, port, statuses)
            _add_database(everything, db)
    hits = everything.hits()
    print(f"{driver} debug={debug} {settings}: {everything.lines} lines searched, {len(hits)} hits")
    print(f"    {len(everything.texts)} texts, {len(everything.errors)} errors, replies {dict(statuses)}")
    for where in sorted({hit.split("…")[0] for hit in hits}):
        print(f"    hit: {where}")
    assert everything.lines > 1000
    assert {200, 409, 422, 500, 503, 504} <= set(statuses)
    assert {type(error).__name__ for error in everything.errors} >= {"IntegrityError", "SessionOverlap"}
    return hits


@pytest.mark.parametrize(("debug", "echo"), [(False, False), (True, True)], ids=["", "debug-echo"])
async def test_no_secret_leaves_a_running_app(
    driver: str, debug: bool, echo: bool, judged: FreshDatabase, everything: Everything
) -> None:
    """Every failure that can be provoked, with the root logger at DEBUG, debug pages and SQLAlchemy's echo on."""
    assert await _run(driver, judged, everything, debug=debug, echo=echo) == []


async def test_rows_are_logged_only_by_sqlalchemy_where_it_was_asked_to(
    judged: FreshDatabase, everything: Everything
) -> None:
    """A limit: ``echo="debug"`` is SQLAlchemy's word for "log every row"."""
    hits = await _run("asyncpg", judged, everything, echo="debug")
    assert hits != []
    assert [hit for hit in hits if "DEBUG sqlalchemy.engine.Engine Row (" not in hit] == []


async def test_secrets_leave_where_nobody_hides_them(judged: FreshDatabase, everything: Everything) -> None:
    """The runs above have teeth: with ``hide_parameters=False`` the search finds what SQLAlchemy and the driver say."""
    hits = await _run("asyncpg", judged, everything, debug=True, echo=True, hide_parameters=False)
    assert {hit.split(" in ")[0] for hit in hits} >= {BOUND, DETAIL, CONTENT}
    assert {hit.split(" in ")[1].split(" ")[0] for hit in hits} >= {"log", "caught", "reply"}


async def test_no_secret_of_a_url_leaves_a_failed_connection(
    driver: str, judged: FreshDatabase, everything: Everything
) -> None:
    """Wrong password, no such database, connection refused; the password in the URL or among its parameters."""
    async with _role(judged) as role:
        wrong = _url(judged, driver, role, password=SETTING)
        bare = urlsplit(judged.url(driver))
        in_query = f"{bare.scheme}://{role}@{bare.hostname}:{bare.port}{bare.path}?password={PARAMETER}"
        for url in (
            wrong,
            in_query,
            f"{_url(judged, driver, role)}_not_there",
            _url(judged, driver, role, port=1),
        ):
            await _refused(everything, url, echo=True)
            engine = create_async_engine(url.partition("?")[0], echo=True)
            _add_database(everything, Database(engine))
            await engine.dispose()
        right = f"{bare.scheme}://{role}@{bare.hostname}:{bare.port}{bare.path}?password={PASSWORD}"
        async with Database(right) as db:
            _add_database(everything, db)
    hits = everything.hits()
    print(f"{driver}: {everything.lines} lines, {len(everything.errors)} errors, {len(hits)} hits")
    assert len(everything.errors) == 8
    assert everything.lines > 200
    assert hits == []


BAD_URLS = [
    f"postgresql+asyncpg://app:{PASSWORD}@host:port/shop",
    f"postgresql+asyncpg://app:{PASSWORD}@{SETTING}@host/shop",
    f"postgresql+asyncpg://app:pass/{PASSWORD}@host/shop",
    f"postgresql+asyncpg://app:{PASSWORD}#tail@host/shop",
    f"postgresql+asyncpg://app:{PASSWORD}@host/shop?nonsense={PARAMETER}",
    f"postgresql+asyncpg://app@host/shop?password={PARAMETER}&sslmode=perhaps",
    f"postgresql+psycopg://app@host/shop?password={PARAMETER}&sslpassword={PARAMETER}&nonsense=1",
    f"postgresql+psycopg2://app:{PASSWORD}@host/shop",
    f"postgresql+nothing://app:{PASSWORD}@host/shop",
    f"mysql+aiomysql://app:{PASSWORD}@host/shop",
    f"{PASSWORD}",
    f"postgresql+asyncpg:/app:{PASSWORD}@host/shop",
    f"postgresql+asyncpg://app:{PASSWORD}@host:99999999/shop",
    f"postgresql+asyncpg://app:{PASSWORD}@[::1/shop",
    f"postgresql+asyncpg://app:{PASSWORD}@host/shop?connect_timeout={PARAMETER}",
    f"postgresql+asyncpg://app:%{PASSWORD}@host/shop?sslmode={PARAMETER}",
]

BAD_SETTINGS: list[dict[str, Any]] = [
    {"pool_size": -1},
    {"pool_size": SETTING},
    {"pool_timeout": SETTING},
    {"echo": SETTING},
    {"isolation_level": SETTING},
    {"pooler": SETTING},
    {"poolclass": SETTING},
    {"application_name": f"{SETTING}\n"},
    {"statement_timeout": SETTING},
    {"autocommit": True},
    {"connect_args": {"password": SETTING, "nonsense": SETTING}},
    {"connect_args": SETTING},
    {"nonsense": SETTING},
]


def test_no_secret_leaves_a_refused_setting(everything: Everything) -> None:
    """Whatever is wrong with a URL or a setting, the complaint does not repeat it."""
    good = f"postgresql+asyncpg://app:{PASSWORD}@host/shop"
    accepted = 0
    nothing: dict[str, Any] = {}
    cases = [*((url, nothing) for url in BAD_URLS), *((good, settings) for settings in BAD_SETTINGS)]
    for url, settings in cases:
        for build in (_from_arguments, _from_env):
            try:
                db = build(url, settings)
                db.engine  # noqa: B018  # built on first use, and that may fail too
            except Exception as error:
                everything.add_error("configuring", error)
            else:
                accepted += 1
                _add_database(everything, db)
    for settings in BAD_SETTINGS:
        with suppress(Exception):
            everything.add("settings", Settings.judge(**settings))
    hits = everything.hits()
    print(f"{everything.lines} lines, {len(everything.errors)} errors, {accepted} accepted, {len(hits)} hits")
    assert len(everything.errors) >= len(BAD_URLS) + len(BAD_SETTINGS)
    assert hits == []


def _from_arguments(url: str, settings: dict[str, Any]) -> Database[Any]:
    return Database(url, **settings)


def _from_env(url: str, settings: dict[str, Any]) -> Database[Any]:
    return Database.from_env(
        {"DATABASE_URL": url, **{f"STANCH_{name.upper()}": str(value) for name, value in settings.items()}}
    )
