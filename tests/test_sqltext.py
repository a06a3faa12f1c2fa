"""What a reader may say, by its words: attacks are refused, the innocent pass, and PostgreSQL itself is the judge."""

from __future__ import annotations

import random
import re
import time
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from stanch.session_state import session_state_of
from stanch.sqltext import is_plain_reading, objection_to_reading
from tests.support.judge import raw_connect

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.support.judge import FreshDatabase, RawConnection

asyncpg = import_module("asyncpg")  # it ships no types

ATTACKS = [
    # other statements
    "INSERT INTO t VALUES (1)",
    "update t set a = 1",
    "DELETE FROM t",
    "MERGE INTO t USING u ON true WHEN MATCHED THEN DELETE",
    "TRUNCATE t",
    "DROP TABLE t",
    "ALTER TABLE t ADD b int",
    "CREATE TEMP TABLE x AS SELECT 1",
    "SET search_path = evil",
    "RESET ALL",
    "BEGIN",
    "COMMIT",
    "SAVEPOINT s",
    "LOCK TABLE t",
    "CALL p()",
    "DO $$ BEGIN DELETE FROM t; END $$",
    "COPY t FROM PROGRAM 'id'",
    "COPY (SELECT 1) TO '/tmp/x'",
    "EXECUTE plan",
    "PREPARE plan AS DELETE FROM t",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "FETCH c",
    "LISTEN c",
    "NOTIFY c",
    "EXPLAIN ANALYZE DELETE FROM t",
    "EXPLAIN ANALYZE SELECT nextval('s')",
    "REFRESH MATERIALIZED VIEW v",
    "VACUUM",
    "IMPORT FOREIGN SCHEMA x FROM SERVER y INTO z",
    "",
    " -- only a comment",
    "/* SELECT 1 */ DELETE FROM t",
    "-- SELECT 1\rDELETE FROM t",
    "((DELETE FROM t))",
    # hidden in a reading one
    "SELECT 1; DROP TABLE t",
    "SELECT 1;;",
    "SELECT 1;/**/DELETE FROM t",
    "SELECT 'a;'; DELETE FROM t",
    "WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x",
    "WITH x AS MATERIALIZED (DELETE/* */FROM t RETURNING *) TABLE x",
    "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
    "WITH x AS (WITH y AS (UPDATE t SET a = 2 RETURNING *) SELECT * FROM y) SELECT * FROM x",
    "SELECT * INTO copy FROM t",
    "SELECT 1\nINTO\tTEMP copy",
    "SELECT * FROM t FOR UPDATE",
    "TABLE t FOR UPDATE",
    "SELECT * FROM t FOR NO KEY UPDATE SKIP LOCKED",
    "SELECT * FROM t FOR /* x */ SHARE",
    "SELECT * FROM t FOR KEY SHARE OF t",
    "SELECT * FROM (SELECT * FROM t FOR\nUPDATE) AS x",
    # functions that write
    "SELECT nextval('s')",
    "SELECT nextval /* a */ -- b\n ('s')",
    "VALUES (nextval('s'))",
    "TABLE t ORDER BY nextval('s')",
    "SELECT pg_catalog.nextval('s')",
    "SELECT \"nextval\"('s')",
    'SELECT "pg_catalog" . "nextval" (\'s\')',
    "SELECT U&\"n\\0065xtval\"('s')",
    "SELECT u&\"!006eextval\" UESCAPE '!' ('s')",
    "SELECT NeXtVaL('s')",
    "SELECT setval('s', 10)",
    "SELECT set_config('role', 'admin', false)",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_xact_lock_shared(1)",
    "SELECT pg_advisory_unlock_all()",
    "SELECT pg_notify('c', 'x')",
    "SELECT setseed(0.5)",
    "SELECT lo_create(0)",
    "SELECT lowrite(0, 'x')",
    "SELECT pg_terminate_backend(1)",
    "SELECT pg_stat_reset()",
    "SELECT pg_drop_replication_slot('x')",
    "SELECT query_to_xml('select nextval(''s'')', true, true, '')",
    "SELECT * FROM dblink('', 'delete from t') AS x(a int)",
    "SELECT * FROM ts_stat('select nextval(''s'')::text::tsvector')",
    # quotes and comments that do not end where it seems
    "SELECT E'\\'' || nextval('s') || ''",
    "SELECT E'\\\\' || nextval('s') || '\\'",
    "SELECT e'a'\n'\\' ' || nextval('s') || ' '",
    "SELECT e'a' -- ' \n '\\' ' || nextval('s') || ' '",
    "SELECT 'a\\' || nextval('s') || 'b'",
    "SELECT U&'\\' || nextval('s') || ''",
    "SELECT x.e'' FROM x; DELETE FROM t",
    "SELECT $a$ $b$ $a$ || nextval('s') || $b$ $b$",
    "SELECT $$ $ $$ || nextval('s') || $$ $$",
    "SELECT a$b$ , nextval('s') , a$b$ FROM t",
    "SELECT ä$b$ , nextval('s') , ä$b$ FROM t",
    "SELECT $$ $:x || nextval('s') --$$",
    "SELECT $$ $%(x)s || nextval('s') --$$",
    "SELECT %(x)s$a$ b $a$ , nextval('s') --$a$",
    "SELECT :x$a$ b $a$ , nextval('s') --$a$",
    "SELECT 1 -- x\r , nextval('s')",
    "SELECT /* /* */ 1 -- */ */ , nextval('s')\n , nextval('s')",
    "SELECT 1 /*/**/*/, nextval('s') --*/",
    'SELECT "a""/*" , nextval(\'s\') AS "*/"',
    "SELECT 1 AS \"--\" , nextval('s')",
    "SELECT '--' , nextval('s')",
    "SELECT 1 +/*/*+*/*/ nextval('s')",
    "SELECT 'unterminated",
    'SELECT "unterminated',
    "SELECT $x$ unterminated $y$",
    "SELECT E'unterminated\\'",
    "SELECT 1 /* unterminated /* */",
    # characters
    "SELECT 1\0",
    "SELECT 1\0; DELETE FROM t",
    "DELETE\u00a0FROM t",
    "\ufeffSELECT 1",
    "SELECT 1;\u2003DELETE FROM t",
    "SHOW search_path; DELETE FROM t",
    "SHOW search_path INTO x",
]

INNOCENT = [
    "SELECT 1",
    "select 1;",
    "SELECT 1 ; -- done",
    "  (SELECT 1) UNION ALL (SELECT 2)",
    "((SELECT 1))",
    "/* delete */ SELECT 1",
    "-- update\nSELECT 1",
    "SELECT 1 /* for /* update */ nextval() */",
    "SELECT 'insert into t'",
    "SELECT 'it''s nextval(''s'')'",
    "SELECT E'\\'; DELETE FROM t; --'",
    "SELECT e'a'\n' \\'nextval() '",
    "SELECT $$nextval('s')$$",
    "SELECT $q$ $$ delete from t $$ $q$",
    "SELECT U&'\\0064elete'",
    "SELECT B'101', X'ff', N'update'",
    'SELECT "update" FROM (SELECT 1 AS "update") AS t',
    'SELECT "for update", "nextval" FROM (SELECT 1 AS "for update", 2 AS "nextval") AS t',
    "SELECT nextval FROM (SELECT 1 AS nextval) AS t",
    "SELECT share, key, no FROM (SELECT 1 AS share, 2 AS key, 3 AS no) AS t",
    "SELECT inserted, update_at, setting FROM (VALUES (1, 2, 3)) AS t(inserted, update_at, setting)",
    "SELECT 1 AS a$update$b",
    "SELECT 1 AS äupdate",
    "SELECT substring('abc' FROM 1 FOR 2)",
    "SELECT 1 - -1, 4 / 2, 3 * (2), 7 % 3",
    "SELECT '{\"a\": 1}'::jsonb -> 'a' ? 'b'",
    "SELECT (ARRAY[1, 2])[1], ARRAY['delete'] @> ARRAY['x']",
    "SELECT currval_ FROM (SELECT 1 AS currval_) AS t",
    "SELECT count(*) FILTER (WHERE true) OVER (ROWS UNBOUNDED PRECEDING) FROM pg_class",
    "SELECT CASE WHEN true THEN 'update' ELSE 'set' END",
    "SELECT current_setting('search_path'), now(), pg_backend_pid()",
    "SELECT * FROM pg_replication_slots",
    "SELECT * FROM pg_locks, pg_settings LIMIT 1",
    "SELECT pg_current_xact_id_if_assigned()",
    "SELECT * FROM information_schema.tables FETCH FIRST 1 ROWS ONLY",
    "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT * FROM n",
    'WITH "delete" AS (SELECT 1) TABLE "delete"',
    "VALUES (1, 'insert'), (2, 'lock')",
    "TABLE pg_class",
    "SHOW search_path",
    "show all",
    "SELECT * FROM generate_series(1, 3) AS g(i) GROUP BY GROUPING SETS ((i), ())",
    "SELECT 0x1F, 1e5, 1.5, .5",
    "SELECT 'a' -- '\n'b'",
    "SELECT\f1\v",
]


@pytest.mark.parametrize("sql", ATTACKS)
def test_what_writes_is_refused_wherever_it_hides(sql: str) -> None:
    assert objection_to_reading(sql) is not None
    assert not is_plain_reading(sql)


@pytest.mark.parametrize("sql", INNOCENT)
def test_what_only_looks_like_a_write_is_accepted(sql: str) -> None:
    assert objection_to_reading(sql) is None


def test_a_first_word_that_is_no_command_is_not_repeated() -> None:
    assert objection_to_reading("hunter2 is my password") == "no statement that is known"
    assert objection_to_reading("drop table t") == "DROP"


@pytest.mark.parametrize(
    "piece", ["-", "--", "--\n", "''", "'", "\\'", "$", "$a$", '"', "/*", "*/", "(", " \n", "a"]
)
def test_a_long_text_is_read_in_time_that_grows_with_its_length(piece: str) -> None:
    """Not twice as long for each character more."""
    begun = time.monotonic()
    for start in ("SELECT ", "SELECT E'a'", "SELECT E'a'\n", "SELECT '", "SELECT $b$", "SELECT /*"):
        objection_to_reading(start + piece * 2000)
        session_state_of(start + piece * 2000 + " set")
    assert time.monotonic() - begun < 5


# PostgreSQL as the judge ----------------------------------------------------------------------------------

EFFECTS = [
    "nextval('s')",
    "\"setval\"('s', 9)",
    "pg_advisory_lock(7)",
    "set_config('stanch.x', 'set', false)",
]
MISLEADING = [
    "'",
    "''",
    "\\",
    '"',
    "$$",
    "$a$",
    "$",
    "/*",
    "*/",
    "--",
    "\n",
    ";",
    "x",
    " ",
    "E'",
    *EFFECTS,
    "DELETE FROM t",
]


class Sentinel:
    """A session that may only read, and whose server tells what was done in spite of that."""

    def __init__(self, connection: RawConnection) -> None:
        self._connection = connection
        self.done = 0
        self.no_sql: list[str] = []

    async def harm_of(self, sql: str) -> str | None:
        """Execute *sql* as a simple query, several statements if it holds several; what it did or tried to do."""
        try:
            await self._connection.execute(sql)
        except asyncpg.ReadOnlySQLTransactionError:
            return "refused by the server as a write"
        except asyncpg.PostgresError:
            self.no_sql.append(sql)
            return None
        self.done += 1
        left = await self._connection.fetchval(
            "SELECT concat_ws(' ', (SELECT 'a lock' FROM pg_locks WHERE locktype = 'advisory' LIMIT 1),"
            " (SELECT 'the sequence' FROM s WHERE is_called), (SELECT 'a row gone' FROM t HAVING count(*) <> 1),"
            " (SELECT 'a setting' WHERE current_setting('stanch.x', true) <> ''))"
        )
        return left or None


@asynccontextmanager
async def sentinel(judged: FreshDatabase) -> AsyncGenerator[Sentinel]:
    await judged.execute("CREATE SEQUENCE s; CREATE TABLE t AS SELECT 1 AS a")
    connection = await raw_connect(judged.url(None))
    try:
        await connection.execute("SET default_transaction_read_only = on")
        yield Sentinel(connection)
    finally:
        await connection.close()


@pytest.mark.anyio
async def test_the_server_agrees_about_the_innocent(fresh_database: FreshDatabase) -> None:
    async with sentinel(fresh_database) as server:
        harm = {sql: harm for sql in INNOCENT if (harm := await server.harm_of(sql)) is not None}
    assert not harm
    assert not server.no_sql


HARMLESS = re.compile(
    r"""
      pg_stat_(get|have|file|clear|force)\w* | pg_(ls|read|current|last|control|get|partition)_\w+
    | pg_\w*(size|_wal_summaries|_is_blocked|blocking_pids|_version|_mappings|_file_rules|_status|_value)
    | pg_is_\w*(_paused|_recovery)
    | pg_(jit_available|show_all_file_settings|prepared_xact|notification_queue_usage|wal_summary_contents)
    | pg_(sleep|xact_commit_timestamp|show_replication_origin_status)\w*
    | amvalidate | array_(sample|shuffle) | random(_normal)? | gen_random_uuid | uuidv[47] | clock_timestamp | timeofday
    | current_query | currval | lastval | currtid2 | txid_status
    | \w+(handler|validator) | bernoulli | system
    """,
    re.VERBOSE,
)
"""Looked at one by one: they tell something about the server, or give another value each time."""


@pytest.mark.anyio
async def test_each_volatile_function_of_the_server_is_refused_or_known_to_be_harmless(
    fresh_database: FreshDatabase,
) -> None:
    rows = await fresh_database.fetch(
        "SELECT DISTINCT proname::text FROM pg_proc WHERE provolatile = 'v'"
        " AND pronamespace = 'pg_catalog'::regnamespace"
        " AND prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype, 'internal'::regtype)"
    )
    volatile = {str(row[0]) for row in rows}
    accepted = {name for name in volatile if objection_to_reading(f"SELECT {name}(1)") is None}
    assert {name for name in accepted if not HARMLESS.fullmatch(name)} == set()
    assert len(volatile - accepted) > 80


def quoted(draw: random.Random) -> str:
    """A string constant, an identifier or a comment, whose content looks like anything but ends where it should."""
    content = "".join(draw.choices(MISLEADING, k=draw.randint(0, 6)))
    doubled = content.replace("'", "''")
    tag = draw.choice(["", "a", "ä1", "nextval"])
    comment = content.replace("/*", "").replace("*/", "")
    match draw.randrange(7):
        case 0:
            return f"'{doubled}'"
        case 1:
            return (
                draw.choice("eE")
                + "'"
                + content.replace("\\", "\\\\").replace("'", draw.choice(["''", "\\'"]))
                + "'"
            )
        case 2:
            return f"$b{tag}$" + content.replace("$", "") + f"$b{tag}$"
        case 3:
            return '1 AS "x' + content.replace('"', '""') + '"'
        case 4:
            return f"/*{comment}/*{comment}*/{comment}*/ 1"
        case 5:
            return f"1 --{content}".replace("\n", "") + "\n"
        case _:
            return f"E'a'\n'{doubled.replace(chr(92), chr(92) * 2)}'"


@pytest.mark.anyio
async def test_random_quoting_hides_no_effect_and_makes_none_up(fresh_database: FreshDatabase) -> None:
    draw = random.Random(20261122)
    refused = 0
    async with sentinel(fresh_database) as server:
        for _ in range(3000):
            items = [quoted(draw) for _ in range(draw.randint(1, 4))]
            effect = draw.random() < 0.3
            if effect:
                items.insert(draw.randint(0, len(items)), draw.choice(EFFECTS))
            sql = "SELECT " + ", ".join(items)
            objection = objection_to_reading(sql)
            assert (objection is not None) == effect, (sql, objection)
            if effect:
                refused += 1
            else:
                assert await server.harm_of(sql) is None, sql
    assert refused > 500
    assert server.done > 1500


@pytest.mark.anyio
async def test_random_pieces_of_sql_that_are_accepted_do_no_harm(fresh_database: FreshDatabase) -> None:
    """Most of this is no SQL at all; what is, and is accepted, is executed."""
    draw = random.Random(25006)
    pieces = [
        *MISLEADING,
        *MISLEADING,
        *EFFECTS,
        "SELECT",
        " , ",
        "||",
        "1",
        "'x'",
        "\\'",
        "e'",
        "E'\\'",
        "'\n'",
        "AS",
        "y",
    ]
    accepted = 0
    async with sentinel(fresh_database) as server:
        for _ in range(20_000):
            sql = "SELECT '' " + "".join(draw.choices(pieces, k=draw.randint(1, 9)))
            if objection_to_reading(sql) is None:
                accepted += 1
                assert await server.harm_of(sql) is None, sql
    assert accepted > 1000
    assert server.done > 300
