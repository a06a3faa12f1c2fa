"""The other helpers of the tests do what they say: judge, uvicorn, PgBouncer, and the list of what was left out."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx2
import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from stanch.embedded import EmbeddedPostgres
from stanch.embedded.processes import look_at
from tests.support.abandoned import AbandonedConnections
from tests.support.judge import OTHERS, FreshDatabase, assert_nothing_left, raw_connect, until
from tests.support.optional import needs
from tests.support.pgbouncer import PgBouncer
from tests.support.uvicorn_server import StartupFailed, serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

ROOT = Path(__file__).parent.parent


class Claims:
    """A database that says of itself what it is told to."""

    def __init__(self, counts: Any) -> None:
        self.counts = counts

    def stats(self) -> Any:
        return self.counts


# The judge ------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_test_gets_a_database_of_its_own(
    fresh_database: FreshDatabase, postgres: EmbeddedPostgres
) -> None:
    assert await fresh_database.fetchval("SELECT current_database()") == fresh_database.name
    assert await fresh_database.activity() == []
    await fresh_database.execute("CREATE TABLE t (n int); INSERT INTO t VALUES (1), (2)")
    assert [row["n"] for row in await fresh_database.fetch("SELECT n FROM t WHERE n > $1", 1)] == [2]
    assert postgres.sql("TABLE t", database=fresh_database.name) == [("1",), ("2",)]


@pytest.mark.anyio
async def test_what_is_left_behind_is_found_and_named(fresh_database: FreshDatabase) -> None:
    guest = await raw_connect(fresh_database.url(None))
    await assert_nothing_left(fresh_database)
    await guest.execute("BEGIN; SELECT 12345")
    with pytest.raises(AssertionError, match=r"backend \d+ is idle in transaction, .*12345"):
        await assert_nothing_left(fresh_database, timeout=0.1)
    ending = asyncio.create_task(assert_nothing_left(fresh_database, timeout=10))
    await guest.execute("ROLLBACK")
    await ending
    for counts, complaint in (
        ({"in_use": 1, "waiting": 0}, "in_use is 1"),
        ({"in_use": 0, "waiting": 2}, "waiting is 2"),
    ):
        db = Claims(SimpleNamespace(**counts))
        with pytest.raises(AssertionError, match=complaint):
            await assert_nothing_left(fresh_database, db, timeout=0.1)
    await guest.close()


@pytest.mark.slow
@pytest.mark.anyio
async def test_an_autovacuum_worker_is_nobodys_connection() -> None:
    """It is in the database and active, as a client's statement that should have ended would be, at any moment."""
    at_length = (
        "autovacuum_vacuum_threshold = 0, autovacuum_vacuum_cost_delay = 20, autovacuum_vacuum_cost_limit = 1"
    )
    async with EmbeddedPostgres(settings={"autovacuum_naptime": "1s"}) as server:
        database = await FreshDatabase.create(server)
        guest = await raw_connect(database.url(None))
        rows = "INSERT INTO t SELECT generate_series(1, 10000); DELETE FROM t"
        # psql's: what a connection has changed is counted 10 s later, or at once when it ends
        server.sql(f"CREATE TABLE t (n int) WITH ({at_length}); {rows}", database=database.name)
        [seen] = await until(
            database,
            f"SELECT (SELECT array_agg(pid) FROM {OTHERS}) AS others FROM pg_stat_activity"  # one look at all of them
            " WHERE datname = current_database() AND backend_type = 'autovacuum worker' AND state = 'active'",
            timeout=20,
        )
        assert seen["others"] == [guest.get_server_pid()]
        await guest.close()
        await database.drop()


@pytest.mark.anyio
async def test_the_judge_comes_back_after_it_was_killed(fresh_database: FreshDatabase) -> None:
    admin = await raw_connect(fresh_database.server.url(None))
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", fresh_database.name
    )
    await admin.close()
    async with asyncio.timeout(10):
        while True:
            try:
                assert await fresh_database.fetchval("SELECT 1") == 1
                break
            except Exception:  # the one query that notices
                await asyncio.sleep(0.02)


@pytest.mark.abandons_connections
@pytest.mark.anyio
async def test_a_connection_left_to_the_garbage_collector_is_noticed(
    fresh_database: FreshDatabase, driver: str
) -> None:
    engine = create_async_engine(fresh_database.url(driver))
    with AbandonedConnections() as abandoned:
        async with engine.connect() as kept:
            await kept.execute(text("SELECT 1"))
        gc.collect()
        assert abandoned.complaints == []
        left = await engine.connect()
        await left.execute(text("SELECT 1"))
        del left
        gc.collect()
        assert len(abandoned.complaints) == 1
        assert "non-checked-in connection" in abandoned.complaints[0]
    await engine.dispose()


# uvicorn --------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_an_app_is_served_with_its_lifespan_on_a_real_socket() -> None:
    life: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        life.append("up")
        yield
        life.append("down")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def root() -> dict[str, str]:
        return {"seen": ",".join(life)}

    async with serve(app) as base, httpx2.AsyncClient(base_url=base) as client:
        assert (await client.get("/")).json() == {"seen": "up"}
    assert life == ["up", "down"]
    with pytest.raises(OSError, match=r"refused|failed"):
        await asyncio.open_connection("127.0.0.1", int(base.rpartition(":")[2]))


@pytest.mark.anyio
async def test_an_app_that_does_not_start_says_why() -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        if app.title:
            raise LookupError("no database")
        yield

    with pytest.raises(StartupFailed) as caught:
        async with serve(FastAPI(lifespan=lifespan)):
            pytest.fail("it started")
    assert isinstance(caught.value.__cause__, LookupError)


@pytest.mark.anyio
async def test_a_request_that_hangs_is_cancelled_when_the_server_is_left() -> None:
    entered, ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with httpx2.AsyncClient() as client:
        async with serve(app, lifespan="off", timeout_graceful_shutdown=1) as base:
            asking = asyncio.create_task(client.get(base, timeout=30))
            await entered.wait()
        assert ended.is_set()
        with pytest.raises(httpx2.HTTPError):
            (await asking).raise_for_status()


# PgBouncer ------------------------------------------------------------------------------------------------


@needs("pgbouncer")
@pytest.mark.anyio
async def test_pgbouncer_shares_one_server_connection_between_clients(fresh_database: FreshDatabase) -> None:
    with PgBouncer(fresh_database.server, default_pool_size=1) as pooler:
        pid = pooler.pid
        assert look_at(pid) is not None
        url = pooler.url(None, fresh_database.name)
        async with (
            await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=None) as one,
            await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=None) as two,
        ):
            pids = [
                await (await client.execute("SELECT pg_backend_pid()")).fetchone()
                for client in (one, two, one)
            ]
        assert len(set(pids)) == 1
        assert len(await fresh_database.activity()) == 1
        with pytest.raises(psycopg.OperationalError, match="SASL authentication failed"):
            psycopg.connect(url.replace(":", ":x", 2).replace("x//", "//", 1))
    assert look_at(pid) is None
    nobody = "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)"
    await until(fresh_database, nobody, *(pids[0] or ()))


# What was left out ----------------------------------------------------------------------------------------

CONFTEST = """
from tests.conftest import _nothing_abandoned
from tests.support import optional
optional.PROGRAMS["no-such-program"] = "apt install unobtainium"
def pytest_configure(config):
    config.pluginmanager.register(optional.LeftOut())
    config.addinivalue_line("markers", "abandons_connections: on purpose")
"""
SUITE = """
import logging
import pytest
from tests.support.optional import needs

@needs("no-such-program")
@pytest.mark.parametrize("n", [1, 2])
def test_far(n): raise AssertionError("never runs")

def test_near(): pass

def test_leaky(): logging.getLogger("some.pool").error("The garbage collector is trying to clean up %s", "this")

@pytest.mark.abandons_connections
def test_leaky_on_purpose(): test_leaky()
"""


def inner_pytest(folder: Path, *options: str, require: str = "") -> str:
    (folder / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    (folder / "test_suite.py").write_text(textwrap.dedent(SUITE))
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers --import-mode=importlib\n")
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "STANCH_REQUIRE": require},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return f"{done.stdout}\n{done.stderr}\nstatus {done.returncode}"


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_what_is_missing_leaves_tests_out_and_lists_them(tmp_path: Path, options: list[str]) -> None:
    said = inner_pytest(tmp_path, "-k", "far or near", *options)
    assert (
        "left out: 2 tests, because no-such-program is not installed: test_suite.py::test_far[1], "
        "test_suite.py::test_far[2]" in said
    )
    assert "1 passed" in said
    assert "failed" not in said
    assert "skipped" not in said
    assert "status 0" in said


def test_what_is_required_fails_the_run_before_it_begins(tmp_path: Path) -> None:
    said = inner_pytest(tmp_path, require="all")
    assert "STANCH_REQUIRE: missing: no-such-program (apt install unobtainium)" in said
    assert "passed" not in said
    assert "status 4" in said


def test_a_test_that_leaves_a_connection_to_the_garbage_collector_fails(tmp_path: Path) -> None:
    said = inner_pytest(tmp_path, "-k", "leaky")
    assert "ERROR at teardown of test_leaky _" in said
    assert "some.pool: The garbage collector is trying to clean up this" in said
    assert "2 passed, 3 deselected, 1 error" in said


def test_an_unknown_program_is_refused() -> None:
    with pytest.raises(ValueError, match="teleporter"):
        needs("teleporter")
