"""The settings: every default is in order, one judge for all, what was chosen beats what is default."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, strategies as st
from sqlalchemy import URL
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool, StaticPool

from stanch.errors import ConfigError
from stanch.settings import ENGINE_OPTIONS, KINDS, Settings, judge_url
from stanch.settings.options import EngineOptions, Options

NOT_JUDGED_BY_KIND = {"engine_options", "given"}


def test_every_setting_has_a_kind_a_default_in_order_and_an_example_in_order() -> None:
    assert set(Settings.__annotations__) - NOT_JUDGED_BY_KIND == set(KINDS)
    defaults = Settings()
    for name, kind in KINDS.items():
        assert kind.judge(getattr(defaults, name)) == getattr(defaults, name)
        example = eval(kind.example, {"NullPool": NullPool})
        Settings.judge(**{name: example}, **({"lock_timeout": None} if name == "statement_timeout" else {}))


def test_every_default_has_its_reason_in_the_docstring() -> None:
    """The reference is made of it."""
    assert Settings.__doc__ is not None
    for name in KINDS:
        assert re.search(rf"``{name}`` = .{{3,}}|``{name}=\"pgbouncer\"`` \(None\)", Settings.__doc__), name


def test_every_setting_is_where_people_look_for_it() -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "settings.md").read_text(encoding="utf-8")
    rows = "\n".join(line.partition(" | ")[0] for line in page.splitlines() if line.startswith("| "))
    assert [name for name in KINDS if f"`{name}`" not in rows] == []


def test_what_an_editor_knows_is_what_there_is() -> None:
    """``Database`` is typed with ``Options``; the judge of a setting is its kind."""
    assert set(Options.__annotations__) == set(KINDS) | set(ENGINE_OPTIONS) | {"engine_options"}
    assert set(EngineOptions.__annotations__) == set(ENGINE_OPTIONS)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        Settings.judge(pool_size=-1, pool_timeout="x", pool_sise=3, autocommit=True, connect_args=[])
    for name in ("pool_size", "pool_timeout", "pool_sise", "autocommit", "connect_args"):
        assert name in refusal.value.what
    assert len(refusal.value.remedies) >= 5


def test_settings_made_by_hand_are_judged_as_well() -> None:
    with pytest.raises(ConfigError, match="pool_size"):
        Settings(pool_size=0)
    with pytest.raises(ConfigError, match="max_overflow"):
        Settings().replaced(max_overflow=-1)


def test_numbers_become_what_is_declared_and_words_their_usual_form() -> None:
    settings = Settings.judge(pool_timeout=3, isolation_level="repeatable_read", pooler="PgBouncer")
    assert (settings.pool_timeout, type(settings.pool_timeout)) == (3.0, float)
    assert settings.isolation_level == "REPEATABLE READ"
    assert settings.pooler == "pgbouncer"


def test_server_timeouts_are_sent_as_whole_milliseconds() -> None:
    settings = Settings.judge(
        statement_timeout=1.5, lock_timeout=0.001, idle_in_transaction_session_timeout=None
    )
    assert settings.server_timeouts == {"statement_timeout": "1500", "lock_timeout": "1"}


def test_null_pool_keeps_nothing_idle_and_is_bounded_by_pool_size() -> None:
    settings = Settings.judge(poolclass=NullPool, pool_size=7)
    assert (settings.keeps_idle, settings.pool_size, settings.max_overflow) == (False, 7, 0)


@pytest.mark.parametrize("poolclass", [None, QueuePool, AsyncAdaptedQueuePool, StaticPool])
def test_every_other_pool_class_keeps_connections(poolclass: type | None) -> None:
    assert Settings.judge(poolclass=poolclass).keeps_idle


def test_behind_pgbouncer_no_default_is_sent_that_it_would_refuse() -> None:
    assert Settings.judge(pooler="pgbouncer").server_timeouts == {}
    assert Settings(pooler="pgbouncer").server_timeouts == {}
    with pytest.raises(ConfigError, match=r"statement_timeout.*PgBouncer") as refusal:
        Settings.judge(pooler="pgbouncer", statement_timeout=30.0)
    assert "ALTER ROLE" in refusal.value.remedies[0]


def test_the_default_lock_timeout_gives_way_to_a_shorter_statement_timeout() -> None:
    assert Settings.judge(statement_timeout=5).lock_timeout is None
    assert Settings.judge(statement_timeout=11).lock_timeout == 10.0


def test_names_of_create_async_engine_are_engine_options_wherever_they_are_given() -> None:
    direct = Settings.judge(hide_parameters=False, connect_args={"sslmode": "require"})
    inside = Settings.judge(engine_options={"hide_parameters": False, "connect_args": {"sslmode": "require"}})
    assert dict(direct.engine_options) == dict(inside.engine_options)
    assert direct == inside
    assert isinstance(direct.engine_options, MappingProxyType)


def test_no_repr_shows_what_connect_args_hold() -> None:
    assert "hunter2" not in repr(Settings.judge(connect_args={"password": "hunter2"}))


def test_given_is_what_somebody_chose() -> None:
    assert Settings.judge(pool_size=5).given == {"pool_size"}
    assert Settings().given == set()


# From the environment -------------------------------------------------------------------------------------


def test_the_environment_says_the_same_as_python() -> None:
    url, chosen = Settings.from_environ(
        {
            "DATABASE_URL": "postgresql+asyncpg://localhost/shop",
            "STANCH_POOL_SIZE": "20",
            "STANCH_POOL_RECYCLE": "-1",
            "STANCH_POOL_PRE_PING": "Yes",
            "STANCH_POOLCLASS": "NullPool",
            "STANCH_ECHO": "debug",
            "STANCH_ISOLATION_LEVEL": "serializable",
            "STANCH_STATEMENT_TIMEOUT": "2.5",
            "STANCH_LOCK_TIMEOUT": "none",
            "STANCH_APPLICATION_NAME": "shop",
            "STANCH_REQUIRE": "all",
            "PATH": "/bin",
        }
    )
    assert url == "postgresql+asyncpg://localhost/shop"
    assert Settings.judge(**chosen) == Settings.judge(
        pool_size=20,
        pool_recycle=-1,
        pool_pre_ping=True,
        poolclass=NullPool,
        echo="debug",
        isolation_level="SERIALIZABLE",
        statement_timeout=2.5,
        lock_timeout=None,
        application_name="shop",
    )


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("on", True), ("FALSE", False), ("0", False)]
)
def test_a_switch_has_one_strict_parser(text: str, value: bool) -> None:
    _, chosen = Settings.from_environ(
        {"DATABASE_URL": "sqlite://", "STANCH_ECHO": text, "STANCH_AUTOFLUSH": text}
    )
    assert chosen == {"echo": value, "autoflush": value}


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("STANCH_POOL_PRE_PING", "maybe"),
        ("STANCH_POOL_PRE_PING", ""),
        ("STANCH_POOL_SIZE", "5.0"),
        ("STANCH_POOL_SIZE", "1_000"),
        ("STANCH_POOL_SIZE", " 5"),
        ("STANCH_POOL_SIZE", "\u0665"),
        ("STANCH_POOL_TIMEOUT", "1h"),
        ("STANCH_POOL_TIMEOUT", "nan"),
        ("STANCH_POOL_TIMEOUT", "inf"),
        ("STANCH_POOL_TIMEOUT", "none"),
        ("STANCH_POOLCLASS", "SingletonThreadPool"),
        ("STANCH_ISOLATION_LEVEL", "SERIALISABLE"),
        ("STANCH_APPLICATION_NAME", "a\nb"),
        ("STANCH_PASSWORD", "hunter2"),
        ("STANCH_POOL_SISE", "5"),
        ("STANCH_ENGINE_OPTIONS", "{}"),
        ("STANCH_GIVEN", "pool_size"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(variable: str, text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Settings.from_environ({"DATABASE_URL": "sqlite://", variable: text})
    assert variable in refusal.value.what
    assert "hunter2" not in str(refusal.value)
    assert refusal.value.__context__ is None


def test_a_misspelt_variable_is_told_what_was_meant() -> None:
    with pytest.raises(ConfigError, match="STANCH_POOL_SIZE"):
        Settings.from_environ({"DATABASE_URL": "sqlite://", "STANCH_POOL_SISE": "5"})


@pytest.mark.parametrize("environ", [{}, {"DATABASE_URL": ""}])
def test_a_missing_database_url_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL"):
        Settings.from_environ(environ)


# URLs -----------------------------------------------------------------------------------------------------


class Secret:
    """As pydantic's SecretStr."""

    def get_secret_value(self) -> str:
        return "postgresql://app:pw@h/d"


class Dsn:
    """As pydantic's PostgresDsn."""

    def unicode_string(self) -> str:
        return "postgresql://app:pw@h/d"


@pytest.mark.parametrize(
    "url", ["postgresql://app:pw@h/d", URL.create("postgresql", "app", "pw", "h", None, "d"), Secret(), Dsn()]
)
def test_every_way_to_hand_over_a_url_gives_the_same(url: object) -> None:
    judged = judge_url(url)
    assert judged == URL.create("postgresql", "app", "pw", "h", None, "d")
    assert "pw" not in repr(judged)


def test_real_pydantic_urls_are_understood() -> None:
    pydantic = pytest.importorskip("pydantic")
    dsn = pydantic.PostgresDsn("postgresql+asyncpg://app:p%40w@h1:5432,h2:5433/d")
    assert judge_url(dsn).password == "p@w"
    assert judge_url(dsn).query == {"host": ("h1:5432", "h2:5433")}
    assert judge_url(pydantic.SecretStr("postgresql://app:pw@h/d")).password == "pw"


@pytest.mark.parametrize(
    ("text", "part", "value"),
    [
        ("postgres://h/d", "drivername", "postgresql"),
        ("postgres+asyncpg://h/d", "drivername", "postgresql+asyncpg"),
        ("postgresql://u:p%40%2F%3F%23%25s@h/d", "password", "p@/?#%s"),
        ("postgresql://u:a+b@h/d", "password", "a+b"),
        ("postgresql://u:a:b@h/d", "password", "a:b"),
        ("postgresql://u%40x@h/d", "username", "u@x"),
        ("postgresql://u@[::1]:5433/d", "host", "::1"),
        ("postgresql://u@[::1]:5433/d", "port", 5433),
        ("postgresql://h:65535/d", "port", 65535),
        ("postgresql:///d?host=/var/run/postgresql", "host", None),
        ("postgresql://h/d?password=pw", "password", "pw"),
        ("postgresql://h?user=u&dbname=d", "database", "d"),
        ("postgresql://h/my%20shop", "database", "my shop"),
        ("sqlite:////srv/my shop.db", "database", "/srv/my shop.db"),
        ("sqlite://", "database", None),
    ],
)
def test_a_url_in_order_is_read_as_it_is_meant(text: str, part: str, value: object) -> None:
    assert getattr(judge_url(text), part) == value


def test_a_password_in_the_query_is_masked_like_any_other() -> None:
    url = judge_url("postgresql://app@h/d?password=hunter2&application_name=x")
    assert "hunter2" not in repr(url)
    assert url.query == {"application_name": "x"}


@given(
    st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12),
)
def test_every_url_that_sqlalchemy_renders_comes_back_the_same(user: str, password: str) -> None:
    url = URL.create("postgresql+asyncpg", user, password, "h.example", 5433, "shop")
    assert judge_url(url.render_as_string(hide_password=False)) == url


@given(st.text(max_size=40))
def test_no_text_gets_any_other_error_than_a_config_error(text: str) -> None:
    for prefix in ("", "postgresql://", "postgresql://u:pw@h/", "sqlite:///", "postgresql://h/d?"):
        with suppress(ConfigError):
            judge_url(prefix + text)
