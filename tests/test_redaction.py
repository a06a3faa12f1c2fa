"""No value of a row, a parameter or a URL is in any text of an error; what it means is still there."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import Integer, String, TypeDecorator, bindparam, cast, literal, text
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.types import Enum as EnumType, Numeric

from stanch import Database, Kind, classify
from stanch.redaction import redact
from stanch.sqlstate import sqlstate_of
from tests.support import cleaned
from tests.support.judge import FreshDatabase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database


def marker() -> str:
    """A text that stands nowhere else."""
    return f"secret{uuid4().hex[:12]}"


def everything_of(error: BaseException) -> str:
    """What a log, a debug page or a careless handler could show of *error*."""
    parts = ["".join(traceback.format_exception(error))]
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        link = pending.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        parts += [str(link), repr(link), repr(link.args), repr(getattr(link, "__notes__", None))]
        parts += [str(getattr(link, name, "")) for name in ("detail", "hint", "message", "context", "query")]
        pending += [link.__cause__, link.__context__, getattr(link, "orig", None)]
    return "\n".join(parts)


class Colour(Enum):
    RED = "red"


class Phone(TypeDecorator[str]):
    """A type of the user's, which quotes what it refuses."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str:
        raise ValueError(f"not a phone number: {value}")


Case = Callable[[AsyncConnection, str], Awaitable[object]]


def sql(statement: str) -> Case:
    """The case of one statement with the marker as ``:value``."""
    return lambda connection, secret: connection.execute(text(statement), {"value": secret})


CASES: dict[str, tuple[Kind, Case]] = {
    "unique": (Kind.CONFLICT, sql("INSERT INTO things (name) VALUES (:value), (:value)")),
    "foreign key": (Kind.CONFLICT, sql("INSERT INTO refs VALUES (:value)")),
    "exclusion": (Kind.CONFLICT, sql("INSERT INTO apart VALUES (:value), (:value)")),
    "not null": (Kind.INVALID, sql("INSERT INTO things (name, size) VALUES (:value, NULL)")),
    "check": (Kind.INVALID, sql("INSERT INTO things (name, size) VALUES (:value, -1)")),
    "too long": (Kind.INVALID, sql("INSERT INTO short VALUES (:value)")),
    "cast to int": (Kind.INVALID, sql("SELECT CAST(CAST(:value AS text) AS int)")),
    "cast to date": (Kind.INVALID, sql("SELECT CAST(CAST(:value AS text) AS date)")),
    "enum input": (Kind.INVALID, sql("SELECT CAST(CAST(:value AS text) AS mood)")),
    "uuid input": (Kind.INVALID, sql("SELECT CAST(CAST(:value AS text) AS uuid)")),
    "json input": (Kind.INVALID, sql("SELECT CAST(CAST(:value AS text) AS jsonb)")),
    "in a function": (Kind.INVALID, sql("SELECT parse(:value)")),
    "regex": (Kind.PROGRAMMING, sql("SELECT 'x' ~ (CAST(:value AS text) || '(')")),
}


@pytest.fixture
async def things(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute(
        """
        CREATE TABLE things (name text PRIMARY KEY, size int NOT NULL DEFAULT 1 CHECK (size > 0));
        CREATE TABLE refs (name text REFERENCES things);
        CREATE TABLE apart (name text, EXCLUDE USING btree (name WITH =));
        CREATE TABLE short (name varchar(3));
        DROP TYPE IF EXISTS mood; CREATE TYPE mood AS ENUM ('good');
        CREATE OR REPLACE FUNCTION parse(t text) RETURNS int LANGUAGE plpgsql AS
            $$ BEGIN EXECUTE 'SELECT ''' || t || '''::int'; RETURN 1; END $$;
        """
    )
    return fresh_database


@pytest.fixture
async def db(things: FreshDatabase, driver: str) -> AsyncIterator[Database[Any]]:
    async with Database(things.url(driver), pool_size=2, max_overflow=0) as db:
        yield db


@pytest.mark.parametrize("case", CASES)
async def test_error_of_the_server_quotes_no_value_and_keeps_its_meaning(
    db: Database[Any], case: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, provoke = CASES[case]
    secret = marker()
    caplog.set_level(logging.DEBUG, "stanch")
    with pytest.raises(DBAPIError) as caught:
        async with db.begin() as connection:
            await provoke(connection, secret)
    assert secret not in everything_of(caught.value)
    assert secret not in caplog.text
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is kind
    assert sqlstate_of(caught.value) is not None


@pytest.mark.parametrize("case", ["unique", "not null", "cast to int"])
async def test_error_of_a_flush_or_a_commit_quotes_no_value(db: Database[Any], case: str) -> None:
    secret = marker()
    with pytest.raises(DBAPIError) as caught:
        async with db.transaction() as session:
            await CASES[case][1](await session.connection(), secret)
    assert secret not in everything_of(caught.value)


ARGUMENTS: dict[str, Callable[[str], Any]] = {
    "text for an int": lambda secret: (
        cast(bindparam("value", secret, type_=String()), Integer) + literal(secret, Integer())
    ),
    "text for a decimal": lambda secret: literal(secret, Numeric()),
    "text for a uuid": lambda secret: literal(secret, UUID(as_uuid=False)),
    "unknown member of an enum": lambda secret: literal(secret, EnumType(Colour, validate_strings=True)),
    "value a type of the user's refuses": lambda secret: literal(secret, Phone()),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
async def test_argument_refused_before_it_is_sent_is_not_quoted(db: Database[Any], argument: str) -> None:
    """asyncpg, psycopg and SQLAlchemy's own types quote the value that they cannot encode, and chain what could not."""
    from sqlalchemy import select

    secret = marker()
    with pytest.raises(SQLAlchemyError) as caught:
        async with db.connect() as connection:
            await connection.execute(select(ARGUMENTS[argument](secret)))
    told = everything_of(caught.value)
    assert secret not in told
    assert str(caught.value), "it can still be shown"


async def test_error_with_many_rows_quotes_none(db: Database[Any]) -> None:
    secrets = [marker() for _ in range(5)]
    with pytest.raises(DBAPIError) as caught:
        async with db.begin() as connection:
            await connection.execute(
                text("INSERT INTO things (name, size) VALUES (:name, :size)"),
                [{"name": secret, "size": 1 - number} for number, secret in enumerate(secrets)],
            )
    told = everything_of(caught.value)
    assert not [secret for secret in secrets if secret in told]


async def test_error_under_way_of_the_app_is_not_touched(db: Database[Any]) -> None:
    """What the app itself was handling keeps its words, although it is in the chain."""
    with pytest.raises(DBAPIError) as caught:
        async with db.begin() as connection:
            try:
                raise ValueError("the app's own words")
            except ValueError:
                await connection.execute(text("SELECT 1 / 0"))
    mine = caught.value.__context__
    while mine is not None and not isinstance(mine, ValueError):
        mine = mine.__context__
    assert str(mine) == "the app's own words"


async def test_password_of_the_url_is_nowhere(things: FreshDatabase, driver: str) -> None:
    secret = marker()
    url = things.url(driver)
    password = url.split("://")[1].split("@")[0].split(":")[1]
    db: Database[Any] = Database(url.replace(password, secret), connect_timeout=3)
    with pytest.raises(SQLAlchemyError) as caught:
        async with db.connect():
            pass
    assert secret not in everything_of(caught.value) + repr(db) + repr(db.settings) + repr(db.engine)
    assert secret not in repr(db.engine.sync_engine.pool) + db.engine.sync_engine.pool.status()


async def test_adopted_engine_may_choose_to_show_parameters(things: FreshDatabase, driver: str) -> None:
    secret = marker()
    engine = create_async_engine(things.url(driver))
    async with Database(engine, hide_parameters=False) as db:
        with pytest.raises(DBAPIError) as caught:
            async with db.begin() as connection:
                await CASES["unique"][1](connection, secret)
        assert secret in str(caught.value)


async def test_sqlite_quotes_no_value_either(tmp_path: Path) -> None:
    secret = marker()
    async with Database(f"sqlite+aiosqlite:///{tmp_path}/things.db") as db:
        async with db.begin() as connection:
            await connection.execute(
                text("CREATE TABLE things (name TEXT PRIMARY KEY, size INT CHECK (size > 0))")
            )
        for statement in (
            "INSERT INTO things VALUES (:value, 1), (:value, 1)",
            "INSERT INTO things VALUES (:value, -1)",
            "SELECT json_extract(:value, '$.x')",
            "SELECT nope FROM things WHERE name = :value",
        ):
            with pytest.raises(DBAPIError) as caught:
                async with db.begin() as connection:
                    await connection.execute(text(statement), {"value": secret})
            assert secret not in everything_of(caught.value)


def test_statement_error_can_still_be_shown() -> None:
    error = StatementError(
        "(builtins.ValueError) not a number: 42", "SELECT :x", {"x": 42}, ValueError("not a number: 42")
    )
    redact(error)
    assert "42" not in everything_of(error)
    assert "SELECT :x" in str(error)


def test_error_of_nobody_we_know_is_left_alone() -> None:
    error = LookupError("mine: 42")
    redact(error)
    assert error.args == ("mine: 42",)
