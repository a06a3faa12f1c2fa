"""The shop: a small FastAPI app on stanch, as one would write it, with handlers for good and for bad days."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence  # noqa: TC003  # FastAPI evaluates annotations at run time
from contextlib import suppress
from datetime import datetime  # noqa: TC003  # SQLAlchemy evaluates annotations at run time
from enum import StrEnum
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, FastAPI, HTTPException, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ForeignKey, func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession  # noqa: TC002  # the type of a parameter of plain helpers as well
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import Database  # noqa: TC001  # what the app is made of belongs at its head
from stanch.fastapi import ReaderDep, SessionDep, install

WORKSHOP_ANSWERS_AFTER: Final = 0.12
"""Seconds that the workshop takes to name a price."""

TICK: Final = 0.05
"""Seconds between two lines of the ticker."""

PAGE: Final = "/_stanch"
"""Where the shop shows what its connections do."""

# What is stored -------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    """All tables of the shop."""


class Item(Base):
    """Something to buy."""

    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[int]


class Order(Base):
    """An order. Whether its item exists is checked at COMMIT, as in shops that load both in one transaction."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("items.id", deferrable=True, initially="DEFERRED"))
    quantity: Mapped[int]
    price: Mapped[int] = mapped_column(default=0)
    placed_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Movement(Base):
    """What an order takes from the stock. One without the other is a half-written order."""

    __tablename__ = "movements"

    order_id: Mapped[UUID] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    quantity: Mapped[int]


class Coupon(Base):
    """A coupon that somebody has used; nobody can use it again."""

    __tablename__ = "coupons"

    code: Mapped[str] = mapped_column(primary_key=True)
    order_id: Mapped[UUID]


ITEMS: Final = ("kettle", "teapot", "cup", "sieve", "spoon")
USED_COUPON: Final = "WELCOME"


async def furnish(session: AsyncSession) -> None:
    """Put in what the shop has from its first day on."""
    session.add_all([Item(id=number, name=name, price=100 * number) for number, name in enumerate(ITEMS, 1)])
    session.add(Coupon(code=USED_COUPON, order_id=UUID(int=0)))


# What is said over HTTP -----------------------------------------------------------------------------------


class NewOrder(BaseModel):
    """An order as the client writes it. The client chooses the id, so that it can ask for it again."""

    id: UUID
    item_id: int = 1
    quantity: int = Field(default=1, ge=1, le=100)


class Card(StrEnum):
    """How the bank answers, and so how the handler ends."""

    GOOD = "good"
    DECLINED = "declined"  # the handler raises
    OVER_LIMIT = "over limit"  # the handler returns an error response
    IN_REVIEW = "in review"  # the handler sets the status
    FOREIGN = "foreign"  # the handler has a bug: what it returns is not what it promised


class Checkout(NewOrder):
    """An order that is paid at once."""

    card: Card = Card.GOOD


class CouponOrder(NewOrder):
    """An order with a coupon."""

    coupon: str


class OrderOut(BaseModel):
    """An order as the shop tells it."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    item_id: int
    quantity: int
    price: int


class ItemOut(BaseModel):
    """An item as the shop tells it."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    name: str
    price: int


# What it does ---------------------------------------------------------------------------------------------

router = APIRouter()


@router.get("/items", response_model=list[ItemOut])
async def list_items(session: ReaderDep) -> Sequence[Item]:
    """What there is to buy."""
    return (await session.scalars(select(Item).order_by(Item.id))).all()


@router.post("/orders", status_code=201, response_model=OrderOut)
async def place_order(new: NewOrder, session: SessionDep) -> Order:
    """Place an order. An unknown item is noticed by the database, at COMMIT."""
    return await place(new, session)


@router.post("/orders/custom", status_code=201, response_model=OrderOut)
async def place_custom_order(new: NewOrder, session: SessionDep) -> Order:
    """Read the item, wait for the workshop to name a price, then write."""
    item = await session.get(Item, new.item_id)
    if item is None:
        raise HTTPException(404, "no such item")
    await asyncio.sleep(WORKSHOP_ANSWERS_AFTER)
    return await place(new, session, price=3 * item.price)


@router.post("/orders/coupon", status_code=201, response_model=OrderOut)
async def place_order_with_coupon(new: CouponOrder, session: SessionDep) -> Order:
    """Place an order with a coupon; one that has been used already is no reason to turn the customer away.

    The handler means well and is wrong: the error it swallows has aborted the transaction on the server.
    """
    order = await place(new, session)
    with suppress(IntegrityError):  # used before; never mind
        await session.execute(insert(Coupon).values(code=new.coupon, order_id=order.id))
    return order


@router.post("/checkout", status_code=201, response_model=OrderOut)
async def check_out(new: Checkout, session: SessionDep, response: Response) -> Any:
    """Store the order, then ask the bank. Whatever the bank says, the handler says it in a way of its own."""
    order = await place(new, session)
    match new.card:
        case Card.GOOD:
            return order
        case Card.DECLINED:
            raise HTTPException(402, "the card was declined")
        case Card.OVER_LIMIT:
            return JSONResponse({"detail": "the card is over its limit"}, status_code=409)
        case Card.IN_REVIEW:
            response.status_code = 409
            return order
        case Card.FOREIGN:
            return {"order": str(order.id)}


@router.get("/orders/ticker")
async def follow_orders(
    session: ReaderDep, lines: Annotated[int, Query(ge=1, le=50)] = 6
) -> StreamingResponse:
    """How many orders there are, told again and again."""

    async def tell() -> AsyncIterator[str]:
        for _ in range(lines):
            count = await session.scalar(select(func.count()).select_from(Order))
            yield f"{count} orders\n"
            await asyncio.sleep(TICK)

    return StreamingResponse(tell(), media_type="text/plain")


@router.get("/orders/{order_id}", response_model=OrderOut)
async def read_order(order_id: UUID, session: ReaderDep) -> Order:
    """One order."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, "no such order")
    return order


async def place(new: NewOrder, session: AsyncSession, *, price: int = 0) -> Order:
    """Write the order and what it takes from the stock: two statements, one transaction."""
    order = Order(id=new.id, item_id=new.item_id, quantity=new.quantity, price=price)
    session.add(order)
    await session.flush()
    session.add(Movement(order_id=order.id, quantity=-new.quantity))
    return order


# The app --------------------------------------------------------------------------------------------------


def make_app(db: Database[AsyncSession]) -> FastAPI:
    """The shop on stanch: this is all there is to it."""
    app = FastAPI(title="The shop, on stanch")
    app.include_router(router)
    install(app, db, dashboard=PAGE, dashboard_access="loopback")
    return app
