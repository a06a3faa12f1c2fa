"""Law 8: every complaint says who. Each connection that is out has its unit, its task, its line and its SQL time."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from stanch import ConfigError, Database, InsideTransaction, PoolExhausted
from stanch.accounts import Account
from stanch.blame import lines_of, remedies_for
from stanch.callers import NOWHERE, Place, place_of_caller
from stanch.events import StillHeld
from stanch.ledger import Checkout
from stanch.meters import Meter
from tests.support import cleaned
from tests.support.judge import until

if TYPE_CHECKING:
    from stanch.events import Event
    from stanch.measuring import Holding
    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

ONE = text("SELECT 1")
PAUSE = text("SELECT pg_sleep(0.2)")
PAUSED = "SELECT 1 FROM pg_stat_activity WHERE datname = $1 AND query ~ 'pg_sleep' AND state = 'active'"


def make(judged: FreshDatabase, driver: str, **settings: Any) -> Database[Any]:
    chosen: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, **settings}
    return Database(judged.url(driver), **chosen)


def only(db: Database[Any]) -> Holding:
    (held,) = db.holdings()
    return held


HERE = r"test_holders\.py:\d+ in "


# Whose it is ------------------------------------------------------------------------------------------------


async def test_a_session_is_named_by_the_line_that_opened_it_and_the_line_that_took_its_connection(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver) as db, db.session() as session:
        assert db.holdings() == []
        await session.execute(ONE)
        held = only(db)
    line = re.compile(HERE + r"test_a_session_is_named\w+\(\)")
    assert line.fullmatch(held.holder)
    assert line.fullmatch(held.place)
    assert re.fullmatch(HERE + r"only\(\)", held.now_at)
    assert int(held.holder.split(":")[1].split()[0]) + 2 == int(held.place.split(":")[1].split()[0])


async def test_a_connection_outside_any_unit_is_named_by_its_task_and_line(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async def work(db: Database[Any]) -> Holding:
        async with db.connect():
            return only(db)

    async with make(fresh_database, driver) as db:
        held = await asyncio.create_task(work(db), name="the nightly report")
    assert held.holder == "the nightly report"
    assert re.fullmatch(HERE + r".*work\(\)", held.place)


async def test_a_session_of_the_users_own_making_is_named_by_the_line_that_asked(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver) as db, db.session_factory() as session:
        await session.execute(ONE)
        held = only(db)
        account = session.sync_session.guard.account
    assert held.holder == "a session of your own making"
    assert re.fullmatch(HERE + r"test_a_session_of_the_users\w+\(\)", held.place)
    assert re.fullmatch(HERE + r"test_a_session_of_the_users\w+\(\)", str(account.place))


async def test_a_unit_pays_for_all_its_checkouts_and_no_other_unit_does(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver) as db, db.reader() as first, db.reader() as second:
        accounts = [session.sync_session.guard.account for session in (first, second)]
        for _ in range(3):
            await first.execute(ONE)
        async with db.connect() as connection:
            await connection.execute(ONE)
        await second.execute(PAUSE)
    assert [account.statements for account in accounts] == [3, 1]
    assert accounts[1].sql_time >= 0.2 > accounts[0].sql_time > 0
    assert accounts[1].held >= accounts[1].sql_time
    assert accounts[0].held >= accounts[0].sql_time


async def test_a_wait_is_on_the_account_of_whoever_waited(fresh_database: FreshDatabase, driver: str) -> None:
    async with make(fresh_database, driver, pool_size=1) as db:
        held, go_on = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with db.connect():
                held.set()
                await go_on.wait()

        holding = asyncio.create_task(hold())
        await held.wait()
        async with db.session() as session:
            began = time.monotonic()
            waiting = asyncio.create_task(session.execute(ONE))
            while not db.stats().waiting:  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.1, go_on.set)
            await waiting
            waited = time.monotonic() - began
            account = session.sync_session.guard.account
        await holding
        assert 0.1 <= account.waited <= waited


async def test_all_pools_of_a_database_tell_their_holders(fresh_database: FreshDatabase, driver: str) -> None:
    async with make(fresh_database, driver, reader_pool_size=1) as db:
        async with db.reader_engine.connect(), db.connect():
            holdings = db.holdings()
        assert len(holdings) == 2
        assert holdings[0].held >= holdings[1].held
        assert db.holdings() == []


async def test_of_a_foreign_pool_nobody_knows_the_holders(fresh_database: FreshDatabase, driver: str) -> None:
    engine = create_async_engine(fresh_database.url(driver))
    async with Database(engine, adopt=False) as db, db.session() as session:
        await session.execute(ONE)
        assert db.holdings() == []
    await engine.dispose()


# Of that, SQL -----------------------------------------------------------------------------------------------


async def test_sql_time_is_the_time_of_statements_and_grows_while_one_runs(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver) as db, db.session() as session:
        running = asyncio.create_task(session.execute(text("SELECT pg_sleep(0.4)")))
        await until(fresh_database, PAUSED, fresh_database.name)
        during = only(db)
        await running
        await asyncio.sleep(0.1)  # it holds on, and does nothing with it
        after = only(db)
    assert (during.state, after.state) == ("running SQL", "in use, no SQL running")
    assert 0 < during.sql_time <= during.held
    assert 0.4 <= after.sql_time <= after.held - 0.1
    assert after.statements == 1


async def test_a_statement_that_fails_or_is_cancelled_has_taken_its_time_too(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver) as db, db.session() as session:
        with pytest.raises(Exception, match="22012"):
            await session.execute(text("SELECT 1 / 0"))
        await session.rollback()
        running = asyncio.create_task(session.execute(text("SELECT pg_sleep(30)")))
        await until(fresh_database, PAUSED, fresh_database.name)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        account = session.sync_session.guard.account
        assert account.statements == 2
        assert account.sql_time > 0
        assert all(held.state != "running SQL" for held in db.holdings())


async def test_commit_counts_as_time_and_not_as_a_statement(
    fresh_database: FreshDatabase, driver: str
) -> None:
    await fresh_database.execute("CREATE TABLE slow (id int)")
    await fresh_database.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$"
    )
    await fresh_database.execute(
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION wait()"
    )
    async with make(fresh_database, driver) as db, db.session() as session:
        await session.execute(text("INSERT INTO slow VALUES (1)"))
        account = session.sync_session.guard.account
        before = account.sql_time
        committing = asyncio.create_task(session.commit())
        await until(fresh_database, PAUSED.replace("pg_sleep", "COMMIT"), fresh_database.name)
        assert only(db).state == "running SQL"
        await committing
    assert account.sql_time - before >= 0.3
    assert account.statements == 1


# Complaints -------------------------------------------------------------------------------------------------


async def exhausted(db: Database[Any]) -> PoolExhausted:
    with pytest.raises(PoolExhausted) as caught:
        async with db.connect():
            pass
    return caught.value


async def test_exhaustion_names_an_idle_holder_and_how_to_free_it(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver, pool_size=1, pool_timeout=0.2) as db, db.session() as session:
        await session.execute(ONE)
        error = await exhausted(db)
    here = HERE + r"\w+\(\)"
    assert re.search(
        rf"\n  held longest: {here}, {here}, 0\.\d\d s, of which SQL 0\.\d{{3}} s; now at {HERE}exhausted\(\)$",
        error.what,
    )
    assert "(in_use 1 of 1, waiting 1)" in error.what
    assert error.remedies[0] == "Whoever asks holds one already: use that session, or end it first."
    assert error.remedies[1].endswith("Release first: await release(session).")


async def test_exhaustion_names_the_statement_that_runs_by_its_shape(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver, pool_size=1, pool_timeout=0.2) as db, db.session() as session:
        running = asyncio.create_task(session.execute(text("SELECT pg_sleep(30), 'secret'")))
        await until(fresh_database, PAUSED, fresh_database.name)
        error = await exhausted(db)
        running.cancel()
        await asyncio.wait([running])
    assert "SELECT pg_sleep(?), ?" in error.remedies[0]
    assert "secret" not in str(error)


async def test_without_tracking_the_task_alone_is_named(fresh_database: FreshDatabase, driver: str) -> None:
    async def hold(db: Database[Any], held: asyncio.Event) -> None:
        async with db.connect():
            held.set()
            await asyncio.Event().wait()

    settings: dict[str, Any] = {"track_holders": False, "pool_size": 1, "pool_timeout": 0.1}
    async with make(fresh_database, driver, **settings) as db:
        held = asyncio.Event()
        holding = asyncio.create_task(hold(db, held), name="the nightly report")
        await held.wait()
        error = await exhausted(db)
        assert only(db).place == str(NOWHERE)
        holding.cancel()
        await asyncio.wait([holding])
    told = error.what.splitlines()[1]
    assert re.fullmatch(rf"  held longest: the nightly report, 0\.\d\d s; now at {HERE}.*hold\(\)", told), (
        told
    )


async def test_who_calls_inside_a_transaction_is_told_which(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async def nothing(_session: object) -> None:
        pass

    async with make(fresh_database, driver) as db, db.session() as session:
        await session.execute(ONE)
        with pytest.raises(InsideTransaction, match=rf"{HERE}\w+\(\), \d\.\d\d s, of which SQL"):
            await db.run_transaction(nothing)


async def test_a_holder_whose_connection_is_severed_at_the_end_is_told_with_its_line(
    fresh_database: FreshDatabase, driver: str
) -> None:
    events: list[Event] = []
    db = make(fresh_database, driver, drain_timeout=0.05)
    db.observe(events.append)
    await db.open()
    async with db.engine.connect() as connection:
        await connection.execute(ONE)
        await db.close()
    (held,) = [each for each in events if isinstance(each, StillHeld)]
    assert re.fullmatch(HERE + r"test_a_holder_whose\w+\(\)", held.place)
    assert 0 < held.sql_time < held.held


ROUTE, LINE, NOW = Account("GET /report"), Place("/app/reports.py", 50, "build"), 1000.0


def checkout(**facts: Any) -> Checkout:
    entry = Checkout(None, NOW - 60, ROUTE, LINE)
    for name, value in facts.items():
        setattr(entry, name, value)
    return entry


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"sql_time": 0.01}, "await release(session)"),
        ({"sql_time": 0.01, "account": None}, "End its block"),
        (
            {"running_since": NOW - 40, "statement": "SELECT * FROM a WHERE b = 'x'"},
            "SELECT * FROM a WHERE b = ?",
        ),
        ({"sql_time": 50.0, "statements": 500}, "500 statements"),
        ({"sql_time": 50.0, "statements": 3}, "shorter"),
        ({"place": NOWHERE}, "Look at who holds longest"),
    ],
)
def test_the_remedy_is_the_one_for_what_the_longest_holder_does(facts: dict[str, Any], word: str) -> None:
    assert word in remedies_for([checkout(**facts)], NOW)[0]


async def test_the_remedy_for_a_holder_that_is_gone_is_to_close() -> None:
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    assert "is gone" in remedies_for([checkout(task=task)], NOW)[0]


def test_the_text_is_the_one_of_the_design() -> None:
    held = checkout(sql_time=0.014)
    assert lines_of([held, held], NOW) == (
        "\n  held longest: GET /report, reports.py:50 in build(), 60.00 s, of which SQL 0.014 s"
        "\n  then: GET /report, reports.py:50 in build(), 60.00 s, of which SQL 0.014 s"
    )
    assert lines_of([held] * 9, NOW).count("\n") == 3
    assert (lines_of([], NOW), remedies_for([], NOW)) == ("", [])


# The line of user code --------------------------------------------------------------------------------------


async def test_what_runs_the_event_loop_has_asked_for_nothing() -> None:
    """A task of a library's, with none of the user's code in it, was begun by nobody that could be named."""
    place = await asyncio.create_task(
        asyncio.to_thread(len, "")
    )  # a loop that is busy with more than this test
    assert place == 0
    namespace: dict[str, Any] = {"place_of_caller": place_of_caller}
    exec(  # a library's code, by its file name
        compile("async def work():\n    return place_of_caller()\n", "/x/site-packages/work.py", "exec"),
        namespace,
    )
    assert await asyncio.create_task(namespace["work"]()) is NOWHERE
    assert (await namespace["work"]()).function.startswith("test_what_runs")


async def test_the_line_that_asked_is_named_through_whatever_sqlalchemy_runs_in_between(
    fresh_database: FreshDatabase, driver: str
) -> None:
    def read(session: Any) -> str:
        session.execute(ONE)
        return only(db).place

    async with make(fresh_database, driver) as db:
        async with db.session() as session:
            await session.execute(ONE)
            assert re.fullmatch(HERE + r"test_the_line_that_asked\w+\(\)", only(db).place)
        async with db.session() as session:
            # What the user has put into the greenlet himself is nearer than who has put it there.
            assert re.fullmatch(HERE + r".*read\(\)", await session.run_sync(read))
        async with db.session() as session:
            assert re.fullmatch(HERE + r"asked\(\)", await asked(db, session))
        async with db.engine.connect():
            assert re.fullmatch(HERE + r"test_the_line_that_asked\w+\(\)", only(db).place)


async def asked(db: Database[Any], session: Any) -> str:
    await session.execute(ONE)
    return only(db).place


# What it costs ----------------------------------------------------------------------------------------------


async def calls_per_checkout(db: Database[Any]) -> float:
    """Function calls of a checkout and return, counted: no clock is asked, so no busy machine can blur it."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    async def times(number: int) -> int:
        nonlocal calls
        calls = 0
        sys.setprofile(count)
        try:
            for _ in range(number):
                async with db.engine.connect():
                    pass
        finally:
            sys.setprofile(None)
        return calls

    await times(3)
    return (await times(20) - await times(10)) / 10


async def test_a_checkout_costs_what_its_settings_ask_for(
    fresh_database: FreshDatabase, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 µs are what some 250 calls take; see ``bench/cases/instruments.py`` for the time itself."""
    off: dict[str, Any] = {"track_holders": False, "leak_after": None}
    async with (
        make(fresh_database, driver, **off) as without,
        make(fresh_database, driver) as with_it,
        make(fresh_database, driver) as measured,
    ):
        measured.measure()
        bare, on, everything = [await calls_per_checkout(db) for db in (without, with_it, measured)]
        monkeypatch.setattr("stanch.pool.paying", _Nobody)
        await calls_per_checkout(without)
    print(f"{driver}: {bare} calls off, {on} on, {everything} measured")
    assert on - bare <= 60
    assert everything - bare <= 75


class _Nobody:
    @staticmethod
    def get() -> None:
        return None


async def test_with_everything_off_nothing_is_timed_and_nobody_looks(
    fresh_database: FreshDatabase, driver: str
) -> None:
    off: dict[str, Any] = {"track_holders": False, "leak_after": None}
    async with make(fresh_database, driver, **off) as db, db.session() as session:
        await session.execute(ONE)
        account = session.sync_session.guard.account
        assert (account.statements, account.sql_time, account.shapes) == (0, 0.0, None)
        pool: Any = db.engine.sync_engine.pool
        assert pool._sweep is None


async def test_who_measures_has_statements_timed_also_without_tracking(
    fresh_database: FreshDatabase, driver: str
) -> None:
    heard: list[str] = []

    class Listening(Meter):
        def executed(self, statement: str, *_rest: Any, **_words: Any) -> None:
            heard.append(statement)

    async with make(fresh_database, driver, track_holders=False) as db:
        async with db.session() as session:
            await session.execute(ONE)
        db.meter(Listening())
        async with db.session() as session:
            await session.execute(ONE)
    assert heard == ["SELECT 1"]


def test_limits_that_need_tracking_are_refused_without_it() -> None:
    with pytest.raises(ConfigError, match="slow_statement needs to know what holders do"):
        Database("sqlite+aiosqlite://", track_holders=False, slow_statement=1.0)
