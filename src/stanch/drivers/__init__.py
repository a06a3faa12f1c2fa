"""Makes the same settings and the same URL mean the same on asyncpg, psycopg and aiosqlite.

Importing this package imports no driver: each is loaded when a URL or an engine asks for it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, cast

from stanch.drivers.base import READ_ONLY_KEY, Driver, Plan
from stanch.errors import ConfigError, DriverMissing
from stanch.settings.kinds import meant, named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["READ_ONLY_KEY", "Driver", "Plan", "driver_of", "driver_of_engine"]

_MODULES: Final[Mapping[str, str]] = {
    "asyncpg": "asyncpg",
    "psycopg": "psycopg",
    "psycopg_async": "psycopg",
    "aiosqlite": "aiosqlite",
}
_BACKENDS: Final[Mapping[str, tuple[str, ...]]] = {
    "postgresql": ("asyncpg", "psycopg", "psycopg_async"),
    "sqlite": ("aiosqlite",),
}
_EXTRAS: Final[Mapping[str, str]] = {"asyncpg": "asyncpg", "psycopg": "psycopg", "aiosqlite": "sqlite"}
_SYNC: Final = frozenset(
    {"psycopg2", "psycopg2cffi", "pg8000", "pypostgresql", "pygresql", "pysqlite", "pysqlcipher"}
)
_OTHER_DATABASES: Final = frozenset(
    {"mysql", "mariadb", "oracle", "mssql", "cockroachdb", "duckdb", "snowflake"}
)


def driver_of(url: URL) -> Driver:
    """The driver that serves *url*.

    ``postgresql://`` without a driver is asyncpg if that is installed, else psycopg; SQLAlchemy 2.1 would take
    psycopg and 2.0 the sync psycopg2. ``sqlite://`` is aiosqlite. Raises `DriverMissing`, saying what to install,
    and `ConfigError` for a sync driver, another database and an unknown name.

    >>> from sqlalchemy import make_url
    >>> driver_of(make_url("postgresql://localhost/shop")).name
    'asyncpg'
    """
    backend, _, driver = url.drivername.partition("+")
    if backend not in _BACKENDS:
        raise ConfigError(
            f"url: stanch serves PostgreSQL and SQLite, not {named(backend)}{meant(backend, _BACKENDS)}",
            remedies=["Write postgresql+asyncpg://, postgresql+psycopg:// or sqlite+aiosqlite://."],
        )
    known = _BACKENDS[backend]
    if driver in _SYNC:
        raise ConfigError(
            f"url: {driver} is a sync driver, and this database is async",
            remedies=[f"Write {backend}+{known[0]}:// instead of {backend}+{driver}://."],
        )
    if driver and driver not in known:
        raise ConfigError(
            f"url: {named(driver)} is not a driver for {backend}{meant(driver, known)}",
            remedies=["Write " + " or ".join(f"{backend}+{each}://" for each in known[:2]) + "."],
        )
    return _loaded(driver or next((each for each in known if find_spec(each)), known[0]))


def driver_of_engine(engine: AsyncEngine) -> Driver:
    """The driver of an existing engine, whatever its URL is called. Raises `ConfigError` if it is none of ours."""
    driver = engine.dialect.driver
    if driver not in _MODULES:
        raise ConfigError(
            f"engine: stanch does not know the driver {named(driver)} of {named(engine.dialect.name)}",
            remedies=["Make the engine for postgresql+asyncpg, postgresql+psycopg or sqlite+aiosqlite."],
        )
    return _loaded(driver)


def _loaded(driver: str) -> Driver:
    name = _MODULES[driver]
    try:
        module = import_module(f"stanch.drivers.{name}")
    except ImportError as error:
        if error.name is not None and error.name.startswith("stanch"):
            raise
        broken = find_spec(name) is not None  # psycopg without its libpq
        raise DriverMissing(
            f"the driver {name} is " + ("installed, but cannot be loaded" if broken else "not installed"),
            remedies=[f"pip install 'stanch[{_EXTRAS[name]}]'"],
        ) from error
    return cast("Driver", module.DRIVER)
