"""What a user writes about a ``Database``, as a type checker sees it. Never run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

from sqlalchemy import URL, select, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool
from sqlmodel import Field, SQLModel, select as sqlmodel_select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from stanch import Database, Failure, Kind, Stats, classify, rollback_only
from stanch.events import Event


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str


class ShopSession(AsyncSession):
    async def orders(self) -> list[Order]:
        return list(await self.scalars(select(Order)))


db = Database("postgresql+asyncpg://app@localhost/shop", pool_size=20, max_overflow=5, pool_timeout=2.5)
assert_type(db, Database[AsyncSession])
assert_type(Database(URL.create("postgresql"), name="billing", poolclass=NullPool), Database[AsyncSession])
assert_type(Database(create_async_engine("sqlite+aiosqlite://"), adopt=False), Database[AsyncSession])
assert_type(Database.from_env(), Database[AsyncSession])
assert_type(Database.from_env({"DATABASE_URL": "sqlite://"}, name="shop"), Database[AsyncSession])

shop = Database("postgresql://localhost/shop", session_class=ShopSession, echo=True)
assert_type(shop, Database[ShopSession])
heroes = Database("postgresql://localhost/heroes", session_class=SQLModelSession)
assert_type(heroes, Database[SQLModelSession])


async def plain() -> None:
    async with db.session() as session:
        assert_type(session, AsyncSession)
        session.add(Order(item="a"))
        await session.commit()
    async with db.transaction(isolation_level="SERIALIZABLE", read_only=True) as session:
        assert_type(session, AsyncSession)
        assert_type((await session.scalars(select(Order.item))).all(), Sequence[str])
        rollback_only(session)
    async with db.connect() as connection:
        assert_type(connection, AsyncConnection)
        await connection.execute(text("SELECT 1"))
    async with db.begin() as connection:
        assert_type(connection, AsyncConnection)


async def typed_through() -> list[Order]:
    async with shop.session() as session:
        assert_type(session, ShopSession)
    async with shop.transaction() as session:
        assert_type(session, ShopSession)
    async with shop.session_factory() as session:
        assert_type(session, ShopSession)
    async with shop.session_factory.begin() as session:
        return await session.orders()


async def with_sqlmodel() -> list[Hero]:
    async with heroes.transaction() as session:
        session.add(Hero(name="x"))
        return list(await session.exec(sqlmodel_select(Hero)))


async def without_sqlmodel() -> None:
    async with db.session() as session:
        await session.exec(sqlmodel_select(Hero))  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # a plain session has none


async def life() -> None:
    async with db as opened:
        assert_type(opened, Database[AsyncSession])
    assert_type(await shop.open(wait=5.0), Database[ShopSession])
    await shop.close()
    async with db.lifespan():
        pass


def look(event: Event) -> None:
    print(event.database, event)


def facts() -> None:
    assert_type(db.stats(), Stats)
    assert_type(db.stats().in_use, int)
    assert_type(db.engine, AsyncEngine)
    assert_type(db.name, str)
    assert_type(db.settings.pool_size, int)
    assert_type(shop.session_factory, async_sessionmaker[ShopSession])
    db.observe(look)
    db.observe(print)


def what_it_means(error: Exception) -> bool:
    failure = classify(error)
    assert_type(failure, Failure | None)
    return failure is not None and failure.kind is Kind.CONFLICT and failure.constraint == "orders_item_key"


def any_of(databases: list[Database[Any]]) -> list[Database[Any]]:
    return [*databases, db, shop, heroes]


async def mistakes() -> None:
    async with db.transaction(isolation_level="SERIALISABLE"):  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # misspelt
        pass
    Database("sqlite://", session_class=dict)  # type: ignore[type-var] # pyright: ignore[reportArgumentType]  # no session at all
    await db.stats()  # type: ignore[misc] # pyright: ignore[reportGeneralTypeIssues]  # counting is no I/O
