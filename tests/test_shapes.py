"""The shape of a statement is for everybody's eyes: no literal survives, however it was written, and lists are one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st
from sqlalchemy import Integer, Numeric, String, bindparam, column, insert, select, table, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import asyncpg, psycopg

from stanch.sqltext import shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "5ecre7"
NUMBER = "41113311"

orders = table("orders", column("id", Integer), column("item", String), column("price", Numeric(10, 2)))

# Each writes a value as a literal; PostgreSQL manual, *Lexical Structure*, *Constants*.
STRINGS: list[Callable[[str], str]] = [
    lambda value: "'" + value.replace("'", "''") + "'",
    lambda value: "E'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'",
    lambda value: "e'" + value.replace("\\", "\\\\").replace("'", "''") + "'",
    lambda value: f"$$ {value.replace('$', ' ')} $$",
    lambda value: f"$of$ {value.replace('$', ' ')} $of$",
    lambda value: "U&'" + value.replace("\\", "").replace("'", "''") + "'",
    lambda value: "N'" + value.replace("'", "''") + "'",
    lambda value: "'begun'\n  '" + value.replace("'", "''") + "'",
]
NUMBERS: list[Callable[[str], str]] = [
    str,
    lambda value: f"{value}.5",
    lambda value: f".{value}",
    lambda value: f"{value}e-{value}",
    lambda value: f"-{value}",
    lambda value: f"0x{value}",
    lambda value: f"1_{value}",
    lambda value: f"X'{value}'",
    lambda value: f"B'{value}'",
]
HIDDEN: list[Callable[[str], str]] = [
    lambda value: f"/* {value.replace('*', ' ').replace('/', ' ')} */ 1",
    lambda value: "/* a /* b */ " + value.replace("*", " ").replace("/", " ") + " */ 1",
    lambda value: f"1 -- {value.splitlines()[0] if value.splitlines() else ''}\n",
]

odd = st.text(st.sampled_from("ab '\"\\$%:;()[]-*/?\n\té☃"), max_size=12)


def _write(how: Callable[[str], str], value: str) -> str:
    return how(value)


def _around(before: str, after: str) -> str:
    return f"{before}{SECRET}{after}"


strings = st.builds(_around, odd, odd)
written = st.one_of(
    st.builds(_write, st.sampled_from(STRINGS), strings),
    st.builds(_write, st.sampled_from(NUMBERS), st.just(NUMBER)),
    st.builds(_write, st.sampled_from(HIDDEN), strings),
)


def new(dialect: Any) -> Any:
    return dialect()


FRAMES = [
    "SELECT {} FROM t",
    "SELECT * FROM t WHERE a = {} AND b > {}",
    "SELECT * FROM t WHERE a IN ({}, {}, {})",
    "SELECT * FROM t WHERE a IN (({}), {})",
    "INSERT INTO t (a, b) VALUES ({}, $1), ({}, %(a)s)",
    "UPDATE t SET a = {}, b = coalesce(b, {}) WHERE c LIKE {}",
    "SELECT f({}::text, CAST({} AS int))",
    "SET app.tenant = {}",
    "SELECT a FROM t ORDER BY a LIMIT {}",
    "CREATE ROLE x PASSWORD {}",
]


@settings(max_examples=500, deadline=None)
@given(frame=st.sampled_from(FRAMES), literals=st.lists(written, min_size=3, max_size=3))
def test_no_literal_survives(frame: str, literals: list[str]) -> None:
    sql = frame.format(*literals)
    shape = shape_of(sql)
    assert SECRET not in shape, sql
    assert NUMBER not in shape, sql


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("ab1 '\"\\$%:;()[]-*/?\neEuU&xX_☃"), max_size=40))
def test_any_text_has_a_shape_and_a_shape_is_its_own(sql: str) -> None:
    shape = shape_of(sql)
    assert len(shape) <= 1001
    assert "\n" not in shape
    if "not readable" not in shape and '"' not in shape:
        assert not re.search(r"'", shape)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab ,'\"()\\\n?☃", max_size=12), min_size=1, max_size=30), st.sampled_from(STRINGS[:5])
)
def test_lists_of_any_length_are_one_shape(values: list[str], how: Callable[[str], str]) -> None:
    shape = shape_of(f"SELECT * FROM t WHERE a IN ({', '.join(map(how, values))})")
    assert shape == "SELECT * FROM t WHERE a IN (?)"


@pytest.mark.parametrize(
    "dialect", [*map(new, [asyncpg.dialect, psycopg.dialect, postgresql.dialect, sqlite.dialect])]
)
@pytest.mark.parametrize(
    ("statement", "shape"),
    [
        (
            select(orders).where(orders.c.item == "book").limit(3),
            "SELECT orders.id, orders.item, orders.price FROM orders WHERE orders.item = ? LIMIT ?",
        ),
        (
            select(orders.c.id).where(orders.c.price.in_([1, 2, 3])),
            "SELECT orders.id FROM orders WHERE orders.price IN (?)",
        ),
        (
            insert(orders).values(id=1, item="book", price=2),
            "INSERT INTO orders (id, item, price) VALUES (?)",
        ),
        (
            insert(orders).values([{"id": 1, "item": "a"}, {"id": 2, "item": "b"}]),
            "INSERT INTO orders (id, item) VALUES (?)",
        ),
        (text("SELECT :value").bindparams(bindparam("value", SECRET)), "SELECT ?"),
    ],
)
def test_every_drivers_parameters_are_one_shape(dialect: Any, statement: Any, shape: str) -> None:
    compiled = shape_of(str(statement.compile(dialect=dialect)))
    expanded = shape_of(str(statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})))
    literal = shape_of(str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True})))
    for found in (compiled, expanded, literal):
        plain = re.sub(r"\?::[A-Z]+", "?", found).removesuffix(" OFFSET ?")
        assert plain == shape


def test_what_cannot_be_read_shows_its_first_word_alone() -> None:
    assert shape_of(f"SELECT '{SECRET}") == "SELECT (not readable)"
    assert shape_of(f"select 1 /* {SECRET}") == "SELECT (not readable)"
    assert shape_of(rf"SELECT 'a\'{SECRET}\'b'") == "SELECT (not readable)"  # by older rules of strings
    assert shape_of(f"'{SECRET}'\0") == "(not readable)"
    assert shape_of("SELECT " + "1, " * 10_000) == "SELECT (not readable)"


def test_a_shape_has_an_end() -> None:
    wide = shape_of("SELECT " + ", ".join(f"column_{number}" for number in range(600)) + " FROM t")
    assert len(wide) == 1001
    assert wide.endswith("…")


def test_values_that_need_no_quotes_are_values() -> None:
    assert shape_of(f"SET LOCAL app.tenant TO {SECRET}") == "SET LOCAL app.tenant TO ?"
    assert shape_of(f"SET ROLE {SECRET}") == "SET ROLE ?"
    assert shape_of("SET TRANSACTION READ ONLY") == "SET TRANSACTION READ ONLY"


def test_savepoints_are_one_statement() -> None:
    assert shape_of("SAVEPOINT sa_savepoint_12") == shape_of("SAVEPOINT sa_savepoint_3")
