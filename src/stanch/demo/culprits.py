"""Three handlers with a fault each. All of them answer well, and no test of the shop would notice.

None of the three loses anything that was promised; they wear out the pool. Who named them, and by which line, is told
at the end of a run.
"""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import APIRouter
from sqlalchemy import func, select

from stanch.demo.shop import Item, Order
from stanch.fastapi import DatabaseDep, SessionDep  # noqa: TC001  # FastAPI evaluates annotations at run time

COURIER_ANSWERS_AFTER: Final = 1.3
"""Seconds that the courier takes to name a price."""

SHOWN: Final = 12
"""Orders in the overview."""

EXPORT: Final = "/exports"
QUOTE: Final = "/quote"
OVERVIEW: Final = "/overview"

router = APIRouter()


@router.get(EXPORT)
async def begin_export(db: DatabaseDep) -> int | None:
    """A leak: a session is opened and used, and nobody closes it."""
    session = db.session_factory()
    return await session.scalar(select(func.count()).select_from(Order))


@router.get(QUOTE)
async def ask_for_a_quote(session: SessionDep) -> int | None:
    """Holds a connection, idle in transaction, while it waits for somebody who has nothing to do with the database."""
    dearest = await session.scalar(select(func.max(Item.price)))
    await asyncio.sleep(COURIER_ANSWERS_AFTER)
    return dearest


@router.get(OVERVIEW)
async def list_latest_orders(session: SessionDep) -> list[str]:
    """N+1: one statement for the orders, then one more for the item of each."""
    latest = (await session.scalars(select(Order).order_by(Order.placed_at.desc()).limit(SHOWN))).all()
    names: list[str] = []
    for order in latest:
        names += await session.scalars(select(Item.name).where(Item.id == order.item_id))
    return names
