"""Finds out which state a statement leaves in the server's session, where the next borrower would meet it.

Told by its words, as in ``sqltext``. What a function or a procedure does inside is not seen, nor what goes past
SQLAlchemy to the driver's own connection.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from stanch.sqltext import Kind, Token, Unreadable, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_REMEMBERED: Final = 1024
"""Texts whose judgement is kept."""

INFO_KEY: Final = "stanch.session_state"
"""In a pooled connection's ``info``: by which ``Place`` each ``State`` was left there, until it is returned."""

CLEANING: Final = (
    "CLOSE ALL",
    "UNLISTEN *",
    "RESET SESSION AUTHORIZATION",
    "RESET ROLE",
    "RESET ALL",
    "SELECT pg_advisory_unlock_all()",
    "DISCARD TEMP",
    "DISCARD SEQUENCES",
)
"""What ``DISCARD ALL`` does (PostgreSQL manual, *DISCARD*), but for the prepared statements: those are the driver's.

RESET ALL goes back to what the start-up packet said, stanch's own time limits among it.
"""


class State(NamedTuple):
    """One kind of session state that a statement leaves behind."""

    what: str
    """How a person calls it; never a value."""
    undo: str | None = ""
    """What it needs beside ``CLEANING`` to be undone; None if it cannot be."""
    local_if: str = ""
    """The bind parameter that makes it local to the transaction if it is true."""


_TELLTALES: Final = (
    "set",
    "listen",
    "prepare",
    "declare",
    "temp",
    "load",
    "discard",
    "deallocate",
    "advisory",
    "dblink",
    "origin",
    'u&"',
)
"""No statement without one of these leaves anything; what holds one is looked at."""

_NOT_FOR_THE_SESSION: Final = frozenset({"LOCAL", "TRANSACTION", "CONSTRAINTS"})
_BETWEEN: Final = frozenset({"LOCAL", "GLOBAL", "OR", "REPLACE"})
"""May stand between CREATE and TEMP."""
_BLOCK_EDGES: Final = frozenset({"BEGIN", "THEN", "ELSE", "LOOP", "DECLARE"})
"""After these a statement begins in the body of a DO block."""
_ADVISORY: Final = re.compile(r"pg_(try_)?advisory_lock(_shared)?")
_FOR_GOOD: Final = re.compile(r"setseed|dblink_connect(_u)?|pg_replication_origin_session_setup")
_TRUE: Final = frozenset({"true", "'true'", "'t'"})


@lru_cache(maxsize=_REMEMBERED)
def session_state_of(sql: str) -> tuple[State, ...]:
    """Every kind of session state that *sql* sets; nothing for nearly all statements.

    >>> [state.what for state in session_state_of("SET search_path = shop; LISTEN orders")]
    ['SET', 'LISTEN']
    >>> session_state_of("SET LOCAL search_path = shop"), session_state_of("UPDATE t SET a = 1")
    ((), ())
    >>> session_state_of("SELECT set_config('app.tenant', $1, true), pg_advisory_xact_lock(1)")
    ()
    >>> session_state_of("SELECT set_config('app.tenant', $1, $2)")
    (State(what='set_config()', undo='', local_if='$2'),)
    >>> session_state_of("PREPARE plan AS SELECT 1")
    (State(what='PREPARE', undo='DEALLOCATE plan', local_if=''),)
    """
    lowered = sql.lower()
    if not any(telltale in lowered for telltale in _TELLTALES):
        return ()
    try:
        return tuple(_states(list(tokens(sql))))
    except Unreadable:
        return (State("a statement that cannot be read", None),)


def _states(text: Sequence[Token], *, inside_a_block: bool = False) -> Iterator[State]:
    for statement in _statements(text, _BLOCK_EDGES if inside_a_block else frozenset()):
        yield from _states_of_one(statement)
        if statement[0].keyword == "DO":
            for body in (token.text for token in statement if token.kind is Kind.STRING):
                yield from _states(list(tokens(_content_of(body))), inside_a_block=True)


def _content_of(string: str) -> str:
    if string[:1] == "$":
        return string.split("$", 2)[2].rpartition("$")[0].rpartition("$")[0]
    return string.partition("'")[2][:-1].replace("''", "'")


def _statements(text: Sequence[Token], edges: frozenset[str]) -> Iterator[list[Token]]:
    statement: list[Token] = []
    for token in text:
        if token.text == ";" or token.keyword in edges:
            if statement:
                yield statement
            statement = []
        else:
            statement.append(token)
    if statement:
        yield statement


def _states_of_one(statement: Sequence[Token]) -> Iterator[State]:
    keywords = [token.keyword for token in statement]
    match keywords:
        case ["SET", second, *_] if second not in _NOT_FOR_THE_SESSION:
            yield State("SET")
        case ["LISTEN", *_]:
            yield State("LISTEN")
        case ["PREPARE", second, *_] if second != "TRANSACTION":
            yield State("PREPARE", f"DEALLOCATE {statement[1].text}")
        case ["DECLARE", *rest] if ("WITH", "HOLD") in pairwise(rest):
            yield State("DECLARE WITH HOLD")
        case ["LOAD", *_]:
            yield State("LOAD", None)
        case ["DISCARD" | "DEALLOCATE", *rest] if "ALL" in rest[:2]:
            # The driver goes on believing in its prepared statements.
            yield State(f"{keywords[0]} ALL", None)
        case _:
            pass
    if _makes_something_temporary(statement, keywords):
        yield State("CREATE TEMP")
    yield from _states_of_functions(statement)


def _makes_something_temporary(statement: Sequence[Token], keywords: Sequence[str]) -> bool:
    if any(keywords[at : at + 3] == ["ON", "COMMIT", "DROP"] for at in range(len(keywords))):
        return False
    for at, keyword in enumerate(keywords):
        if keyword in ("TEMP", "TEMPORARY"):
            before = (earlier for earlier in reversed(keywords[:at]) if earlier not in _BETWEEN)
            if next(before, "") in ("CREATE", "INTO"):
                return True
    return keywords[0] == "CREATE" and any(token.function == "pg_temp" for token in statement)


def _states_of_functions(statement: Sequence[Token]) -> Iterator[State]:
    for at, token in enumerate(statement[1:], 1):
        called = statement[at - 1].function
        if token.text != "(" or not called:
            continue
        if _ADVISORY.fullmatch(called):
            yield State(f"{called}()")
        elif _FOR_GOOD.fullmatch(called):
            yield State(f"{called}()", None)
        elif called == "set_config":
            third = _third_argument(statement[at + 1 :])
            if third.lower() not in _TRUE:
                yield State("set_config()", local_if=third if third[:1] in "$%" else "")


def _third_argument(text: Sequence[Token]) -> str:
    """The third argument of the call whose parenthesis has just been opened, without blanks and a cast."""
    depth, arguments = 0, [""]
    for token in text:
        if token.text in ("(", "["):
            depth += 1
        elif token.text in (")", "]"):
            depth -= 1
            if depth < 0:
                break
        if token.text == "," and not depth:
            arguments.append("")
        else:
            arguments[-1] += token.text
    third = arguments[2] if len(arguments) == 3 else ""
    return re.sub(r"::bool(ean)?$", "", third, flags=re.IGNORECASE)
