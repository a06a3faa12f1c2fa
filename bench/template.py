"""The shop as in the full-stack-fastapi-template, which is SQLModel's way with FastAPI.

From it are: ``def`` endpoints, which FastAPI runs in threads; a dependency that yields the ``Session`` of a ``with``;
endpoints that commit themselves; psycopg. Its ``refresh`` after a commit is left out: no reply shows what it reads.
The statements are those of ``bench.shop``, on SQLModel's models of the same tables.
"""

# Not `from __future__ import annotations`: SQLModel and FastAPI evaluate them.

import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from sqlalchemy import insert
from sqlmodel import Field, Relationship, Session, SQLModel, create_engine, select

from bench import shop
from bench.shop import Reply


class Item(SQLModel, table=True):
    """See ``bench.shop.Item``."""

    __tablename__ = shop.ITEMS  # pyright: ignore[reportAssignmentType]  # as its own documentation does
    id: int | None = Field(default=None, primary_key=True)
    name: str
    price: int


class Order(SQLModel, table=True):
    """See ``bench.shop.Order``."""

    __tablename__ = shop.ORDERS  # pyright: ignore[reportAssignmentType]  # as its own documentation does
    id: int | None = Field(default=None, primary_key=True)
    customer: str
    lines: list["Line"] = Relationship(back_populates="order")


class Line(SQLModel, table=True):
    """See ``bench.shop.Line``."""

    __tablename__ = shop.LINES  # pyright: ignore[reportAssignmentType]  # as its own documentation does
    id: int | None = Field(default=None, primary_key=True)
    order_id: int | None = Field(default=None, foreign_key=f"{shop.ORDERS}.id")
    item: str
    order: Order | None = Relationship(back_populates="lines")


def read_from(session: Session, number: int) -> Reply:
    """See ``bench.shop.read``."""
    item = session.exec(select(Item).where(Item.id == number)).one()
    return {"id": number, "name": item.name}


def add_routes(app: FastAPI, url: str, **pool: Any) -> None:
    """The handlers, on an engine of their own."""
    engine = create_engine(url, **pool)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        engine.dispose()

    app.router.lifespan_context = lifespan

    def get_db() -> Generator[Session]:
        with Session(engine) as session:
            yield session

    in_session: Any = Depends(get_db)

    @app.get("/unused/{number}")
    def unused(number: int, _session: Session = in_session) -> Reply:
        return {"id": number, "name": "nothing"}

    @app.get("/items/{number}")
    def read(number: int, session: Session = in_session) -> Reply:
        return read_from(session, number)

    @app.post("/items/{number}")
    def write(number: int, session: Session = in_session) -> Reply:
        session.exec(insert(Item).values(name="new", price=number))
        session.commit()
        return {"id": number, "name": "new"}

    @app.get("/slow/{number}")
    def slow(number: int, session: Session = in_session) -> Reply:
        reply = read_from(session, number)
        time.sleep(shop.ELSEWHERE)
        return reply

    @app.get("/five/{number}")
    def five(number: int, session: Session = in_session) -> Reply:
        names = [read_from(session, each)["name"] for each in shop.five_of(number)]
        return {"id": number, "name": names[-1]}

    @app.post("/orders/{number}")
    def order(number: int, session: Session = in_session) -> Reply:
        new = Order(customer=f"customer {number}", lines=[Line(item="tea"), Line(item="milk")])
        session.add(new)
        session.flush()
        reply: Reply = {"id": new.id or 0, "name": new.customer}
        session.commit()
        return reply
