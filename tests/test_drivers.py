"""The same settings mean the same on every driver; a connection is severed, judged and committed honestly."""

from __future__ import annotations

import asyncio
import gc
import inspect
import socket
import sqlite3
import ssl
import traceback
from contextlib import asynccontextmanager, closing
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, urlsplit

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from stanch.drivers import READ_ONLY_KEY, driver_of, driver_of_engine
from stanch.drivers.base import attempts, reach
from stanch.drivers.options import ASYNCPG, PSYCOPG
from stanch.errors import CommitRefused, ConfigError, DatabaseUnavailable
from stanch.settings import Settings, judge_url
from tests.support.judge import until
from tests.support.optional import needs
from tests.support.pgbouncer import PgBouncer
from tests.support.suspensions import cancelled_at, suspensions

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
    from pathlib import Path

    from stanch.drivers import Driver, Plan
    from stanch.embedded import EmbeddedPostgres
    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

NOBODY_LISTENS = 9
"""The discard port: refused at once on a machine without that service."""


@asynccontextmanager
async def engine_for(url: str, **given: Any) -> AsyncGenerator[tuple[AsyncEngine, Driver]]:
    """An engine as a ``Database`` would make it, but with SQLAlchemy's own pool: the drivers alone are on trial."""
    judged = judge_url(url)
    driver = driver_of(judged)
    plan = driver.plan(judged, Settings.judge(**given))
    engine = create_async_engine(plan.url, connect_args=plan.connect_args, **plan.engine_options)
    driver.prepare_engine(engine, plan.settings)
    try:
        yield engine, driver
    finally:
        await engine.dispose()


@asynccontextmanager
async def opened(url: str, **given: Any) -> AsyncGenerator[tuple[Any, Driver]]:
    """One connection of the driver's own, opened as the plan says."""
    async with engine_for(url, **given) as (engine, driver), engine.connect() as connection:
        inner = (await connection.get_raw_connection()).driver_connection
        try:
            yield inner, driver
        finally:
            await connection.invalidate()


def with_query(url: str, query: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{query}"


async def show(engine: AsyncEngine, *names: str) -> list[str]:
    async with engine.connect() as connection:
        return [str(await connection.scalar(text(f"SHOW {name}"))) for name in names]


# One meaning ----------------------------------------------------------------------------------------------


async def test_settings_mean_the_same_on_both_drivers(fresh_database: FreshDatabase, driver: str) -> None:
    async with engine_for(
        fresh_database.url(driver),
        application_name="shop",
        statement_timeout=2.5,
        lock_timeout=1,
        idle_in_transaction_session_timeout=None,
        isolation_level="SERIALIZABLE",
    ) as (engine, _):
        assert await show(
            engine,
            "statement_timeout",
            "lock_timeout",
            "idle_in_transaction_session_timeout",
            "transaction_isolation",
        ) == ["2500ms", "1s", "0", "serializable"]
        assert [row["application_name"] for row in await fresh_database.activity()] == ["shop"]


async def test_options_of_the_url_mean_the_same_on_both_drivers(
    fresh_database: FreshDatabase, driver: str
) -> None:
    query = (
        "application_name=url&sslmode=prefer&connect_timeout=3&target_session_attrs=read-write"
        "&options=-c%20search_path%3D%22my%5C%20app%22%2Cpublic%20--work-mem%3D7MB%20-cstatement_timeout%3D1234"
    )
    async with engine_for(with_query(fresh_database.url(driver), query)) as (engine, _):
        names = ("application_name", "search_path", "work_mem", "statement_timeout")
        assert await show(engine, *names) == ["url", '"my app",public', "7MB", "1234ms"]


async def test_connect_args_mean_the_same_on_both_drivers(fresh_database: FreshDatabase, driver: str) -> None:
    connect_args = {
        "server_settings": {"app.name": "a b\\c"},
        "sslmode": "disable",
        "application_name": "args",
    }
    async with engine_for(fresh_database.url(driver), connect_args=connect_args) as (engine, _):
        assert await show(engine, "app.name", "application_name") == ["a b\\c", "args"]


async def test_what_was_chosen_in_the_url_beats_a_default(fresh_database: FreshDatabase, driver: str) -> None:
    url = with_query(fresh_database.url(driver), "options=-c%20lock_timeout%3D77")
    async with engine_for(url) as (engine, _):
        assert await show(engine, "lock_timeout", "statement_timeout") == ["77ms", "30s"]


async def test_encryption_that_the_server_lacks_is_not_given_up_silently(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with engine_for(with_query(fresh_database.url(driver), "sslmode=require")) as (engine, _):
        with pytest.raises(DatabaseUnavailable):
            await show(engine, "ssl")


@pytest.mark.parametrize(
    "query", ["sslmode=verify-full&sslrootcert=%2Fno%2Fsuch%2Ffile", "sslrootcert=system&sslmode=verify-full"]
)
async def test_tls_files_reach_the_driver(fresh_database: FreshDatabase, driver: str, query: str) -> None:
    """A root certificate that is not there, or a server without TLS: refused by both, and by the same error."""
    async with engine_for(with_query(fresh_database.url(driver), query)) as (engine, _):
        with pytest.raises(DatabaseUnavailable):
            await show(engine, "ssl")


async def test_a_session_attribute_that_the_server_lacks_is_no_connection(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with engine_for(with_query(fresh_database.url(driver), "target_session_attrs=standby")) as (
        engine,
        _,
    ):
        with pytest.raises(DatabaseUnavailable):
            await show(engine, "ssl")


async def test_a_url_without_a_driver_is_asyncpg() -> None:
    assert driver_of(judge_url("postgres://localhost/shop")).name == "asyncpg"
    assert driver_of(judge_url("sqlite://")).name == "aiosqlite"


async def test_without_asyncpg_it_is_psycopg(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object:
        return None if name == "asyncpg" else object()

    monkeypatch.setattr("stanch.drivers.find_spec", find_spec)
    assert driver_of(judge_url("postgresql://localhost/shop")).name == "psycopg"


@pytest.mark.parametrize("name", ["asyncpg", "psycopg", "aiosqlite"])
async def test_the_driver_of_an_engine_is_found(name: str) -> None:
    backend = "sqlite" if name == "aiosqlite" else "postgresql"
    assert driver_of_engine(create_async_engine(f"{backend}+{name}://")).name == name


async def test_the_engines_url_holds_no_option_that_could_be_a_secret() -> None:
    url = judge_url("postgresql+asyncpg://app:hunter2@h/d?sslpassword=hunter2&application_name=x")
    plan = driver_of(url).plan(url, Settings())
    assert plan.url.query == {}
    assert "hunter2" not in repr(plan) + repr(plan.url) + repr(create_async_engine(plan.url))


async def test_bound_values_stay_out_of_errors_unless_asked_for() -> None:
    url = judge_url("postgresql+asyncpg://h/d")
    assert driver_of(url).plan(url, Settings()).engine_options["hide_parameters"] is True
    wished = Settings.judge(hide_parameters=False)
    assert driver_of(url).plan(url, wished).engine_options["hide_parameters"] is False


def plan_of(url: str, **given: Any) -> Plan:
    judged = judge_url(url)
    return driver_of(judged).plan(judged, Settings.judge(**given))


async def test_ssl_true_verifies_against_the_authorities_of_the_system() -> None:
    assert plan_of("postgresql+asyncpg://h/d", connect_args={"ssl": True}).connect_args["ssl"] is True
    psycopg = plan_of("postgresql+psycopg://h/d", connect_args={"ssl": True}).connect_args
    assert (psycopg["sslmode"], psycopg["sslrootcert"]) == ("verify-full", "system")


async def test_ssl_is_another_word_for_sslmode(driver: str) -> None:
    plans = [
        plan_of(f"postgresql+{driver}://h/d?{name}=verify-ca&sslrootcert=ca.pem")
        for name in ("ssl", "sslmode")
    ]
    seen = [
        {name: value for name, value in plan.connect_args.items() if name != "async_creator_fn"}
        for plan in plans
    ]
    assert seen[0] == seen[1]
    off = plan_of(f"postgresql+{driver}://h/d", connect_args={"ssl": False}).connect_args
    assert off["ssl" if driver == "asyncpg" else "sslmode"] == "disable"


async def test_an_ssl_context_is_for_asyncpg() -> None:
    context = ssl.create_default_context()
    assert plan_of("postgresql+asyncpg://h/d", connect_args={"ssl": context}).connect_args["ssl"] is context
    with pytest.raises(ConfigError, match="psycopg takes no SSLContext"):
        plan_of("postgresql+psycopg://h/d", connect_args={"ssl": context})


async def test_certificate_files_reach_asyncpg_by_the_only_way_it_has() -> None:
    files = "sslrootcert=%2Fetc%2Fca%20x.pem&sslcert=c.pem&sslkey=k.pem&ssl_min_protocol_version=tlsv1.3"
    connect_args = plan_of(f"postgresql+asyncpg://h/d?sslmode=verify-full&{files}").connect_args
    assert connect_args["ssl"] == "verify-full"
    dsn = str(connect_args["dsn"])
    assert dict(parse_qsl(urlsplit(dsn).query)) == {
        "sslrootcert": "/etc/ca x.pem",
        "sslcert": "c.pem",
        "sslkey": "k.pem",
        "ssl_min_protocol_version": "TLSv1.3",
    }


@pytest.mark.parametrize(
    ("url", "hosts", "ports"),
    [
        ("//h1:1,h2:2/d", ["h1", "h2"], [1, 2]),
        ("//h1,h2:2/d", ["h1", "h2"], [5432, 2]),
        ("//[::1]:1,h2/d", ["::1", "h2"], [1, 5432]),
        ("///d?host=h1:1&host=h2:2", ["h1", "h2"], [1, 2]),
        ("///d?host=h1,h2&port=1,2", ["h1", "h2"], [1, 2]),
        ("///d?host=h1,h2&port=7", ["h1", "h2"], [7, 7]),
        ("//:7/d?host=h1,h2", ["h1", "h2"], [7, 7]),
        ("///d?host=h1&port=7", "h1", 7),
        ("///d?host=/run/postgresql", "/run/postgresql", None),
        ("//h/d", "h", None),
    ],
)
async def test_hosts_mean_the_same_however_they_are_written(
    driver: str, url: str, hosts: str | list[str], ports: int | list[int] | None
) -> None:
    plan = plan_of(f"postgresql+{driver}:{url}")
    engine = create_async_engine(plan.url)
    _, parameters = engine.dialect.create_connect_args(plan.url)
    meant: tuple[object, object] = hosts, ports
    if isinstance(hosts, list) and isinstance(ports, list) and driver == "psycopg":
        meant = ",".join(hosts), ",".join(map(str, ports))
    assert (parameters.get("host"), parameters.get("port")) == meant


@pytest.mark.parametrize("query", ["host=a,b&port=1,2,3", "host=a:0,b:1", "port=99999"])
async def test_hosts_and_ports_that_do_not_match_are_refused(driver: str, query: str) -> None:
    with pytest.raises(ConfigError, match="port"):
        plan_of(f"postgresql+{driver}:///d?{query}")


async def test_prefer_standby_asks_every_host_for_a_standby_before_it_takes_any() -> None:
    asked: list[tuple[str, str]] = []

    async def open_one(**parameters: Any) -> None:
        asked.append((parameters["host"], parameters["target_session_attrs"]))
        raise ConnectionRefusedError

    tries = attempts(open_one, {"target_session_attrs": "prefer-standby"}, hosts=["a", "b"], ports=[1, 2])
    with pytest.raises(DatabaseUnavailable, match=r"a:1 refused the connection; b:2 refused"):
        await reach(tries, timeout=1, refusals=())
    assert asked == [("a", "standby"), ("b", "standby"), ("a", "any"), ("b", "any")]


async def test_read_uncommitted_is_read_committed_for_postgresql(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """PostgreSQL says so; SQLAlchemy's asyncpg dialect does not know the name."""
    async with engine_for(fresh_database.url(driver), isolation_level="READ UNCOMMITTED") as (engine, _):
        assert (await show(engine, "transaction_isolation"))[0] in {"read committed", "read uncommitted"}


# Connecting -----------------------------------------------------------------------------------------------


class DeafServer:
    """Accepts TCP and never says a word."""

    def __init__(self) -> None:
        self._links: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._came = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        for _, writer in self._links:
            writer.close()

    async def somebody(self) -> None:
        async with asyncio.timeout(5):
            await self._came.wait()

    async def everybody_left(self) -> int:
        """How many had come; returns once the last of them has closed its socket."""
        async with asyncio.timeout(2):
            for reader, _ in self._links:
                await reader.read()
        return len(self._links)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.append((reader, writer))
        self._came.set()


async def test_a_connect_ends_within_its_timeout_and_leaves_nothing_behind(driver: str) -> None:
    async with DeafServer() as deaf:
        url = f"postgresql+{driver}://app:hunter2@127.0.0.1:{deaf.port}/shop"
        async with engine_for(url, connect_timeout=0.3) as (engine, _):
            started = asyncio.get_running_loop().time()
            with pytest.raises(DatabaseUnavailable) as refused:
                await engine.connect()
            took = asyncio.get_running_loop().time() - started
            assert 0.25 < took < 5
            # the error is still held here: what it holds must not be a socket
            assert await deaf.everybody_left() == 1
        assert refused.value.__cause__ is not None
        assert f"127.0.0.1:{deaf.port} did not answer in time" in refused.value.what


async def test_a_connect_that_is_cancelled_leaves_nothing_behind(driver: str) -> None:
    async with DeafServer() as deaf:
        url = f"postgresql+{driver}://app:hunter2@127.0.0.1:{deaf.port}/shop"
        async with engine_for(url) as (engine, _):
            connecting = asyncio.create_task(engine.connect().start())
            await deaf.somebody()
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError) as held:
                await connecting
            assert await deaf.everybody_left() == 1
            assert held.value is not None


@asynccontextmanager
async def nothing_told_by_the_loop() -> AsyncGenerator[None]:
    """The event loop has nothing to log: a future whose failure nobody looked at, a callback that raised."""
    loop = asyncio.get_running_loop()
    told: list[dict[str, Any]] = []
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: told.append(context))
    try:
        yield
        for _ in range(3):  # the end of a socket is told in a later turn
            await asyncio.sleep(0)
        gc.collect()
    finally:
        loop.set_exception_handler(before)
    assert told == []


@pytest.mark.parametrize("sslmode", ["prefer", "disable"])
async def test_a_connect_that_is_cancelled_at_any_point_leaves_no_failure_that_nobody_looks_at(
    fresh_database: FreshDatabase, driver: str, sslmode: str
) -> None:
    asyncpgs = inspect.getsource(import_module("asyncpg.connect_utils"))
    if (driver, sslmode) == ("asyncpg", "disable") and "connected.cancel()" not in asyncpgs:
        pytest.skip("without TLS it is asyncpg's own to mend, and since 0.32 it does")

    async def connect() -> None:
        async with opened(fresh_database.url(driver) + f"?sslmode={sslmode}"):
            pass

    points = await suspensions(connect())
    async with nothing_told_by_the_loop():
        for point in range(1, points + 1):
            error, _ = await cancelled_at(connect(), {point})
            assert error is None or isinstance(error, asyncio.CancelledError), (
                f"at {point} of {points}: {error!r}"
            )


async def test_an_answer_about_tls_that_nobody_waits_for_any_more_is_let_pass() -> None:
    ours: Any = import_module("stanch.drivers.asyncpg")
    question = ours._TLSQuestion(asyncio.get_running_loop(), "host", 5432, None, ssl_is_advisory=True)
    question.on_data.cancel()
    question.data_received(b"S")
    question.connection_lost(None)
    assert question.on_data.cancelled()


async def test_a_connect_that_fails_says_where_and_tells_no_secret(driver: str) -> None:
    url = f"postgresql+{driver}://hunter2user:hunter2@127.0.0.1:{NOBODY_LISTENS}/hunter2base"
    async with engine_for(url) as (engine, _):
        with pytest.raises(DatabaseUnavailable) as refused:
            await engine.connect()
    assert f"127.0.0.1:{NOBODY_LISTENS}" in refused.value.what
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))
    assert isinstance(refused.value, OperationalError)
    assert not isinstance(refused.value, OSError)


async def test_an_unknown_host_is_a_database_unavailable(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(*_args: object, **_parameters: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    async with engine_for(f"postgresql+{driver}://app@nowhere.invalid/shop") as (engine, _):
        with pytest.raises(DatabaseUnavailable, match=r"nowhere\.invalid"):
            await engine.connect()


async def test_being_turned_away_by_the_server_is_a_database_unavailable(
    fresh_database: FreshDatabase, driver: str
) -> None:
    url = fresh_database.url(driver).replace(fresh_database.name, "no_such_database")
    async with engine_for(url) as (engine, _):
        with pytest.raises(DatabaseUnavailable) as refused:
            await engine.connect()
    assert "no_such_database" not in refused.value.what
    if driver == "asyncpg":  # libpq tells psycopg no SQLSTATE of a failed connect
        assert "SQLSTATE 3D000" in refused.value.what


async def test_the_next_host_is_tried_when_one_refuses_or_stays_silent(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with DeafServer() as deaf:
        good = judge_url(fresh_database.url(driver))
        hosts = f"127.0.0.1:{NOBODY_LISTENS},127.0.0.1:{deaf.port},{good.host}:{good.port}"
        several = good.render_as_string(hide_password=False).replace(f"{good.host}:{good.port}", hosts)
        async with engine_for(several, connect_timeout=2) as (engine, _):
            assert await show(engine, "lock_timeout") == ["10s"]
        assert await deaf.everybody_left() == 1


async def test_a_users_own_way_to_connect_is_kept(fresh_database: FreshDatabase, driver: str) -> None:
    """And what it gives still notices a COMMIT that was none."""
    calls: list[dict[str, Any]] = []
    module = __import__(driver)
    open_one = module.connect if driver == "asyncpg" else module.AsyncConnection.connect

    async def mine(*args: Any, **parameters: Any) -> Any:
        calls.append(parameters)
        return await open_one(*args, **parameters)

    settings = {"connect_args": {"async_creator_fn": mine}}
    async with (
        engine_for(fresh_database.url(driver), **settings) as (engine, _),
        engine.connect() as connection,
    ):
        await swallow(connection, "SELECT 1/0")
        with pytest.raises(CommitRefused):
            await connection.commit()
        await connection.rollback()
    assert len(calls) == 1


async def test_an_existing_engine_is_adopted(fresh_database: FreshDatabase, driver: str) -> None:
    engine = create_async_engine(
        judge_url(fresh_database.url(driver)),
        connect_args={"application_name": "old"}
        if driver == "psycopg"
        else {"server_settings": {"application_name": "old"}},
    )
    ours = driver_of_engine(engine)

    @event.listens_for(engine.sync_engine, "do_connect")
    def _adopt(_dialect: object, _record: object, _args: object, parameters: dict[str, Any]) -> None:
        ours.adopt(parameters, Settings())
        ours.adopt(parameters, Settings())  # twice is once

    async with engine.connect() as connection:
        await swallow(connection, "SELECT 1/0")
        with pytest.raises(CommitRefused):
            await connection.commit()
        await connection.rollback()
    assert await show(engine, "application_name") == ["old"]
    await engine.dispose()


async def test_a_users_own_asyncpg_connection_class_is_kept(fresh_database: FreshDatabase) -> None:
    asyncpg: Any = pytest.importorskip("asyncpg")
    mine = type("Mine", (asyncpg.Connection,), {"__slots__": (), "hello": "hello"})
    async with opened(fresh_database.url("asyncpg"), connect_args={"connection_class": mine}) as (
        connection,
        _,
    ):
        assert connection.hello == "hello"
        await connection.execute("BEGIN")
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute("SELECT 1/0")
        with pytest.raises(CommitRefused):
            await connection.execute("COMMIT;")


# A COMMIT that was none -----------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)


async def swallow(connection: Any, statement: str) -> None:
    try:
        await connection.execute(text(statement))
    except DBAPIError:
        return
    pytest.fail("the planted error did not happen")


async def core_begin(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO item VALUES (1)"))
        await swallow(connection, "SELECT 1/0")


async def core_commit(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("INSERT INTO item VALUES (1)"))
        await swallow(connection, "SELECT 1/0")
        await connection.commit()


async def orm_commit(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        session.add(Item(id=1))
        await session.flush()
        await swallow(session, "SELECT 1/0")
        await session.commit()


async def orm_begin(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        session.add(Item(id=1))
        await session.flush()
        await swallow(session, "SELECT 1/0")


async def savepoint_before(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        async with session.begin_nested():
            session.add(Item(id=1))
        await swallow(session, "SELECT 1/0")


async def sync_style(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        session.add(Item(id=1))
        await session.flush()
        await swallow(session, "SELECT 1/0")
        await session.run_sync(lambda sync_session: sync_session.commit())


@pytest.mark.parametrize(
    "way", [core_begin, core_commit, orm_commit, orm_begin, savepoint_before, sync_style]
)
async def test_a_commit_that_the_server_turned_into_a_rollback_raises(
    fresh_database: FreshDatabase, driver: str, way: Callable[[AsyncEngine], Awaitable[None]]
) -> None:
    await fresh_database.execute("CREATE TABLE item (id int PRIMARY KEY)")
    async with engine_for(fresh_database.url(driver), pool_size=1) as (engine, judge):
        with pytest.raises(CommitRefused):
            await way(engine)
        assert await fresh_database.fetchval("SELECT count(*) FROM item") == 0
        [backend] = await fresh_database.activity()
        assert backend["state"] == "idle"
        async with engine.begin() as connection:  # the same connection, as good as new
            inner = (await connection.get_raw_connection()).driver_connection
            assert judge.is_idle(inner)
            await connection.execute(text("INSERT INTO item VALUES (2)"))
        assert await fresh_database.fetchval("SELECT id FROM item") == 2
        assert [row["pid"] for row in await fresh_database.activity()] == [backend["pid"]]


async def test_a_commit_after_a_rolled_back_savepoint_is_a_commit(
    fresh_database: FreshDatabase, driver: str
) -> None:
    await fresh_database.execute("CREATE TABLE item (id int PRIMARY KEY)")
    async with engine_for(fresh_database.url(driver)) as (engine, _), AsyncSession(engine) as session:
        session.add(Item(id=1))
        await session.flush()
        with pytest.raises(DBAPIError):
            async with session.begin_nested():
                await session.execute(text("SELECT 1/0"))
        await session.commit()
    assert await fresh_database.fetchval("SELECT count(*) FROM item") == 1


# Dead, idle, severed --------------------------------------------------------------------------------------


async def begin(connection: Any) -> None:
    await connection.execute("BEGIN")


async def test_a_fresh_connection_is_idle_and_alive(fresh_database: FreshDatabase, driver: str) -> None:
    async with opened(fresh_database.url(driver)) as (connection, judge):
        await connection.execute("SELECT 1")
        if driver == "psycopg":
            await connection.commit()
        assert judge.is_idle(connection)
        assert not judge.looks_dead(connection)


async def test_a_connection_in_a_transaction_is_not_idle(fresh_database: FreshDatabase, driver: str) -> None:
    async with opened(fresh_database.url(driver)) as (connection, judge):
        await begin(connection)
        assert not judge.is_idle(connection)
        with pytest.raises(Exception, match="division"):
            await connection.execute("SELECT 1/0")
        assert not judge.is_idle(connection)  # aborted is not idle
        await connection.execute("ROLLBACK")
        assert judge.is_idle(connection)


async def test_a_connection_in_the_middle_of_a_statement_is_not_idle(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """In autocommit, where no transaction gives it away."""
    async with opened(fresh_database.url(driver)) as (connection, judge):
        if driver == "psycopg":
            await connection.set_autocommit(True)
        working = asyncio.create_task(connection.execute("SELECT pg_sleep(0.5)"))
        await until(fresh_database, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
        assert not judge.is_idle(connection)
        assert not judge.looks_dead(connection)
        await working
        assert judge.is_idle(connection)


async def test_a_connection_whose_statement_was_cancelled_is_not_idle_until_the_server_says_so(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with opened(fresh_database.url(driver)) as (connection, judge):
        if driver == "psycopg":
            await connection.set_autocommit(True)
        working = asyncio.create_task(connection.execute("SELECT pg_sleep(30)"))
        await until(fresh_database, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
        working.cancel()
        await asyncio.sleep(0)
        assert not judge.is_idle(connection)
        with pytest.raises(asyncio.CancelledError):
            await working
        async with asyncio.timeout(5):
            while not judge.is_idle(connection):  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.01)
        await connection.execute("SELECT 1")


async def test_asking_whether_it_is_idle_does_not_disturb(fresh_database: FreshDatabase, driver: str) -> None:
    """It rests on the order of asyncpg's own checks: should that change, this fails."""
    async with opened(fresh_database.url(driver)) as (connection, judge):
        await connection.execute("SELECT 1")
        if driver == "psycopg":
            await connection.commit()
        for _ in range(100):
            assert judge.is_idle(connection)
        await connection.execute("SELECT 1")
        [backend] = await fresh_database.activity()
        assert backend["query"] == "SELECT 1"


async def test_a_pipeline_is_not_idle(fresh_database: FreshDatabase) -> None:
    async with opened(fresh_database.url("psycopg")) as (connection, judge):
        async with connection.pipeline():
            assert not judge.is_idle(connection)
        assert judge.is_idle(connection)


async def test_a_connection_that_the_server_has_ended_looks_dead(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with opened(fresh_database.url(driver)) as (connection, judge):
        [backend] = await fresh_database.activity()
        await fresh_database.execute(f"SELECT pg_terminate_backend({backend['pid']}, 5000)")
        async with asyncio.timeout(5):
            while not judge.looks_dead(connection):  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.01)
            # The socket tells it at once; asyncpg hears of it by the loop.
            while judge.is_idle(connection):  # noqa: ASYNC110  # likewise
                await asyncio.sleep(0)


async def test_a_pending_notification_is_no_sign_of_death(fresh_database: FreshDatabase, driver: str) -> None:
    async with opened(fresh_database.url(driver)) as (connection, judge):
        await connection.execute("LISTEN news")
        if driver == "psycopg":
            await connection.commit()
        for number in range(50):
            await fresh_database.execute(f"NOTIFY news, '{number}'")
        for _ in range(20):
            assert not judge.looks_dead(connection)
            await asyncio.sleep(0.01)
        assert judge.is_idle(connection)
        await connection.execute("SELECT 1")


async def test_severing_ends_a_statement_at_once(fresh_database: FreshDatabase, driver: str) -> None:
    async with engine_for(fresh_database.url(driver)) as (engine, judge), engine.connect() as connection:
        inner = (await connection.get_raw_connection()).driver_connection
        working = asyncio.create_task(connection.execute(text("SELECT pg_sleep(30)")))
        await until(fresh_database, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
        started = asyncio.get_running_loop().time()
        judge.sever(inner)
        with pytest.raises(DBAPIError) as lost:
            await working
        assert asyncio.get_running_loop().time() - started < 1
        assert lost.value.connection_invalidated


async def test_severing_does_not_wait_for_a_frozen_server(postgres: EmbeddedPostgres, driver: str) -> None:
    from stanch.embedded import EmbeddedPostgres as Server

    with Server(settings={"max_connections": 20}) as server:
        async with engine_for(server.url(driver)) as (engine, judge), engine.connect() as connection:
            inner = (await connection.get_raw_connection()).driver_connection
            server.freeze()
            try:
                working = asyncio.create_task(connection.execute(text("SELECT 1")))
                done, _ = await asyncio.wait([working], timeout=0.2)
                assert not done, "the server answers although it is frozen"
                started = asyncio.get_running_loop().time()
                judge.sever(inner)
                with pytest.raises(DBAPIError):
                    await working
                assert asyncio.get_running_loop().time() - started < 1
            finally:
                server.thaw()


async def test_severing_while_a_statement_is_being_cancelled_leaves_no_failure_that_nobody_looks_at(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """The request to cancel goes over a connection of its own, and is cut off at any point of its opening."""
    async with nothing_told_by_the_loop():
        for turns in range(12):
            async with opened(fresh_database.url(driver)) as (connection, judge):
                working = asyncio.create_task(connection.execute("SELECT pg_sleep(30)"))
                await until(fresh_database, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
                working.cancel()
                for _ in range(turns):
                    await asyncio.sleep(0)
                judge.sever(connection)
                await asyncio.wait((working,))
                assert working.cancelled() or working.exception() is not None


@pytest.mark.parametrize("state", ["idle", "in transaction", "aborted", "severed", "closed"])
async def test_severing_works_in_every_state_and_never_raises(
    fresh_database: FreshDatabase, driver: str, state: str
) -> None:
    async with opened(fresh_database.url(driver)) as (connection, judge):
        match state:
            case "in transaction":
                await begin(connection)
            case "aborted":
                await begin(connection)
                with pytest.raises(Exception, match="division"):
                    await connection.execute("SELECT 1/0")
            case "severed":
                judge.sever(connection)
            case "closed":
                await connection.close()
            case _:
                pass
        judge.sever(connection)
        assert judge.looks_dead(connection)
        assert not judge.is_idle(connection)
    rest = "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
    await until(fresh_database, rest + " AND pid <> pg_backend_pid() AND backend_type = 'client backend')")


# Behind PgBouncer -----------------------------------------------------------------------------------------


async def mixed_requests(engine: AsyncEngine, requests: int) -> list[BaseException]:
    """Many more clients than server connections, ORM and Core, several statements to a transaction."""

    async def request(number: int) -> None:
        async with AsyncSession(engine) as session, session.begin():
            for step in range(3):
                await session.execute(text("SELECT :a + 1, CAST(:b AS text)"), {"a": number, "b": str(step)})
            session.add(Item(id=number))
            await session.flush()
            await session.get(Item, number, populate_existing=True)
            await session.execute(text("SELECT ARRAY['a','b']::mood[]"))

    outcomes: list[BaseException | None] = []
    for start in range(0, requests, 20):
        batch = (request(number) for number in range(start, min(start + 20, requests)))
        outcomes += await asyncio.gather(*batch, return_exceptions=True)
    return [outcome for outcome in outcomes if outcome is not None]


async def autocommit_requests(engine: AsyncEngine, requests: int) -> list[BaseException]:
    """Without a transaction, each message of the protocol may go to another server connection."""

    async def request(number: int) -> None:
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            for step in range(3):
                rows = await connection.execute(text(f"SELECT :a + {step}, 'a'::mood"), {"a": number})
                assert rows.one() == (number + step, "a")

    outcomes: list[BaseException | None] = []
    for start in range(0, requests, 20):
        batch = (request(number) for number in range(start, start + 20))
        outcomes += await asyncio.gather(*batch, return_exceptions=True)
    return [outcome for outcome in outcomes if outcome is not None]


@pytest.mark.pgbouncer
@needs("pgbouncer")
async def test_behind_pgbouncer_in_transaction_mode_no_request_fails(
    postgres: EmbeddedPostgres, fresh_database: FreshDatabase, driver: str
) -> None:
    await fresh_database.execute(
        "CREATE TABLE item (id int PRIMARY KEY); CREATE TYPE mood AS ENUM ('a', 'b')"
    )
    with PgBouncer(postgres, default_pool_size=3) as pooler:
        url = pooler.url(driver, fresh_database.name)
        async with engine_for(url, pooler="pgbouncer", application_name="pooled") as (engine, _):
            assert await mixed_requests(engine, 300) == []
            assert await autocommit_requests(engine, 300) == []
            async with engine.connect() as connection:
                assert await connection.scalar(text("SHOW application_name")) == "pooled"
    assert await fresh_database.fetchval("SELECT count(*) FROM item") == 300


@pytest.mark.pgbouncer
@needs("pgbouncer")
async def test_behind_pgbouncer_the_plain_engine_fails(
    postgres: EmbeddedPostgres, fresh_database: FreshDatabase, driver: str
) -> None:
    """Else the test above proves nothing."""
    await fresh_database.execute(
        "CREATE TABLE item (id int PRIMARY KEY); CREATE TYPE mood AS ENUM ('a', 'b')"
    )
    with PgBouncer(postgres, default_pool_size=3) as pooler:
        engine = create_async_engine(judge_url(pooler.url(driver, fresh_database.name)))
        assert await mixed_requests(engine, 100) != []
        await engine.dispose()
        async with engine_for(pooler.url(driver, fresh_database.name)) as (unaware, _):
            with pytest.raises(DatabaseUnavailable):  # it refuses the start-up parameters
                await unaware.connect()


# SQLite ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE item (id INTEGER PRIMARY KEY, n INTEGER NOT NULL DEFAULT 0)")
    return path  # type: ignore[return-value]  # pytest takes a plain value as well


def stored(path: Path, sql: str = "SELECT count(*) FROM item") -> Any:
    """The truth, by another connection."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchone()[0]


async def test_a_savepoint_is_undone_with_its_transaction(file: Path) -> None:
    async with engine_for(f"sqlite:///{file}") as (engine, _):
        async with AsyncSession(engine) as session:
            async with session.begin_nested():
                session.add(Item(id=1))
            await session.rollback()
        assert stored(file) == 0
        async with AsyncSession(engine) as session:
            session.add(Item(id=2))
            await session.flush()
            with pytest.raises(IntegrityError):
                async with session.begin_nested():
                    await session.execute(text("INSERT INTO item (id) VALUES (2)"))
            await session.commit()
        assert stored(file) == 1


async def test_the_plain_engine_keeps_what_a_savepoint_wrote(file: Path) -> None:
    """Else the test above proves nothing."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            session.add(Item(id=1))
        await session.rollback()
    await engine.dispose()
    assert stored(file) == 1


async def test_a_file_is_in_wal_mode_checks_foreign_keys_and_waits_for_locks(file: Path) -> None:
    async with (
        engine_for(f"sqlite:///{file}", lock_timeout=2.5) as (engine, _),
        engine.connect() as connection,
    ):
        pragmas = [
            await connection.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "foreign_keys", "busy_timeout")
        ]
        assert pragmas == ["wal", 1, 2500]
        assert not engine.sync_engine._has_events  # pyright: ignore[reportPrivateUsage]  # the price of a listener


async def read_then_write(engine: AsyncEngine, *, first_only_reads: bool) -> None:
    async with engine.connect() as connection:
        if first_only_reads:
            (await connection.get_raw_connection()).info[READ_ONLY_KEY] = True
        n: int | None = await connection.scalar(text("SELECT n FROM item WHERE id = 1"))
        await asyncio.sleep(0.01)  # the other writers' turn to read
        assert n is not None
        await connection.execute(text("UPDATE item SET n = :n WHERE id = 1"), {"n": n + 1})
        await connection.commit()


@pytest.mark.parametrize("readers", [False, True])
async def test_writers_that_read_first_wait_for_each_other(file: Path, readers: bool) -> None:
    """As five readers that turn into writers they fail, which is why a writer says so in its BEGIN."""
    async with engine_for(f"sqlite:///{file}") as (engine, _):
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item (id, n) VALUES (1, 0)"))
        writers = (read_then_write(engine, first_only_reads=readers) for _ in range(5))
        outcomes = await asyncio.gather(*writers, return_exceptions=True)
    failed = [outcome for outcome in outcomes if outcome is not None]
    assert stored(file, "SELECT n FROM item") == 5 - len(failed)
    assert bool(failed) is readers
    assert all(isinstance(outcome, OperationalError) for outcome in failed)


async def test_ten_connections_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    """All of them want WAL mode, which takes a lock to switch on."""
    async with engine_for(f"sqlite:///{tmp_path / 'new.db'}") as (engine, _):

        async def look() -> Any:
            async with engine.connect() as connection:
                return await connection.scalar(text("PRAGMA journal_mode"))

        assert await asyncio.gather(*(look() for _ in range(10))) == ["wal"] * 10


async def test_autocommit_begins_nothing_and_the_next_unit_begins_again(file: Path) -> None:
    async with engine_for(f"sqlite:///{file}", pool_size=1) as (engine, judge):
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("INSERT INTO item (id) VALUES (1)"))
            inner = (await connection.get_raw_connection()).driver_connection
            assert judge.is_idle(inner)
            assert stored(file) == 1
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            assert (await connection.get_raw_connection()).driver_connection is inner
            assert not judge.is_idle(inner)
            async with connection.begin_nested():
                await connection.execute(text("INSERT INTO item (id) VALUES (2)"))
            await connection.rollback()
            assert judge.is_idle(inner)
        assert stored(file) == 1


async def test_after_sqlite_rolled_back_by_itself_nothing_more_is_stored(file: Path) -> None:
    async with engine_for(f"sqlite:///{file}", pool_size=1) as (engine, judge):
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO item (id) VALUES (1)"))
            with pytest.raises(IntegrityError):
                await connection.execute(text("INSERT OR ROLLBACK INTO item (id) VALUES (1)"))
            with pytest.raises(CommitRefused):
                await connection.execute(text("INSERT INTO item (id) VALUES (2)"))
            with pytest.raises(CommitRefused):
                await connection.commit()
            await connection.rollback()
            assert judge.is_idle((await connection.get_raw_connection()).driver_connection)
        assert stored(file) == 0
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item (id) VALUES (3)"))
    assert stored(file) == 1


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


async def test_a_statement_of_sqlite_ends_at_its_timeout(file: Path) -> None:
    async with (
        engine_for(f"sqlite:///{file}", statement_timeout=0.2) as (engine, _),
        engine.connect() as connection,
    ):
        started = asyncio.get_running_loop().time()
        with pytest.raises(OperationalError, match="interrupted"):
            await connection.execute(text(ENDLESS))
        assert asyncio.get_running_loop().time() - started < 2
        await connection.rollback()
        assert await connection.scalar(text("SELECT 1")) == 1


async def test_a_busy_sqlite_connection_is_not_idle_and_can_be_severed(file: Path) -> None:
    async with engine_for(f"sqlite:///{file}") as (engine, judge), engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        inner = (await connection.get_raw_connection()).driver_connection
        assert judge.is_idle(inner)
        working = asyncio.create_task(connection.execute(text(ENDLESS)))
        done, _ = await asyncio.wait([working], timeout=0.1)
        assert not done
        assert not judge.is_idle(inner)
        judge.sever(inner)
        with pytest.raises(OperationalError):
            await working
        assert judge.looks_dead(inner)
        assert not judge.is_idle(inner)
        judge.sever(inner)
        await connection.close()
        pool: Any = engine.pool
        assert pool.checkedout() == 0


async def test_a_severed_sqlite_connection_is_a_disconnect_for_sqlalchemy(file: Path) -> None:
    async with engine_for(f"sqlite:///{file}") as (engine, judge), engine.connect() as connection:
        judge.sever((await connection.get_raw_connection()).driver_connection)
        with pytest.raises(OperationalError) as lost:
            await connection.execute(text("SELECT 1"))
        assert lost.value.connection_invalidated


async def test_a_file_that_cannot_be_opened_is_a_database_unavailable(tmp_path: Path) -> None:
    async with engine_for(f"sqlite:///{tmp_path}/no/such/folder/x.db") as (engine, _):
        with pytest.raises(DatabaseUnavailable, match="SQLite") as refused:
            await engine.connect()
    assert "folder" not in refused.value.what


async def test_a_file_opened_for_reading_only_is_not_written_to(file: Path) -> None:
    url = f"sqlite:///file:{file}?mode=ro&uri=true"
    async with engine_for(url) as (engine, _), engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM item")) == 0
        with pytest.raises(OperationalError, match="readonly"):
            await connection.execute(text("INSERT INTO item (id) VALUES (1)"))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
async def test_a_database_in_memory_is_one_connection_that_stays(url: str) -> None:
    judged = judge_url(url)
    settings = driver_of(judged).plan(judged, Settings()).settings
    assert (settings.pool_size, settings.max_overflow, settings.pool_recycle) == (1, 0, -1)


async def test_a_listener_that_begins_by_itself_is_left_to_it(file: Path) -> None:
    """SQLAlchemy's own recipe, found in many apps, on an engine that was taken over."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}", poolclass=NullPool)
    ours = driver_of_engine(engine)
    ours.prepare_engine(engine, Settings())

    @event.listens_for(engine.sync_engine, "do_connect")
    def _adopt(_dialect: object, _record: object, _args: object, parameters: dict[str, Any]) -> None:
        ours.adopt(parameters, Settings())

    @event.listens_for(engine.sync_engine, "connect")
    def _no_begin(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    async with engine.connect() as connection:
        async with connection.begin_nested():
            await connection.execute(text("INSERT INTO item (id) VALUES (1)"))
        await connection.rollback()
    assert stored(file) == 0


LATER = {
    "asyncpg": {"service", "servicefile"},
    "psycopg": {
        *(
            "max_protocol_version",
            "min_protocol_version",
            "scram_client_key",
            "scram_server_key",
            "sslkeylogfile",
        ),
        *("oauth_client_id", "oauth_client_secret", "oauth_issuer", "oauth_scope"),
    },
}
"""Options that the oldest supported releases do not have: asyncpg 0.30, the libpq 17 in psycopg 3.2."""


async def test_exactly_the_options_are_accepted_that_the_driver_has(driver: str) -> None:
    """A name that the driver does not know would fail at the first connect."""
    module: Any = import_module(driver)
    named: set[str]
    if driver == "asyncpg":
        sqlalchemys = {"prepared_statement_cache_size", "prepared_statement_name_func"}
        named, has = set(ASYNCPG), set(inspect.signature(module.connect).parameters) | sqlalchemys
    else:
        named, has = set(PSYCOPG), set(inspect.signature(module.AsyncConnection.connect).parameters)
        has |= {option.keyword.decode() for option in module.pq.Conninfo.get_defaults()}
    assert set(import_module(f"stanch.drivers.{driver}").OWN) == named & has
    assert named - has <= LATER[driver]


async def test_an_engine_of_another_driver_is_refused() -> None:
    class Foreign:
        class dialect:  # noqa: N801  # the attribute of an engine
            name, driver = "mysql", "aiomysql"

    with pytest.raises(ConfigError, match="aiomysql"):
        driver_of_engine(Foreign())  # type: ignore[arg-type]  # all that is looked at
