"""The one judge of database URLs: every part in order, and no part of it ever repeated in an error."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import parse_qsl, unquote

from sqlalchemy.engine import URL

from stanch.errors import ConfigError
from stanch.settings.kinds import CONTROL, named, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_PORT: Final = 65_535
_FORM: Final = "postgresql+asyncpg://user:password@host:5432/database"
_WRITE: Final = f"Write {_FORM}."
_ENCODE: Final = (
    "Quote each part: urllib.parse.quote(password, safe=''), which makes @ %40, / %2F, ? %3F, # %23, % %25.",
    "Or let SQLAlchemy do it: URL.create('postgresql+asyncpg', username=…, password=…, host=…, database=…).",
)


def judge_url(url: str | URL | object) -> URL:
    """The URL of a database as SQLAlchemy's own `URL`, every part of it in order.

    Takes a ``str``, a SQLAlchemy ``URL``, and what has a ``get_secret_value()`` or ``unicode_string()``
    (pydantic's ``SecretStr``, ``PostgresDsn``; pydantic is not imported). ``postgres://`` becomes
    ``postgresql://``; ``user``, ``password`` and ``dbname`` in the query move to their place, where
    SQLAlchemy masks the password; several hosts (``h1:5432,h2:5433``) move into the query, as SQLAlchemy
    writes them. Which driver serves the URL is not asked here, nor what else its query may hold.
    Raises `ConfigError`, in which no part of the URL is repeated.

    >>> judge_url("postgres://app:secret@localhost:5432/shop")
    postgresql://app:***@localhost:5432/shop
    """
    if isinstance(url, URL):
        return _judged_parts(url)
    return _judged_parts(_parsed(_text(url)))


def _text(url: object) -> str:
    for method in ("get_secret_value", "unicode_string"):
        read: Callable[[], object] | None = getattr(url, method, None)
        if callable(read) and not isinstance(url, str | type):
            return _text(read())
    if not isinstance(url, str):
        raise _bad_url(f"expected {_FORM}, got {shown(url)}", _WRITE)
    if not url.strip():
        raise _bad_url(f"expected {_FORM}, got " + ("blanks" if url else "an empty str"), _WRITE)
    if url != url.strip():
        ends = "ends with a newline" if url.endswith(("\n", "\r")) else "begins or ends with white space"
        raise _bad_url(ends, "Read the file or variable with .strip().")
    if CONTROL.search(url):
        raise _bad_url("contains a control character", "Percent-encode it, or remove it.")
    return str(url)


def _bad_url(what: str, *remedies: str) -> ConfigError:
    return ConfigError(f"url: {what}", remedies=remedies)


def _parsed(text: str) -> URL:
    scheme, mark, rest = text.partition("://")
    if not mark and "=" in text:
        raise _bad_url("expected a URL, got name=value pairs as libpq takes them", _WRITE)
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+_.-]{0,40}", scheme):
        jdbc = ["Leave out the leading jdbc:."] if scheme.startswith("jdbc:") else []
        raise _bad_url(f"expected {_FORM}", *jdbc, _WRITE)
    backend, plus, driver = scheme.lower().partition("+")
    scheme = {"postgres": "postgresql"}.get(backend, backend) + plus + driver
    if backend == "sqlite":
        return _parsed_sqlite(scheme, rest)
    _check_encoding(rest)
    authority, path, query = _cut(rest)
    user_part, at, host_part = authority.rpartition("@")
    username, colon, password = user_part.partition(":")
    hosts = [_host_and_port(each) for each in host_part.split(",")]
    pairs = _pairs(query)
    if len(hosts) > 1:
        quoted = [(f"[{host}]" if ":" in host else host, port) for host, port in hosts]
        pairs += [("host", f"{host}:{port or 5432}") for host, port in quoted]
    host, port = hosts[0] if len(hosts) == 1 else (None, None)
    return URL.create(
        scheme,
        username=unquote(username) if at and username else None,
        password=unquote(password) if colon else None,
        host=unquote(host) if host else None,
        port=port,
        database=unquote(path) or None,
        query=_grouped(pairs),
    )


def _parsed_sqlite(scheme: str, rest: str) -> URL:
    authority, slash, path = rest.partition("/")
    if authority.partition("?")[0]:
        raise _bad_url(
            "a SQLite URL names a file, not a host",
            "Write sqlite+aiosqlite:///relative.db, sqlite+aiosqlite:////absolute/path.db or sqlite+aiosqlite://.",
        )
    database, _, query = path.partition("?") if slash else ("", "", authority.partition("?")[2])
    return URL.create(scheme, database=unquote(database) or None, query=_grouped(_pairs(query)))


def _check_encoding(rest: str) -> None:
    """Refuse a URL whose password is probably not encoded.

    What follows its first @, / or ? would be read as a host, a database or an option, and then be printed.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    beyond = rest[len(authority) :]
    if authority.count("@") > 1 or "@" in beyond or "#" in rest or re.search(r"%(?![0-9A-Fa-f]{2})", rest):
        raise _bad_url(
            "the password (or another part) contains @, /, ?, # or % that is not encoded", *_ENCODE
        )


def _cut(rest: str) -> tuple[str, str, str]:
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    return authority, path, query


def _host_and_port(text: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(.*))?", text)
    if match is None:
        raise _bad_url("the host is not in order", "Write an IPv6 address in brackets: [::1].")
    host, port = match[1].strip("[]"), match[2]
    if port and not (re.fullmatch(r"[0-9]{1,9}", port, re.ASCII) and 1 <= int(port) <= MAX_PORT):
        raise _bad_url(f"port is not a number from 1 to {MAX_PORT}", _WRITE, _ENCODE[0])
    return host, int(port) if port else None


def _pairs(query: str) -> list[tuple[str, str]]:
    pairs = parse_qsl(query, keep_blank_values=True)
    for name, value in pairs:
        if not value:
            raise _bad_url(
                f"the parameter {named(name)} is empty", f"Give {named(name)} a value or remove it."
            )
    return pairs


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...] | str]:
    grouped: dict[str, tuple[str, ...]] = {}
    for name, value in pairs:
        grouped[name] = (*grouped.get(name, ()), value)
    return {name: values[0] if values[1:] == () else values for name, values in grouped.items()}


def _judged_parts(url: URL) -> URL:
    """*url* once more in its decoded parts; a `URL` object has seen none of the checks on text."""
    if url.drivername.partition("+")[0] == "postgres":
        url = url.set(drivername="postgresql" + url.drivername.removeprefix("postgres"))
    if url.get_backend_name() == "postgresql":
        url = _moved(url)
    for name in ("username", "password", "database", "host"):
        part: object = getattr(url, name)
        if part is not None and not isinstance(part, str):
            raise _bad_url(f"the {name} must be a str, got {shown(part)}", "Hand over the text itself.")
        if part and CONTROL.search(part):
            newline = " (a newline at its end: read the file with .strip())" if part[-1] in "\r\n" else ""
            raise _bad_url(
                f"the {name} contains a control character{newline}", f"Check where the {name} is read."
            )
    if url.host and re.search(r"[\s@/?#%]", url.host) and not url.host.startswith("/"):
        raise _bad_url("the host contains a character that no host name has", *_ENCODE)
    if url.port is not None and not 1 <= url.port <= MAX_PORT:
        raise _bad_url(f"port is not a number from 1 to {MAX_PORT}", _WRITE)
    for name, value in url.query.items():
        if any(CONTROL.search(each) for each in (name, *((value,) if isinstance(value, str) else value))):
            raise _bad_url(f"the parameter {named(name)} contains a control character", "Remove it.")
    return url


def _moved(url: URL) -> URL:
    """*url* with user, password and database of the query at their own places."""
    for parameter, part in (
        ("user", "username"),
        ("password", "password"),
        ("dbname", "database"),
        ("database", "database"),
    ):
        value = url.query.get(parameter)
        if value is None:
            continue
        if not isinstance(value, str) or getattr(url, part) is not None:
            raise _bad_url(f"the {part} is given twice", f"Give the {part} once, before the ?.")
        url = url.difference_update_query([parameter]).set(**cast("Any", {part: value}))
    return url
