"""The outside judge: reads the truth from the server over a connection that stanch knows nothing of."""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, Self
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stanch.embedded import EmbeddedPostgres

asyncpg = import_module("asyncpg")  # it ships no types: what is used of it is RawConnection

POLL_INTERVAL = 0.02
"""Seconds between two looks at the server."""

OTHERS = """
    pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
"""For a FROM: the connections of all others. An autovacuum worker is none, although it is in there, and active."""

ACTIVITY = f"""
    SELECT pid, state, application_name, wait_event_type, wait_event, query,
           backend_start, xact_start, state_change
    FROM {OTHERS}
    ORDER BY backend_start
"""


class Row(Protocol):
    """An asyncpg record: read by name or by place."""

    def __getitem__(self, key: str | int, /) -> Any: ...
    def get(self, key: str, /) -> Any: ...
    def values(self) -> Any: ...


class RawConnection(Protocol):
    """What the judge uses of an asyncpg connection."""

    async def fetch(self, query: str, /, *args: object) -> list[Row]: ...
    async def fetchval(self, query: str, /, *args: object) -> Any: ...
    async def execute(self, query: str, /, *args: object) -> str: ...
    async def close(self, *, timeout: float | None = None) -> None: ...
    def terminate(self) -> None: ...
    def is_closed(self) -> bool: ...
    def get_server_pid(self) -> int: ...


async def raw_connect(dsn: str) -> RawConnection:
    """A plain asyncpg connection, by a libpq URL."""
    settings = {"application_name": "judge"}
    connection: RawConnection = await asyncpg.connect(dsn, timeout=10, server_settings=settings)
    return connection


class Stats(Protocol):
    """The two figures of ``db.stats()`` that must be zero when nothing is left."""

    @property
    def in_use(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class Counted(Protocol):
    """A ``stanch.Database``, as far as the leak check needs it."""

    def stats(self) -> Stats: ...


class FreshDatabase:
    """A database of one test's own, with a judge connected to it."""

    def __init__(self, server: EmbeddedPostgres, name: str, judge: RawConnection) -> None:
        self._server = server
        self.name = name
        self._judge = judge

    @classmethod
    async def create(cls, server: EmbeddedPostgres) -> Self:
        name = f"test_{uuid4().hex[:12]}"
        admin = await raw_connect(server.url(None))
        try:
            await admin.execute(f'CREATE DATABASE "{name}" STRATEGY FILE_COPY')
        finally:
            await admin.close()
        return cls(server, name, await raw_connect(server.url(None, name)))

    async def drop(self) -> None:
        """Drop it, whoever is still connected."""
        self._judge.terminate()
        admin = await raw_connect(self._server.url(None))
        try:
            await admin.execute(f'DROP DATABASE IF EXISTS "{self.name}" WITH (FORCE)')
        finally:
            await admin.close()

    @property
    def server(self) -> EmbeddedPostgres:
        return self._server

    def url(self, driver: str | None = "asyncpg") -> str:
        """SQLAlchemy's URL with *driver*, libpq's with None."""
        return self._server.url(driver, self.name)

    async def fetch(self, sql: str, *args: object) -> list[Row]:
        return await (await self._connection()).fetch(sql, *args)

    async def fetchval(self, sql: str, *args: object) -> Any:
        return await (await self._connection()).fetchval(sql, *args)

    async def execute(self, sql: str, *args: object) -> str:
        """Run SQL, several statements if there are no arguments; returns the command tag of the last one."""
        return await (await self._connection()).execute(sql, *args)

    async def activity(self) -> list[Row]:
        """What the server knows of the connections to this database, the judge's own left out."""
        return await self.fetch(ACTIVITY)

    async def _connection(self) -> RawConnection:
        if self._judge.is_closed():  # the test has killed the server, or all of its backends
            self._judge = await raw_connect(self.url(None))
        return self._judge


async def until(judged: FreshDatabase, sql: str, *args: object, timeout: float = 5.0) -> list[Row]:
    """Wait until *sql* gives at least one row, and return its rows; fails after *timeout* seconds."""
    try:
        async with asyncio.timeout(timeout):
            while not (rows := await judged.fetch(sql, *args)):  # noqa: ASYNC110  # the event is in another process
                await asyncio.sleep(POLL_INTERVAL)
            return rows
    except TimeoutError:
        raise AssertionError(f"no row within {timeout} s: {sql}") from None


async def assert_nothing_left(
    judged: FreshDatabase, db: Counted | None = None, *, timeout: float = 5.0
) -> None:
    """Nothing is idle in transaction on the server and, given *db*, nothing checked out or waiting.

    Both get *timeout* seconds to become true: a severed connection ends on the server a moment later.
    """
    deadline = asyncio.get_running_loop().time() + timeout
    while left := await _left(judged, db):
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"still there after {timeout} s: " + "; ".join(left))
        await asyncio.sleep(POLL_INTERVAL)


async def _left(judged: FreshDatabase, db: Counted | None) -> Sequence[str]:
    rows = await judged.activity()
    stuck = [row for row in rows if str(row["state"]).startswith("idle in transaction")]
    left = [f"backend {row['pid']} is {row['state']}, last statement {row['query']!r}" for row in stuck]
    if db is not None:
        stats = db.stats()
        counts: Mapping[str, int] = {"in_use": stats.in_use, "waiting": stats.waiting}
        left += [f"{name} is {count}" for name, count in counts.items() if count]
    return left
