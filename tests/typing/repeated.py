"""What a user writes to have work done again, or several things at once, as a type checker sees it. Never run."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, assert_type

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import Attempt, Database, Retry, attempt_of


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class ShopSession(AsyncSession):
    async def orders(self) -> list[Order]:
        return list(await self.scalars(select(Order)))


db = Database("postgresql+asyncpg://app@localhost/shop")
shop = Database("postgresql://localhost/shop", session_class=ShopSession)


async def transfer(session: AsyncSession, source: int, target: str) -> float:
    assert_type(attempt_of(session), Attempt)
    assert_type(attempt_of(session).number, int)
    assert_type(attempt_of(session).maybe_committed, bool)
    await session.execute(text("SELECT 1"), {"source": source, "target": target})
    return 1.5


async def orders_of(session: ShopSession) -> list[Order]:
    return await session.orders()


async def repeated() -> None:
    assert_type(await db.run_transaction(transfer, 1, "b"), float)
    assert_type(await db.run_transaction(transfer, 1, "b", retry=5, isolation_level="SERIALIZABLE"), float)
    assert_type(await db.run_transaction(transfer, 1, "b", retry=Retry(attempts=5, timeout=2)), float)
    assert_type(await shop.run_transaction(orders_of), list[Order])
    assert_type(await shop.run_transaction(transfer, 1, "b"), float)


@db.transactional(retry=5, isolation_level="SERIALIZABLE")
async def pay(session: AsyncSession, source: int, /, *, amount: float = 1.0) -> str:
    return await session.scalar(text("SELECT 1"), {"source": source, "amount": amount}) or ""


@shop.transactional()
async def load(session: ShopSession, limit: int) -> list[Order]:
    return (await session.orders())[:limit]


async def services() -> None:
    assert_type(await pay(1), str)
    assert_type(await pay(1, amount=2.0), str)
    assert_type(await load(limit=5), list[Order])


async def number(_session: AsyncSession) -> int:
    return 1


async def name(_session: AsyncSession) -> str:
    return "a"


async def at_once() -> None:
    assert_type(await db.gather(number, name), tuple[int, str])
    assert_type(await db.gather(number, name, number, transaction=True), tuple[int, str, int])
    assert_type(
        await db.gather(number, name, number, name, number, name), tuple[int, str, int, str, int, str]
    )
    assert_type(await shop.gather(orders_of, name), tuple[list[Order], str])
    assert_type(await db.gather(*[number, number]), tuple[int, ...])
    numbers, names = await db.gather(number, name)
    assert_type(numbers, int)
    assert_type(names, str)


def answer(session: AsyncSession) -> int:
    return id(session)


def later(session: AsyncSession) -> Awaitable[int]:
    return number(session)


async def mistakes() -> None:
    assert_type(await db.run_transaction(later), int)
    await db.run_transaction(transfer, "a", "b")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # an int is asked for
    await db.run_transaction(transfer, 1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # one is missing
    await db.run_transaction(answer)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # nothing to await
    await db.run_transaction(orders_of)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # another session class
    await pay("a")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # an int is asked for
    await pay(session, 1)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]  # the session is gone
    await db.gather(number(session), name)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue, reportArgumentType]  # a coroutine
    Retry(5)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]  # 5 of what?


session: Any = None
