"""The one app that every subject serves: its tables, its requests, and the work of each as one would write it.

A subject adds only what is its own: where a session comes from, and who commits.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import ForeignKey, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

ROWS: Final = 1000
"""Rows that can be read; their ids begin with 1."""
ELSEWHERE: Final = 0.05
"""Seconds that the call of another service takes."""
ITEMS, ORDERS, LINES = "bench_items", "bench_orders", "bench_lines"
"""The tables."""


class Base(DeclarativeBase):
    """The models."""


class Item(Base):
    """What is read, one row or five; and written, one row."""

    __tablename__ = ITEMS
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[int]


class Order(Base):
    """What is written to two tables."""

    __tablename__ = ORDERS
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    lines: Mapped[list[Line]] = relationship(back_populates="order")


class Line(Base):
    """One of the two lines of each order."""

    __tablename__ = LINES
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
    item: Mapped[str]
    order: Mapped[Order] = relationship(back_populates="lines")


Reply = dict[str, int | str]


class Ask(NamedTuple):
    """One kind of request. ``{id}`` in *path* is the row it reads."""

    title: str
    method: str
    path: str
    writes: bool = False

    def path_of(self, number: int) -> str:
        """Where the request of this *number* goes: over all rows, in turn."""
        return self.path.format(id=number % ROWS + 1)


class Kind(Enum):
    """The kinds of request, and where each is served."""

    BARE = Ask("endpoint without a session", "GET", "/bare/{id}")
    UNUSED = Ask("session, unused", "GET", "/unused/{id}")
    READ = Ask("one-row read", "GET", "/items/{id}")
    WRITE = Ask("one-row write", "POST", "/items/{id}", writes=True)
    SLOW = Ask("read, then a slow call elsewhere", "GET", "/slow/{id}")
    FIVE = Ask("5 reads", "GET", "/five/{id}")
    ORDER = Ask("ORM write, two tables", "POST", "/orders/{id}", writes=True)

    @property
    def ask(self) -> Ask:
        """The request."""
        return self.value


async def read(session: AsyncSession, number: int) -> Reply:
    """One row, by its primary key."""
    item = (await session.scalars(select(Item).where(Item.id == number))).one()
    return {"id": item.id, "name": item.name}


async def write(session: AsyncSession, number: int) -> Reply:
    """One row, in one statement."""
    await session.execute(insert(Item).values(name="new", price=number))
    return {"id": number, "name": "new"}


async def slow(session: AsyncSession, number: int) -> Reply:
    """One row; then something that is not the database."""
    reply = await read(session, number)
    await asyncio.sleep(ELSEWHERE)
    return reply


def five_of(number: int) -> list[int]:
    """The ids of the five rows that the request of this *number* reads."""
    return [(number + step) % ROWS + 1 for step in range(5)]


async def five(session: AsyncSession, number: int) -> Reply:
    """Five rows, one after the other."""
    names = [(await read(session, each))["name"] for each in five_of(number)]
    return {"id": number, "name": str(names[-1])}


async def order(session: AsyncSession, number: int) -> Reply:
    """An order and its two lines, by the unit of work of the ORM."""
    new = Order(customer=f"customer {number}", lines=[Line(item="tea"), Line(item="milk")])
    session.add(new)
    await session.flush()
    return {"id": new.id, "name": new.customer}


async def prepare(connection: AsyncConnection) -> None:
    """Make the tables, with nothing but the rows that are read."""
    await connection.run_sync(Base.metadata.drop_all)
    await connection.run_sync(Base.metadata.create_all)
    await connection.execute(
        insert(Item), [{"name": f"item {number}", "price": number} for number in range(ROWS)]
    )
