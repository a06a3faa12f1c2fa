"""Before a subject is measured: it answers every kind of request it claims to, rightly, and stores what it writes.

What is stored is counted over a connection of the judge's own. A layer that answered before it read, or that dropped
a write, would be the fastest of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from httpx import ASGITransport, AsyncClient
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import create_async_engine

from bench.shop import ROWS, Item, Kind, Line, Order

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from bench.subjects import Setting, Subject

NUMBER: Final = 41
"""Of the request that is asked: its row has the id 42, and the name that ``shop.prepare`` gave it."""


class Stored(NamedTuple):
    """How many rows there are."""

    items: int
    orders: int
    lines: int
    """Only those that belong to an order."""


ADDED: Final = {Kind.WRITE: Stored(1, 0, 0), Kind.ORDER: Stored(0, 1, 2)}
"""By one request; by every other kind nothing."""


class Wrong(Exception):
    """A subject does not do what it is measured for."""


def _name_of(kind: Kind) -> str:
    row = NUMBER + 1
    match kind:
        case Kind.BARE | Kind.UNUSED:
            return "nothing"
        case Kind.READ | Kind.SLOW:
            return f"item {row - 1}"
        case Kind.FIVE:
            return f"item {(row + 4) % ROWS}"
        case Kind.WRITE:
            return "new"
        case Kind.ORDER:
            return f"customer {row}"


async def _stored(engine: AsyncEngine) -> Stored:
    async with engine.connect() as connection:
        counted = [
            (await connection.execute(statement)).scalar_one()
            for statement in (
                select(func.count()).select_from(Item),
                select(func.count()).select_from(Order),
                select(func.count()).select_from(Line).join(Order),
            )
        ]
    return Stored(*counted)


async def _verify(subject: Subject, setting: Setting, engine: AsyncEngine) -> None:
    app = subject.build(setting)
    transport = ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        for kind in (kind for kind in Kind if kind in subject.kinds):
            before = await _stored(engine)
            reply = await client.request(kind.ask.method, kind.ask.path_of(NUMBER))
            if reply.status_code != 200:
                raise Wrong(f"{kind.name} was answered {reply.status_code}")
            if (name := reply.json()["name"]) != _name_of(kind):
                raise Wrong(f"{kind.name} was answered with {name!r} in place of {_name_of(kind)!r}")
            added = Stored(*(now - was for now, was in zip(await _stored(engine), before, strict=True)))
            if added != (wanted := ADDED.get(kind, Stored(0, 0, 0))):
                raise Wrong(f"{kind.name} stored {added} in place of {wanted}")


async def verify(subjects: Iterable[Subject], setting: Setting) -> dict[str, str]:
    """Why a subject may not be measured, by its name; none for those that may. *setting* names a prepared database."""
    wrong: dict[str, str] = {}
    engine = create_async_engine(setting.on("asyncpg"))
    try:
        for subject in subjects:
            try:
                await _verify(subject, setting, engine)
            except Exception as error:  # noqa: BLE001  # whatever a peer raises is its verdict
                wrong[subject.name] = str(error) if isinstance(error, Wrong) else repr(error)
    finally:
        await engine.dispose()
    return wrong
