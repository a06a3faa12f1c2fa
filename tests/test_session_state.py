"""Nothing that one unit leaves in the server's session is met by the next, and only who left something pays for it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, literal, select, text
from sqlalchemy.exc import DBAPIError

from stanch import Database, SessionStateRefused, rollback_only, statements
from stanch.events import ConnectionSevered, SessionStateSet
from stanch.session_state import CLEANING, State, session_state_of
from stanch.sqlstate import sqlstate_of
from tests.support import cleaned
from tests.support.proxy import FaultProxy, Verdict, statement_of

if TYPE_CHECKING:
    from typing import Literal

    from sqlalchemy.ext.asyncio import AsyncSession

    from stanch.events import Event
    from tests.support.judge import FreshDatabase

    Mode = Literal["flag", "strict"]

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

KINDS = {
    "SET": "SET work_mem = '7MB'",
    "set_config": "SELECT set_config('app.tenant', 'seven', false)",
    "role": "SET ROLE pg_monitor",
    "session authorization": "SET SESSION AUTHORIZATION pg_read_all_stats",
    "search path": "SET SESSION search_path = evil, public",
    "timeouts": "SET statement_timeout = '7s'",
    "characteristics": "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "temporary table": "CREATE TEMPORARY TABLE kept (a int)",
    "advisory lock": "SELECT pg_try_advisory_lock(7)",
    "listen": "LISTEN gossip",
    "prepare": 'PREPARE "the plan" AS SELECT 1',
    "cursor with hold": "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
}

SEEN = text(
    """
    SELECT current_user, session_user, current_setting('work_mem'), current_setting('search_path'),
      current_setting('statement_timeout'), coalesce(current_setting('app.tenant', true), ''),
      current_setting('default_transaction_isolation'),
      (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()),
      (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
      (SELECT count(*) FROM pg_listening_channels()),
      (SELECT count(*) FROM pg_prepared_statements WHERE from_sql),
      (SELECT count(*) FROM pg_cursors WHERE is_holdable)
    """
)
PID = text("SELECT pg_backend_pid()")
ENDINGS = ["commit", "rollback", "error", "cancel"]


def make(url: str, mode: Mode = "flag", **settings: Any) -> tuple[Database[AsyncSession], list[Event]]:
    events: list[Event] = []
    db = Database(url, pool_size=1, max_overflow=0, reset=mode, statement_timeout=11, **settings)
    db.observe(events.append)
    return db, events


async def unit(db: Database[AsyncSession], statement: str, ending: str) -> None:
    """One unit that sets state for its session, makes it permanent, and ends in one of four ways."""

    async def work() -> None:
        async with db.transaction() as session:
            await session.execute(text(statement))
            await session.commit()  # a rollback would undo some of it
            await session.execute(text("SELECT 1"))
            match ending:
                case "rollback":
                    rollback_only(session)
                case "error":
                    await session.execute(text("SELECT 1 / 0"))
                case "cancel":
                    reached.set()
                    await asyncio.Event().wait()
                case _:
                    pass

    reached = asyncio.Event()
    task = asyncio.ensure_future(work())
    if ending == "cancel":
        await reached.wait()
        task.cancel()
    with suppress(Exception, asyncio.CancelledError):
        await task


async def seen(db: Database[AsyncSession]) -> tuple[Any, ...]:
    async with db.transaction() as session:
        return tuple((await session.execute(SEEN)).one())


async def pid_of(db: Database[AsyncSession]) -> int:
    async with db.connect() as connection:
        return int(await connection.scalar(PID) or 0)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("mode", ["flag", "strict"])
async def test_the_next_borrower_meets_nothing_of_the_one_before(
    fresh_database: FreshDatabase, driver: str, mode: Mode, ending: str
) -> None:
    """12 kinds × 4 endings × 2 drivers, in both modes."""
    db, events = make(fresh_database.url(driver), mode)
    async with db:
        untouched = await seen(db)
        assert untouched[4] == "11s"
        for kind, statement in KINDS.items():
            pid = await pid_of(db)
            await unit(db, statement, ending)
            assert await seen(db) == untouched, kind
            assert (await pid_of(db) == pid) is (mode == "strict"), kind
    flagged = [event for event in events if isinstance(event, SessionStateSet)]
    assert not [event for event in events if isinstance(event, ConnectionSevered)]
    if mode == "strict":
        assert not flagged
    else:  # once per place and kind
        assert {event.what for event in flagged} == {
            "SET", "set_config()", "CREATE TEMP", "pg_try_advisory_lock()", "LISTEN", "PREPARE", "DECLARE WITH HOLD"
        }  # fmt: skip
        assert len(flagged) == 7
        assert all("test_session_state.py" in str(event) and "in unit." in str(event) for event in flagged)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the eyes away: no state is noted any more."""

    def note_nothing(_state: State, _context: object) -> None:
        pass

    monkeypatch.setattr(statements, "_note_state", note_nothing)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_without_the_note_every_kind_is_met_by_the_next(
    fresh_database: FreshDatabase, driver: str, ending: str, blind: None
) -> None:
    """The teeth of the test above."""
    for kind, statement in KINDS.items():
        db, _ = make(fresh_database.url(driver), "strict")
        async with db:
            untouched = await seen(db)
            await unit(db, statement, ending)
            assert await seen(db) != untouched, kind


async def test_cleaning_costs_one_round_trip_and_none_where_nothing_was_left(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with FaultProxy(fresh_database.server.port) as proxy:
        db, _ = make(proxy.through(fresh_database.url(driver)), "strict")

        async def cost(statement: str) -> int:
            async with db.engine.connect() as connection:
                await connection.execute(text(statement))
                await connection.commit()
                proxy.forget()
            return proxy.round_trips

        async with db:
            for clean in ("SELECT 1", "SET LOCAL work_mem = '7MB'", "SELECT pg_advisory_xact_lock(1)"):
                assert await cost(clean) == 0, clean
            for kind, statement in KINDS.items():
                assert await cost(statement) == 1, kind
                assert proxy.queries[0].startswith(CLEANING[0])
            assert await cost("SELECT 1") == 0


async def test_the_drivers_own_prepared_statements_survive_the_cleaning(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, events = make(fresh_database.url(driver), "strict")
    async with db:
        pid = await pid_of(db)
        for _ in range(8):  # psycopg prepares at the sixth time
            async with db.transaction() as session:
                await session.execute(text("PREPARE plan AS SELECT 1"))
                assert await session.scalar(text("SELECT 40 + :n"), {"n": 2}) == 42
        assert await pid_of(db) == pid
    assert not events


async def test_a_setting_for_the_transaction_alone_costs_no_connection(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, events = make(fresh_database.url(driver))
    async with db:
        pid = await pid_of(db)
        async with db.transaction() as session:
            await session.execute(text("SET LOCAL app.tenant = 'seven'"))
            await session.execute(text("SET CONSTRAINTS ALL DEFERRED"))
            await session.execute(select(func.set_config("app.tenant", "seven", True)))
            await session.execute(select(func.set_config("app.tenant", "seven", literal(True))))
            await session.execute(
                text("SELECT set_config('app.tenant', :tenant, :local)"), {"tenant": "x", "local": True}
            )
            await session.execute(text("CREATE TEMP TABLE brief (a int) ON COMMIT DROP"))
        assert await pid_of(db) == pid
        async with db.transaction() as session:
            await session.execute(select(func.set_config("app.tenant", "seven", False)))
        assert await pid_of(db) != pid
    assert [type(event) for event in events] == [SessionStateSet]


@pytest.mark.parametrize("mode", ["flag", "strict"])
async def test_state_set_past_the_session_is_seen_too(
    fresh_database: FreshDatabase, driver: str, mode: Mode
) -> None:
    db, _ = make(fresh_database.url(driver), mode)
    async with db:
        untouched = await seen(db)
        async with db.engine.connect() as connection:
            await connection.exec_driver_sql("SET work_mem = '7MB'")
            await connection.commit()
        assert await seen(db) == untouched
        async with db.engine.connect() as connection:
            bare = await connection.execution_options(no_parameters=True)
            await bare.exec_driver_sql(
                "SELECT 1; SET work_mem = '7MB'" if driver == "psycopg" else "SET work_mem = '7MB'"
            )
            await connection.commit()
        assert await seen(db) == untouched
        async with db.begin() as connection:
            rows = [{"tenant": "six", "local": True}, {"tenant": "seven", "local": False}]
            await connection.execute(text("SELECT set_config('app.tenant', :tenant, :local)"), rows)
        assert await seen(db) == untouched
        async with db.begin() as connection:
            await connection.execute(text("DO $$ BEGIN PERFORM 1; SET work_mem = '7MB'; END $$"))
        assert await seen(db) == untouched
        async with db.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("SET work_mem = '7MB'"))
        assert await seen(db) == untouched


async def test_a_role_and_a_sequence_are_back_where_the_connection_began(
    fresh_database: FreshDatabase, driver: str
) -> None:
    await fresh_database.execute(
        "CREATE SEQUENCE s; GRANT USAGE ON SCHEMA public TO PUBLIC; GRANT USAGE ON s TO PUBLIC;"
        f' ALTER DATABASE "{fresh_database.name}" SET role = pg_monitor'
    )
    db, events = make(fresh_database.url(driver), "strict")
    async with db:
        untouched = await seen(db)
        assert untouched[0] == "pg_monitor"
        async with db.begin() as connection:
            await connection.execute(text("SET ROLE pg_read_all_stats"))
            await connection.execute(text("SELECT nextval('s')"))
        assert await seen(db) == untouched
        async with db.connect() as connection:
            with pytest.raises(DBAPIError) as failed:
                await connection.execute(text("SELECT lastval()"))
    assert sqlstate_of(failed.value) == "55000"  # not yet defined in this session
    assert not events


async def test_a_unit_cancelled_while_its_connection_is_cleaned_leaves_nothing_behind(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with FaultProxy(fresh_database.server.port) as proxy:
        db, _ = make(proxy.through(fresh_database.url(driver)), "strict")
        async with db:
            untouched = await seen(db)
            task = asyncio.create_task(unit(db, KINDS["advisory lock"], "commit"))
            cancelled = 0

            def cancel_when_cleaning(kind: str, payload: bytes) -> Verdict:
                nonlocal cancelled
                if (statement_of(kind, payload) or "").startswith(CLEANING[0]):
                    cancelled += task.cancel()
                return Verdict.FORWARD

            proxy.on_client_message = cancel_when_cleaning
            await asyncio.wait([task])
            assert cancelled == 1
            assert db.stats().in_use == 0
            assert await seen(db) == untouched


async def test_what_cannot_be_undone_costs_the_connection_in_strict_mode_too(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, events = make(fresh_database.url(driver), "strict")
    async with db:
        pid = await pid_of(db)
        async with db.begin() as connection:
            await connection.execute(text("SELECT setseed(0.5)"))
        assert await pid_of(db) != pid
    assert [str(event).split(" at ")[0] for event in events] == ["setseed()"]


async def test_a_cleaning_that_fails_or_hangs_ends_in_a_severed_connection(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with FaultProxy(fresh_database.server.port) as proxy:
        db, events = make(proxy.through(fresh_database.url(driver)), "strict", close_timeout=0.3)
        async with db:
            untouched, pid = await seen(db), await pid_of(db)
            async with db.begin() as connection:  # PREPARE is undone by name, and that name is gone
                await connection.execute(text("PREPARE plan AS SELECT 1"))
                await connection.execute(text("DEALLOCATE plan"))
            assert await pid_of(db) != pid
            async with db.engine.connect() as connection:
                await connection.execute(text("SET work_mem = '7MB'"))
                await connection.commit()
                proxy.blackhole()
            proxy.pass_through()
            assert await seen(db) == untouched
        reasons = [event.reason for event in events if isinstance(event, ConnectionSevered)]
    assert len(reasons) == len(events) == 2
    assert all(reason.startswith("its session state could not be reset") for reason in reasons)


async def test_behind_pgbouncer_such_a_statement_is_refused(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """No PgBouncer is needed to see that nothing was sent."""
    db = Database(fresh_database.url(driver), pooler="pgbouncer", pool_size=1)
    async with db:
        for kind, statement in KINDS.items():
            async with db.session() as session:
                with pytest.raises(SessionStateRefused, match="SET LOCAL"):
                    await session.execute(text(statement))
                assert await session.scalar(text("SELECT 1")) == 1, kind
        async with db.transaction() as session:
            await session.execute(text("SET LOCAL work_mem = '7MB'"))
            await session.execute(select(func.set_config("app.tenant", "seven", True)))
        pid = await pid_of(db)
    assert pid


@pytest.mark.sqlite
async def test_sqlite_has_no_session_to_leave_anything_in() -> None:
    async with Database("sqlite+aiosqlite:///:memory:") as db:
        async with db.begin() as connection:
            await connection.execute(text("CREATE TEMP TABLE kept (a int)"))
        async with db.begin() as connection:
            await connection.execute(text("INSERT INTO kept VALUES (1)"))  # one connection, and it is kept


@pytest.mark.parametrize(
    ("sql", "kinds"),
    [
        ("SELECT 1", []),
        ("UPDATE t SET a = 1", []),
        ("INSERT INTO t VALUES ('SET x') ON CONFLICT DO UPDATE SET a = 2", []),
        ("SELECT 1 OFFSET 3", []),
        ("SELECT 'LISTEN x; SET y = 1'", []),
        ("/* SET x = 1 */ SELECT 1 -- LISTEN", []),
        ('SELECT "set", "load" FROM t', []),
        ("SET LOCAL x = 1", []),
        ("SET TRANSACTION READ ONLY", []),
        ("SET CONSTRAINTS ALL IMMEDIATE", []),
        ("RESET x", []),
        ("PREPARE TRANSACTION 'x'", []),
        ("SELECT pg_advisory_xact_lock(1), pg_advisory_unlock(1)", []),
        ("DECLARE c CURSOR WITHOUT HOLD FOR SELECT 1", []),
        ("SELECT * INTO kept FROM t", []),
        ("SELECT set_config('a', $1, TRUE)", []),
        ("SELECT set_config('a', 'b', 'true'::boolean)", []),
        ("/* x */ set x = 1", ["SET"]),
        ("SELECT 1; SET x = 1", ["SET"]),
        ("SELECT set_config('a', f(b, c), false)", ["set_config()"]),
        ("SELECT pg_catalog.\"set_config\" ('a', 'b', is_local => false)", ["set_config()"]),
        ("SELECT set_config(VARIADIC x)", ["set_config()"]),
        ("SELECT * INTO TEMP kept FROM t", ["CREATE TEMP"]),
        ("CREATE OR REPLACE TEMP VIEW v AS SELECT 1", ["CREATE TEMP"]),
        ("CREATE LOCAL TEMPORARY SEQUENCE s", ["CREATE TEMP"]),
        ("CREATE TABLE pg_temp.kept ()", ["CREATE TEMP"]),
        ("EXPLAIN ANALYZE CREATE TEMP TABLE x AS SELECT 1", ["CREATE TEMP"]),
        ("DISCARD ALL", ["DISCARD ALL"]),
        ("DEALLOCATE PREPARE ALL", ["DEALLOCATE ALL"]),
        ("LOAD 'auto_explain'", ["LOAD"]),
        ("DO 'BEGIN SET x = ''1''; END'", ["SET"]),
        ("DO $x$ BEGIN IF true THEN PERFORM pg_advisory_lock(1); END IF; END $x$", ["pg_advisory_lock()"]),
        ("SELECT U&\"s\\0065t_config\"('a', 'b', false)", ["a statement that cannot be read"]),
    ],
)
def test_session_state_is_known_by_the_words(sql: str, kinds: list[str]) -> None:
    assert [state.what for state in session_state_of(sql)] == kinds


def test_a_prepared_statement_is_undone_under_its_own_name() -> None:
    assert session_state_of('PREPARE "a; DROP TABLE t" AS SELECT 1') == (
        State("PREPARE", 'DEALLOCATE "a; DROP TABLE t"'),
    )
