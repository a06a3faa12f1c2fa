"""A table of numbers on each backend, and the truth about it, read by a connection that stanch knows nothing of."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import Database
from tests.support.judge import assert_nothing_left

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncSession

    from stanch.events import Event
    from tests.support.judge import FreshDatabase

TABLE = "CREATE TABLE numbers (id int PRIMARY KEY, CHECK (id >= 0))"


class Base(DeclarativeBase):
    pass


class Number(Base):
    __tablename__ = "numbers"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


async def put(session: AsyncSession, *numbers: int) -> None:
    """Write *numbers* by raw text, one statement each."""
    for number in numbers:
        await session.execute(text("INSERT INTO numbers VALUES (:number)"), {"number": number})


class Numbers:
    """A ``Database`` with the table, what it tells, and what is stored."""

    def __init__(self, judge: FreshDatabase, file: Path, backend: str) -> None:
        self.backend = backend
        self.judge = judge
        self._file = file
        self.told: list[Event] = []
        self.db = self.database()

    def database(self, **settings: Any) -> Database[AsyncSession]:
        """One more ``Database`` over the same table."""
        chosen: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 5.0} | settings
        url = f"sqlite+aiosqlite:///{self._file}" if self.is_sqlite else self.judge.url(self.backend)
        database = Database(url, **chosen)
        database.observe(self.told.append)
        return database

    @property
    def is_sqlite(self) -> bool:
        return self.backend == "sqlite"

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events that were told."""
        return [type(event).__name__ for event in self.told]

    async def create(self) -> None:
        if self.is_sqlite:
            self._ask(TABLE)
        else:
            await self.judge.execute(TABLE)

    async def stored(self) -> list[int]:
        if self.is_sqlite:
            return self._ask("SELECT id FROM numbers ORDER BY id")
        return [row["id"] for row in await self.judge.fetch("SELECT id FROM numbers ORDER BY id")]

    async def assert_clean(self) -> None:
        assert (self.db.stats().in_use, self.db.stats().waiting) == (0, 0)
        await assert_nothing_left(self.judge, self.db)

    def _ask(self, sql: str) -> list[int]:
        connection = sqlite3.connect(self._file)
        try:
            with connection:
                return [row[0] for row in connection.execute(sql)]
        finally:
            connection.close()
