"""Every wrong URL and setting we know of: one clear error, at construction, that repeats no secret."""

from __future__ import annotations

import traceback
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import URL
from sqlalchemy.pool import NullPool, SingletonThreadPool, StaticPool

from stanch.database import Database
from stanch.errors import ConfigError, DriverMissing

LEFT, RIGHT = "hunter2left", "hunter2right"
"""The two halves of a password. Wherever it is cut, "hunter2" is in both pieces."""

TELLTALE = "hunter2"
GOOD = "postgresql+asyncpg://app:hunter2@localhost:5432/shop"

A_POOL = NullPool(Mock())
"""Where the class is wanted."""

DRIVERS_WORDS = (
    "Traceback",
    "unexpected keyword",
    "NoneType: None",
    "invalid literal",
    "Invalid argument(s)",
)


def refusal_of(url: object, **settings: Any) -> ConfigError:
    """The error of the constructor; nothing else may come out, and nothing of it may tell a secret."""
    with pytest.raises(ConfigError) as refused:
        Database(url, **settings)  # type: ignore[call-overload]  # what is wrong here is the subject
    error = refused.value
    told = "".join(traceback.format_exception(error)) + repr(error) + str(error.remedies)
    assert TELLTALE not in told
    assert error.__cause__ is None or isinstance(error, DriverMissing)
    assert error.remedies, "an error without a remedy"
    assert not [words for words in DRIVERS_WORDS if words in str(error)]
    assert not [character for character in error.what if ord(character) < 32]
    return error


@pytest.mark.parametrize(
    ("url", "named"),
    [
        pytest.param(None, "got None", id="None"),
        pytest.param(5432, "got 5432", id="int"),
        pytest.param(b"postgresql://h/d", "bytes", id="bytes"),
        pytest.param("", "empty", id="empty"),
        pytest.param("   ", "blanks", id="blanks"),
        pytest.param(" " + GOOD, "white space", id="leading blank"),
        pytest.param(GOOD + "\n", "newline", id="trailing newline"),
        pytest.param(GOOD + "\r\n", "newline", id="trailing CRLF"),
        pytest.param("postgresql://app:hunter2\n@h/d", "control", id="newline inside"),
        pytest.param("hunter2", "expected postgresql", id="no URL at all"),
        pytest.param("host=h user=app password=hunter2", "name=value", id="libpq pairs"),
        pytest.param("jdbc:postgresql://h/d?password=hunter2", "expected", id="jdbc"),
        pytest.param(SimpleNamespace(get_secret_value=lambda: 5), "got 5", id="secret that is no text"),
    ],
)
def test_what_is_no_url_is_refused(url: object, named: str) -> None:
    error = refusal_of(url)
    assert error.what.startswith("url: ")
    assert named in error.what


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+asyncpg://app:{LEFT}{sign}{RIGHT}@localhost:5432/shop{query}"
        for sign in (
            "@",
            "/",
            "?",
            "#",
            "%",
            "@/",
            "?x=",
            "/?",
            "#@",
            "@a:1/",
            "%zz",
            "5?a=b&c=",
            "?application_name=",
        )
        for query in ("", "?application_name=x")
    ],
)
def test_a_password_that_is_not_encoded_is_refused_and_no_part_of_it_shown(url: str) -> None:
    error = refusal_of(url)
    assert "not encoded" in error.what or "password" in error.what
    assert "%40" in str(error)


@pytest.mark.parametrize("port", ["0", "abc", "99999", "-1", "65536", "5432x", "٥٤٣٢", "1e3", "hunter2"])
@pytest.mark.parametrize(
    "form",
    [
        "postgresql+asyncpg://app@h:{}/d",
        "postgresql+asyncpg://h1:5432,h2:{}/d",
        "postgresql+psycopg://app@/d?host=h&port={}",
    ],
)
def test_a_port_is_from_1_to_65535(port: str, form: str) -> None:
    error = refusal_of(form.format(port))
    assert "port" in error.what
    assert "65535" in error.what


def test_port_zero_of_a_url_object_is_refused_as_well() -> None:
    assert "port" in refusal_of(URL.create("postgresql+asyncpg", host="h", port=0)).what


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"password": "hunter2\n"}, "password"),
        ({"password": "hun\x00hunter2"}, "password"),
        ({"username": "a\x00b"}, "username"),
        ({"database": "d\r"}, "database"),
        ({"host": "a@b"}, "host"),
        ({"host": "a b"}, "host"),
        ({"query": {"application_name": "x\x00search_path\x00evil"}}, "application_name"),
        ({"query": {"options": "-c a=b\n"}}, "options"),
    ],
)
def test_the_parts_of_a_url_object_are_judged(parts: dict[str, Any], named: str) -> None:
    create: Any = URL.create
    assert named in refusal_of(create("postgresql+asyncpg", **{"host": "h", **parts})).what


@pytest.mark.parametrize("encoded", ["%00", "%0a", "%0D", "%1b"])
@pytest.mark.parametrize("form", ["//a{}b:pw@h/d", "//a:pw{}@h/d", "//a@h/d{}", "//h/d?application_name=x{}"])
def test_encoded_control_characters_are_control_characters(encoded: str, form: str) -> None:
    assert "control character" in refusal_of("postgresql+asyncpg:" + form.format(encoded)).what


@pytest.mark.parametrize(
    ("url", "named", "remedy"),
    [
        ("postgresql+psycopg2://h/d", "psycopg2 is a sync driver", "postgresql+asyncpg://"),
        ("postgresql+pg8000://h/d", "pg8000 is a sync driver", "postgresql+asyncpg://"),
        ("sqlite+pysqlite:///x.db", "pysqlite is a sync driver", "sqlite+aiosqlite://"),
        ("postgresql+asyncgp://h/d", "did you mean asyncpg", "postgresql+asyncpg://"),
        ("postgresql+psycopg3://h/d", "did you mean psycopg", "postgresql+psycopg://"),
        ("postgresql+aiosqlite://h/d", "not a driver for postgresql", "postgresql+asyncpg://"),
        ("mysql+aiomysql://h/d", "not mysql", "postgresql+asyncpg://"),
        ("postgesql://h/d", "did you mean postgresql", "postgresql+asyncpg://"),
        ("sqlite+aiosqlite://host/x.db", "names a file", "sqlite+aiosqlite:///"),
    ],
)
def test_a_driver_that_cannot_serve_is_refused_with_the_line_to_write(
    url: str, named: str, remedy: str
) -> None:
    error = refusal_of(url)
    assert named in error.what
    assert remedy in "".join(error.remedies)


@pytest.mark.parametrize(
    ("driver", "extra"), [("asyncpg", "asyncpg"), ("psycopg", "psycopg"), ("aiosqlite", "sqlite")]
)
def test_a_driver_that_is_not_installed_says_what_to_install(
    driver: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, driver, None)
    monkeypatch.delitem(__import__("sys").modules, f"stanch.drivers.{driver}", raising=False)
    backend = "sqlite" if driver == "aiosqlite" else "postgresql"
    error = refusal_of(f"{backend}+{driver}:///d")
    assert isinstance(error, DriverMissing)
    assert error.remedies == (f"pip install 'stanch[{extra}]'",)


BOTH = ("asyncpg", "psycopg")


@pytest.mark.parametrize("driver", BOTH)
@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("sslmode=banana", "sslmode"),
        ("ssl=banana", "ssl"),
        ("sslmod=require", "did you mean sslmode"),
        ("sslmode=", "sslmode is empty"),
        ("sslmode=require&sslmode=disable", "sslmode is given twice"),
        ("ssl=require&sslmode=require", "sslmode is given twice"),
        ("aplication_name=x", "did you mean application_name"),
        ("application_name=" + "x" * 100, "application_name"),
        ("application_name=a%00search_path%00evil", "application_name"),
        ("application_name=caf%C3%A9", "application_name"),
        ("connect_timeout=soon", "connect_timeout"),
        ("connect_timeout=-1", "connect_timeout"),
        ("connect_timeout=0", "connect_timeout"),
        ("connect_timeout=nan", "connect_timeout"),
        ("timeout=30", "timeout"),
        ("statement_timeout=5000", "statement_timeout is a setting of its own"),
        ("pool_size=5", "pool_size is a setting of its own"),
        ("options=evil", "options"),
        ("options=-c%20statement_timeout", "options"),
        ("target_session_attrs=master", "target_session_attrs"),
        ("check_same_thread=false", "an option of SQLite"),
        ("a-b=1", "a name is not a connection option"),
        ("password=hunter2", "password is given twice"),
        ("host=a&host=b", "host is given twice"),
        ("async_fallback=true", "async_fallback"),
    ],
)
def test_an_option_of_the_url_is_judged_the_same_on_both_drivers(driver: str, query: str, named: str) -> None:
    assert named in refusal_of(f"postgresql+{driver}://app:hunter2@h/d?{query}").what


@pytest.mark.parametrize(
    ("driver", "query", "owner"),
    [
        ("asyncpg", "keepalives=1", "psycopg"),
        ("asyncpg", "prepare_threshold=5", "psycopg"),
        ("psycopg", "statement_cache_size=0", "asyncpg"),
        ("psycopg", "prepared_statement_cache_size=0", "asyncpg"),
    ],
)
def test_an_option_of_the_other_driver_says_whose_it_is(driver: str, query: str, owner: str) -> None:
    error = refusal_of(f"postgresql+{driver}://h/d?{query}")
    assert f"is an option of {owner}" in error.what
    assert driver in error.what


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(
            ({"pool_size": value}, "pool_size")
            for value in (-1, 0, True, 2.5, 10**6, 10**5000, "5", None, [5], float("nan"))
        ),
        *(({"max_overflow": value}, "max_overflow") for value in (-5, True, "x", None, 1001)),
        *(
            ({name: value}, name)
            for name in (
                "pool_timeout",
                "connect_timeout",
                "close_timeout",
                "commit_timeout",
                "drain_timeout",
            )
            for value in (-1, 0, float("nan"), float("inf"), "hunter2", None, True, 10**9, 1e-9)
        ),
        *(
            ({name: value}, name)
            for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
            for value in (-1, 0, float("nan"), "30s", False, 0.0001)
        ),
        *(({"pool_recycle": value}, "pool_recycle") for value in ("1h", 0, -2, None, float("inf"))),
        *(
            ({name: value}, name)
            for name in ("pool_pre_ping", "autoflush", "expire_on_commit")
            for value in ("false", 0, None)
        ),
        *(({"echo": value}, "echo") for value in ("true", 1, None)),
        *(({"isolation_level": value}, "isolation_level") for value in ("SERIALISABLE", 4, "", True)),
        *(
            ({"application_name": value}, "application_name")
            for value in ("x" * 64, "a\0b", "a\nb", "", "é", 5)
        ),
        *(({"poolclass": value}, "poolclass") for value in (SingletonThreadPool, "NullPool", A_POOL, int)),
        *(({"pooler": value}, "pooler") for value in ("pgpool", True, 1)),
        ({"engine_options": [("echo", True)]}, "engine_options"),
        ({"engine_options": {"pool_size": 5}}, "pool_size"),
        ({"engine_options": {5: 5}}, "a name"),
        ({"engine_options": {"hide_parameters": "no"}}, "hide_parameters"),
        (
            {"hide_parameters": True, "engine_options": {"hide_parameters": True}},
            "hide_parameters is given twice",
        ),
        ({"execution_options": {"isolation_level": "SERIALIZABLE"}}, "isolation_level"),
        ({"json_serializer": "json.dumps"}, "json_serializer"),
        ({"pool_sise": 5}, "did you mean pool_size"),
        ({"hide_parameter": True}, "did you mean hide_parameters"),
        ({"autocommit": True}, "autocommit"),
        ({"autocommit": False}, "autocommit"),
        ({"pool": object()}, "pool"),
        ({"creator": print}, "creator"),
        ({"async_creator": print}, "async_creator"),
        ({"pool_reset_on_return": None}, "pool_reset_on_return"),
        ({"timeout": 5}, "timeout"),
        ({"max_size": 5}, "max_size"),
        ({"poolclass": NullPool, "max_overflow": 5}, "max_overflow=5 has no pool"),
        ({"poolclass": StaticPool}, "StaticPool"),
        ({"statement_timeout": 5, "lock_timeout": 5}, "lock_timeout=5 never"),
        ({"lock_timeout": 60}, "lock_timeout=60 never"),
        ({"pooler": "pgbouncer", "lock_timeout": 5}, "lock_timeout cannot"),
        ({"pooler": "pgbouncer", "statement_timeout": 30.0}, "statement_timeout cannot"),
    ],
)
def test_a_setting_that_is_wrong_is_named(settings: dict[str, Any], named: str) -> None:
    assert named in refusal_of(GOOD, **settings).what


def test_the_way_out_of_autocommit_is_shown() -> None:
    remedies = "".join(refusal_of(GOOD, autocommit=True).remedies)
    assert 'isolation_level="AUTOCOMMIT"' in remedies
    assert "db.transaction()" in remedies


@pytest.mark.parametrize("driver", BOTH)
@pytest.mark.parametrize(
    ("connect_args", "named"),
    [
        (["a"], "connect_args must be a dict"),
        ("sslmode=require", "connect_args must be a dict"),
        ({"sslmod": "require"}, "did you mean sslmode"),
        ({"timeout": 30}, "timeout"),
        ({"host": "h"}, "host"),
        ({"dsn": "postgresql://app:hunter2@h/d"}, "dsn"),
        ({5: 5}, "names are str"),
        ({"connect_timeout": "30"}, "connect_timeout"),
        ({"application_name": "a\0b"}, "application_name"),
        ({"sslrootcert": "a\nb"}, "sslrootcert"),
        ({"options": 5}, "options"),
        ({"server_settings": {"search_path": "a\0evil"}}, "search_path"),
        ({"server_settings": {"search path": "a"}}, "server_settings"),
        ({"server_settings": {"work_mem": 64}}, "work_mem"),
        ({"server_settings": ["a"]}, "server_settings"),
        ({"password": 5}, "password"),
        ({"autocommit": True}, "autocommit"),
    ],
)
def test_connect_args_are_judged_the_same_on_both_drivers(driver: str, connect_args: Any, named: str) -> None:
    assert named in refusal_of(f"postgresql+{driver}://app:hunter2@h/d", connect_args=connect_args).what


@pytest.mark.parametrize("driver", BOTH)
@pytest.mark.parametrize(
    ("query", "settings", "named"),
    [
        ("?connect_timeout=3", {"connect_timeout": 4}, "connect_timeout is given twice"),
        ("?application_name=a", {"application_name": "b"}, "application_name is given twice"),
        ("?sslmode=require", {"connect_args": {"sslmode": "disable"}}, "sslmode is given twice"),
        (
            "?options=-c%20statement_timeout%3D5",
            {"statement_timeout": 4, "lock_timeout": 1},
            "statement_timeout is given twice",
        ),
        ("?options=-c%20search_path%3Da", {"pooler": "pgbouncer"}, "search_path cannot be sent"),
        (
            "",
            {"pooler": "pgbouncer", "connect_args": {"server_settings": {"work_mem": "1MB"}}},
            "work_mem cannot be sent",
        ),
    ],
)
def test_two_choices_that_differ_are_refused(
    driver: str, query: str, settings: dict[str, Any], named: str
) -> None:
    assert named in refusal_of(f"postgresql+{driver}://h/d{query}", **settings).what


@pytest.mark.parametrize(
    ("url", "settings", "named"),
    [
        ("sqlite:///x.db?sslmode=require", {}, "sslmode"),
        ("sqlite:///x.db?timeout=5", {}, "timeout"),
        ("sqlite:///x.db?isolation_level=IMMEDIATE", {}, "isolation_level"),
        ("sqlite:///x.db?mode=ro", {}, "without uri=true"),
        ("sqlite:///x.db?uri=perhaps", {}, "uri"),
        ("sqlite:///x.db", {"connect_args": {"timeout": 5}}, "timeout"),
        ("sqlite:///x.db", {"connect_args": {"autocommit": False}}, "autocommit"),
        ("sqlite:///x.db", {"connect_args": {"isolation_level": None}}, "isolation_level"),
        ("sqlite:///x.db", {"isolation_level": "REPEATABLE READ"}, "unknown to SQLite"),
        ("sqlite:///x.db", {"pooler": "pgbouncer"}, "pooler"),
        ("sqlite:///x.db", {"poolclass": StaticPool}, "StaticPool"),
        ("sqlite://", {"poolclass": NullPool}, "NullPool"),
        ("sqlite://", {"pool_size": 5}, "pool_size=5"),
        ("sqlite://", {"max_overflow": 5}, "max_overflow=5"),
        ("sqlite://", {"poolclass": StaticPool, "pool_size": 5}, "StaticPool"),
        (URL.create("sqlite+aiosqlite", "app", "hunter2", "h"), {}, "SQLite has no"),
    ],
)
def test_what_sqlite_cannot_honour_is_refused(url: str | URL, settings: dict[str, Any], named: str) -> None:
    assert named in refusal_of(url, **settings).what
