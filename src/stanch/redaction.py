"""Takes row content out of a driver's error messages, in place, before anybody can log them.

SQLAlchemy's ``hide_parameters`` hides the bound parameters but not what the server itself quotes:
PostgreSQL's DETAIL names the values of a violated key or the whole failing row, and the messages of SQLSTATE
class 22 (data exception) quote the input (PostgreSQL manual, *Error and Notice Message Fields*).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from stanch.sqlstate import says_server_has_gone, sqlstate_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_QUOTING_FIELDS: Final = ("detail", "hint", "context", "internal_query", "query")
"""What asyncpg appends to ``str(error)`` or keeps beside it."""

_QUOTING_CLASSES: Final = {"22": "data exception", "P0": "PL/pgSQL error"}
"""SQLSTATE classes whose very message may quote a value; in P0 it is what the author of a trigger wrote."""


_WITHHELD: Final = "message withheld: it may quote the value"


def redact(error: BaseException) -> None:
    r"""Cut every message in the chain of *error* down to what names no value; types and SQLSTATEs stay.

    >>> import psycopg
    >>> error = psycopg.errors.UniqueViolation('duplicate key "orders_pkey"\nDETAIL:  Key (id)=(42) already exists.')
    >>> redact(error)
    >>> str(error)
    'duplicate key "orders_pkey"'
    """
    for link in _chain(error):
        if isinstance(link, StatementError):
            link.hide_parameters = True
            link.args = (_without_values(link, str(link.args[0])),) if link.args else ()
            _silence(link.orig)
        elif _is_of_a_driver(link):
            link.args = tuple(_without_values(link, part) for part in link.args if isinstance(part, str))
            for field in _QUOTING_FIELDS:
                if getattr(link, field, None) is not None:
                    _replace(link, field, None)
            if isinstance(getattr(link, "message", None), str):
                _replace(link, "message", next(iter(link.args), ""))
            _silence(link.__cause__)


def _silence(refusal: BaseException | None) -> None:
    """Withhold the message of what refused an argument: a type of the user's, a codec of the driver."""
    while refusal is not None and not _speaks_plainly(refusal) and refusal.args != (_WITHHELD,):
        refusal.args = (_WITHHELD,)
        refusal = refusal.__cause__


def _speaks_plainly(error: BaseException) -> bool:
    return isinstance(error, OSError | SQLAlchemyError) or _is_of_a_driver(error)


def _without_values(error: BaseException, message: str) -> str:
    if isinstance(error, StatementError) and not isinstance(error, DBAPIError):
        # No server refused this, but a type, in words of its own.
        refused = type(error.orig)
        known = error.orig is None or _speaks_plainly(error.orig)
        return message if known else f"({refused.__module__}.{refused.__qualname__}) {_WITHHELD}"
    state = sqlstate_of(error) or ""
    kind = _QUOTING_CLASSES.get("22" if type(error).__name__ == "DataError" else state[:2])
    if kind is None and says_server_has_gone(state) and _severity(error) == "ERROR":
        # The server's own last words are FATAL; this is the author of a function, and SQLAlchemy would log it.
        kind = "raised"
    if kind is not None:
        return f"{kind} {state}".rstrip() + f" ({_WITHHELD})"
    return message.partition("\n")[0]


def _severity(error: BaseException) -> str | None:
    """As the server gave it, in English; None if no server did."""
    for candidate in (error, getattr(error, "orig", None), error.__cause__):
        for source, name in (
            (candidate, "severity_en"),
            (getattr(candidate, "diag", None), "severity_nonlocalized"),
        ):
            severity = getattr(source, name, None)
            if isinstance(severity, str):
                return severity
    return None


def _is_of_a_driver(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in {
        "asyncpg",
        "psycopg",
        "sqlite3",
        "aiosqlite",
        "sqlalchemy",
    }


def _replace(error: BaseException, field: str, value: str | None) -> None:
    try:
        setattr(error, field, value)
    except AttributeError:  # a read-only property of the driver's; str() does not show it
        return


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        link = pending.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        pending += [getattr(link, "orig", None), link.__cause__, link.__context__]
