"""Reads the options of a PostgreSQL URL and of ``connect_args`` under one set of names, libpq's.

libpq's names (PostgreSQL manual, *Parameter Key Words*) are what people find documented. A driver takes the
`Wishes` gathered here and says them in its own words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ssl import SSLContext
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy.engine import URL
from sqlalchemy.pool import StaticPool
from typing_extensions import override

from stanch.settings import KINDS
from stanch.settings.kinds import (
    CONTROL,
    Choice,
    Complaint,
    Function,
    Instance,
    Kind,
    Label,
    Seconds,
    Switch,
    Whole,
    complain,
    judged,
    meant,
    named,
    read,
    shown,
)
from stanch.settings.url import MAX_PORT
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stanch.settings import Settings


class Text(Kind, Value):
    """A text without control characters: drivers pass it on to C, and to the start-up packet."""

    example: str

    @override
    def __str__(self) -> str:
        return "a str that is not empty and has no control characters"

    @override
    def judge(self, value: object) -> str:
        if not isinstance(value, str) or not value or CONTROL.search(value):
            raise ValueError
        return value

    @override
    def read(self, text: str) -> str:
        return self.judge(text)


class Either(Kind, Value):
    """What one of two kinds lets through."""

    first: Kind
    second: Kind
    example: str

    @override
    def __str__(self) -> str:
        return f"{self.first}, or {self.second}"

    @override
    def judge(self, value: object) -> object:
        try:
            return self.first.judge(value)
        except ValueError:
            return self.second.judge(value)

    @override
    def read(self, text: str) -> object:
        try:
            return self.first.read(text)
        except ValueError:
            return self.second.read(text)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked for, the same for both drivers. No ``repr`` may ever show *tls*: it can hold a password."""

    timeout: float
    """Seconds for one connect, all of it."""
    tls: Mapping[str, str]
    """libpq's names, from ``sslmode`` to ``sslcrl``."""
    server: Mapping[str, str]
    """Start-up parameters of the session, ``application_name`` among them."""
    plain: Mapping[str, Any]
    """What both drivers call the same."""
    own: Mapping[str, Any]
    """What only this driver knows."""

    @property
    def statement_timeout(self) -> float | None:
        """The server's limit of every statement, in seconds; None if there is none, or none that can be read here."""
        said = _SERVER_TIME.fullmatch(self.server.get("statement_timeout", ""))
        seconds = float(said[1]) * _UNITS[said[2] or "ms"] if said else 0.0
        return seconds or None

    def __repr__(self) -> str:
        return f"<Wishes {sorted((*self.tls, *self.server, *self.plain, *self.own))}>"


_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SERVER_TIME: Final = re.compile(rf"\s*([0-9]+(?:\.[0-9]+)?)\s*({'|'.join(_UNITS)})?\s*", re.ASCII)
"""A length of time as PostgreSQL reads it (PostgreSQL manual, *Parameter Names and Values*); bare, it is in ms."""

_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_TLS_VERSIONS: Final = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")

_TLS: Final[Mapping[str, Kind]] = {
    "sslmode": Choice(_SSL_MODES, '"verify-full"'),
    "sslrootcert": Text('"/etc/ssl/ca.pem"'),
    "sslcert": Text('"/etc/ssl/app.pem"'),
    "sslkey": Text('"/etc/ssl/app.key"'),
    "sslpassword": Text("…"),
    "sslcrl": Text('"/etc/ssl/ca.crl"'),
    "sslnegotiation": Choice(("postgres", "direct"), '"direct"'),
    "ssl_min_protocol_version": Choice(_TLS_VERSIONS, '"TLSv1.2"'),
    "ssl_max_protocol_version": Choice(_TLS_VERSIONS, '"TLSv1.3"'),
}
_PLAIN: Final[Mapping[str, Kind]] = {
    "target_session_attrs": Choice(
        ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"), '"read-write"'
    ),
    "krbsrvname": Text('"postgres"'),
    "gsslib": Choice(("gssapi", "sspi"), '"gssapi"'),
    "passfile": Text('"/etc/app/pgpass"'),
    "async_creator_fn": Function("open_connection"),
}
_COMMON: Final[Mapping[str, Kind]] = {
    **_TLS,
    **_PLAIN,
    "ssl": Either(
        Choice(_SSL_MODES, '"require"', switch=True),
        Instance((SSLContext,), "an SSLContext", ""),
        '"require"',
    ),
    "connect_timeout": Seconds("5"),
    "application_name": Label('"shop"'),
    "options": Text('"-c search_path=app"'),
    "server_settings": Instance((dict,), "a dict of str", '{"search_path": "app"}'),
}

ASYNCPG: Final[Mapping[str, Kind]] = {
    "command_timeout": Seconds("30", optional=True),
    "connection_class": Instance((type,), "a class", "MyConnection"),
    "direct_tls": Switch(),
    "max_cacheable_statement_size": Whole(0, 10**9, "15360"),
    "max_cached_statement_lifetime": Whole(0, 10**9, "300"),
    "password": Either(Text("…"), Function(), "fetch_token"),
    "prepared_statement_cache_size": Whole(0, 10**6, "100"),
    "prepared_statement_name_func": Function("name_of"),
    "record_class": Instance((type,), "a class", "MyRecord"),
    "service": Text('"shop"'),
    "servicefile": Text('"/etc/app/pg_service.conf"'),
    "statement_cache_size": Whole(0, 10**6, "100"),
}
_TEXT: Final = Text('"…"')
_COUNT: Final = Whole(0, 2**31 - 1, "1")
PSYCOPG: Final[Mapping[str, Kind]] = {
    "channel_binding": Choice(("disable", "prefer", "require"), '"require"'),
    "client_encoding": Text('"utf8"'),
    "cursor_factory": Function("AsyncCursor"),
    "fallback_application_name": Label('"shop"'),
    "gssdelegation": _COUNT,
    "gssencmode": Choice(("disable", "prefer", "require"), '"disable"'),
    "hostaddr": Text('"10.0.0.5"'),
    "keepalives": _COUNT,
    "keepalives_count": _COUNT,
    "keepalives_idle": _COUNT,
    "keepalives_interval": _COUNT,
    "load_balance_hosts": Choice(("disable", "random"), '"random"'),
    "max_protocol_version": _TEXT,
    "min_protocol_version": _TEXT,
    "oauth_client_id": _TEXT,
    "oauth_client_secret": _TEXT,
    "oauth_issuer": _TEXT,
    "oauth_scope": _TEXT,
    "password": Text("…"),
    "prepare_threshold": Whole(0, 10**6, "5", optional=True),
    "require_auth": _TEXT,
    "requirepeer": _TEXT,
    "row_factory": Function("tuple_row"),
    "scram_client_key": _TEXT,
    "scram_server_key": _TEXT,
    "service": Text('"shop"'),
    "sslcertmode": Choice(("disable", "allow", "require"), '"allow"'),
    "sslcompression": _COUNT,
    "sslcrldir": _TEXT,
    "sslkeylogfile": _TEXT,
    "sslsni": _COUNT,
    "tcp_user_timeout": _COUNT,
}
_FOREIGN: Final[Mapping[str, str]] = {
    **dict.fromkeys(PSYCOPG, "psycopg"),
    **dict.fromkeys(ASYNCPG, "asyncpg"),
    **dict.fromkeys(
        ("check_same_thread", "uri", "mode", "cache", "detect_types", "cached_statements"), "SQLite"
    ),
}

_ELSEWHERE: Final[Mapping[str, str]] = {
    "timeout": "Write connect_timeout, in seconds: timeout means something else on every driver.",
    "autocommit": 'Write isolation_level="AUTOCOMMIT" as a setting of its own.',
    "dsn": "Write the URL itself.",
    "loop": "Leave it out: a connection belongs to the loop it is opened on.",
    "context": "Leave it out: SQLAlchemy has type adapters of its own.",
    **dict.fromkeys(("host", "port", "user", "dbname", "database"), "Write it into the URL."),
}

_PASSES_PGBOUNCER: Final = frozenset(
    {"application_name", "client_encoding", "datestyle", "timezone", "standard_conforming_strings"}
)
"""The start-up parameters PgBouncer tracks for each client (PgBouncer manual, *track_extra_parameters*)."""


def gather(url: URL, settings: Settings, *, driver: str, own: Mapping[str, Kind]) -> Wishes:
    """What *url*, ``connect_args`` and *settings* ask for together.

    What somebody chose beats a default; two choices that differ are refused. Raises `ConfigError` for everything
    that is wrong, at once: an unknown name, a value that is not allowed, a name of another driver.
    """
    complaints: list[Complaint] = []
    if settings.poolclass is StaticPool:
        said = "poolclass=StaticPool is for SQLite :memory: only"
        complaints.append(Complaint(said, "Leave poolclass out."))
    known = {**_COMMON, **own}
    chosen = _from_url(url, known, driver, complaints)
    for name, value in connect_args_of(settings).items():
        if not isinstance(name, str) or name not in known:
            complaints.append(_unknown(name, known, driver, where="connect_args"))
        elif name in chosen and chosen[name] != value:
            complaints.append(_twice(name, "in the URL and in connect_args"))
        else:
            chosen[name] = judged(f"connect_args: {name}", known[name], value, complaints)
    complain(complaints)

    _merge_ssl(chosen, driver, complaints)
    timeout = _one_of(chosen, settings, "connect_timeout", complaints)
    server = _server_settings(chosen, settings, complaints)
    complain(complaints)
    return Wishes(
        timeout=timeout,
        tls={name: chosen.pop(name) for name in _TLS if name in chosen},
        server=server,
        plain={name: chosen.pop(name) for name in _PLAIN if name in chosen},
        own=chosen,
    )


def connect_args_of(settings: Settings) -> dict[object, object]:
    """The ``connect_args`` among the engine options, or nothing."""
    return cast("dict[object, object]", settings.engine_options.get("connect_args", {}))


def engine_options_of(settings: Settings) -> dict[str, Any]:
    """What is passed on to ``create_async_engine`` beside the pool and ``connect_args``.

    ``hide_parameters`` is on unless somebody turned it off: bound values are nobody's business but the server's.
    """
    options: dict[str, Any] = {"echo": settings.echo, "hide_parameters": True, **settings.engine_options}
    options.pop("connect_args", None)
    if settings.isolation_level is not None:
        options["isolation_level"] = settings.isolation_level
    return options


def as_libpq_options(server: Mapping[str, str]) -> str:
    r"""*server* as libpq's ``options`` (PostgreSQL manual, *options*): blanks and backslashes are escaped.

    >>> as_libpq_options({"search_path": "a, b"})
    '-c search_path=a,\\ b'
    """
    return " ".join(f"-c {name}=" + re.sub(r"([\\ ])", r"\\\1", value) for name, value in server.items())


def servers_of(url: URL) -> list[tuple[str, int | None]]:
    """Host and port of each server of *url*, of which there may be several, in the order to try them.

    An empty host is the driver's default. Raises `ConfigError` if hosts and ports do not match.
    """
    hosts, ports = _listed(url.query.get("host")), _listed(url.query.get("port"))
    if not hosts and not ports:
        return [(url.host or "", url.port)]
    complaints: list[Complaint] = []
    if url.host is not None and hosts:
        complaints.append(_twice("host", "before and after the ?"))
    if url.port is not None and ports:
        complaints.append(_twice("port", "before and after the ?"))
    hosts = hosts or [url.host or ""]
    servers: list[tuple[str, int | None]] = []
    if ports and len(ports) not in {1, len(hosts)}:
        complaints.append(
            Complaint(
                f"url: {len(hosts)} hosts and {len(ports)} ports", "Give one port, or one for each host."
            )
        )
        ports = ports[:1]
    for number, host in enumerate(hosts):
        has_port = re.search(r"^[^/:]*:\d+$|\]:\d+$", host)
        name, _, port = host.rpartition(":") if has_port else (host, "", "")
        port = port or (ports[number % len(ports)] if ports else "")
        if port and not (re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) and 1 <= int(port) <= MAX_PORT):
            complaints.append(
                Complaint(f"url: port is not a number from 1 to {MAX_PORT}", "Write port=5432.")
            )
            continue
        servers.append((name.strip("[]"), int(port) if port else url.port))
    complain(complaints)
    return servers


def plain_url(url: URL, driver: str) -> URL:
    """*url* with its driver named and its query empty but for what SQLAlchemy reads there: several hosts, a socket."""
    servers = servers_of(url)
    host, port = servers[0]
    query: dict[str, str] = {}
    if len(servers) > 1:
        query["host"] = ",".join(each or "localhost" for each, _ in servers)
        query["port"] = ",".join(str(number or 5432) for _, number in servers)
        host, port = "", None
    elif host.startswith("/"):  # a directory of sockets
        query["host"], host = host, ""
    return URL.create(
        f"{url.get_backend_name()}+{driver}",
        username=url.username,
        password=url.password,
        host=host or None,
        port=port,
        database=url.database,
        query=query,
    )


def _listed(value: str | tuple[str, ...] | None) -> list[str]:
    if value is None:
        return []
    return value.split(",") if isinstance(value, str) else list(value)


def _from_url(
    url: URL, known: Mapping[str, Kind], driver: str, complaints: list[Complaint]
) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name, value in url.query.items():
        if name in {"host", "port"}:
            continue
        if name not in known:
            complaints.append(_unknown(name, known, driver, where="url"))
        elif not isinstance(value, str):
            complaints.append(_twice(name, "in the URL"))
        else:
            try:
                chosen[name] = read(known[name], value)
            except ValueError as error:
                hint = f" ({error})" if error.args else ""
                said = f"url: {name} must be {known[name]}, got {shown(value)}{hint}"
                complaints.append(Complaint(said, f"Write ?{name}={known[name].example.strip(chr(34))}."))
    return chosen


def _unknown(name: object, known: Iterable[str], driver: str, *, where: str) -> Complaint:
    if not isinstance(name, str):
        return Complaint(f"{where}: names are str, got {shown(name)}", "Write names of connection options.")
    if name in _ELSEWHERE:
        return Complaint(f"{where}: {name} is not an option here", _ELSEWHERE[name])
    if name in KINDS:
        return Complaint(
            f"{where}: {name} is a setting of its own", f"Write Database(url, {name}={KINDS[name].example})."
        )
    if name in _FOREIGN:
        return Complaint(
            f"{where}: {name} is an option of {_FOREIGN[name]}, and this database uses {driver}",
            f"Leave {name} out, or use {_FOREIGN[name]}.",
        )
    return Complaint(
        f"{where}: {named(name)} is not a connection option{meant(name, known)}",
        "Options have libpq's names on every driver: sslmode, connect_timeout, application_name, options, ….",
    )


def _twice(name: str, where: str) -> Complaint:
    return Complaint(f"{name} is given twice, {where}", f"Give {name} once.")


def _one_of(chosen: dict[str, Any], settings: Settings, name: str, complaints: list[Complaint]) -> Any:
    """*name* from the URL or from the settings; taken out of *chosen*."""
    wished, set_to = chosen.pop(name, None), getattr(settings, name)
    if wished is not None and name in settings.given and wished != set_to:
        complaints.append(_twice(name, "as a setting and in the URL or connect_args"))
    return set_to if wished is None else wished


def _merge_ssl(chosen: dict[str, Any], driver: str, complaints: list[Complaint]) -> None:
    """``ssl`` is asyncpg's word for ``sslmode``; True there means a verified certificate of a public authority."""
    if "ssl" not in chosen:
        return
    ssl = chosen.pop("ssl")
    if any(name in chosen for name in (("sslmode",) if isinstance(ssl, str) else _TLS)):
        complaints.append(_twice("sslmode", "once as ssl"))
    elif isinstance(ssl, SSLContext):
        if driver == "psycopg":
            said = "connect_args: psycopg takes no SSLContext"
            complaints.append(Complaint(said, "Name the files: sslmode, sslrootcert, sslcert, sslkey."))
        chosen["ssl"] = ssl
    elif isinstance(ssl, str):
        chosen["sslmode"] = ssl
    else:
        chosen |= {"sslmode": "verify-full", "sslrootcert": "system"} if ssl else {"sslmode": "disable"}


def _server_settings(
    chosen: dict[str, Any], settings: Settings, complaints: list[Complaint]
) -> dict[str, str]:
    """Every start-up parameter of the session; taken out of *chosen*."""
    server: dict[str, str] = {}
    given: Mapping[object, object] = chosen.pop("server_settings", {})
    for name, value in (*_parsed_options(chosen.pop("options", ""), complaints), *given.items()):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.$]*", name):
            said = "server_settings: a parameter is not named like one"
            complaints.append(Complaint(said, 'Write server_settings={"search_path": "app"}.'))
        elif not isinstance(value, str) or CONTROL.search(value):
            said = (
                f"server_settings: {named(name)} must be a str without control characters, got {shown(value)}"
            )
            complaints.append(Complaint(said, 'Write server_settings={"work_mem": "64MB"}.'))
        elif server.setdefault(name.lower(), value) != value:
            complaints.append(_twice(named(name), "in options or server_settings"))
    name = _one_of(chosen, settings, "application_name", complaints)
    if name is not None:
        server.setdefault("application_name", name)
    for name, value in settings.server_timeouts.items():
        if name in server and name in settings.given:
            complaints.append(_twice(name, "as a setting and in options"))
        server.setdefault(name, value)
    if settings.pooler is not None:
        complaints.extend(
            Complaint(
                f"{named(name)} cannot be sent through PgBouncer in transaction mode",
                f"Say it on the server: ALTER ROLE app SET {named(name)} = ….",
            )
            for name in server
            if name not in _PASSES_PGBOUNCER
        )
    return server


def _parsed_options(text: str, complaints: list[Complaint]) -> Iterable[tuple[str, str]]:
    words = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|[^\s\\])+", text)]
    pairs: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        if word == "-c" and words:
            word = words.pop(0)
        elif word.startswith(("-c", "--")):
            word = word[2:]
        else:
            word = ""
        name, mark, value = word.partition("=")
        if not mark:
            said = "options: only -c name=value is understood"
            complaints.append(Complaint(said, 'Write options="-c search_path=app -c work_mem=64MB".'))
            break
        pairs.append((name.replace("-", "_"), value))
    return pairs
