"""ReaderDep in a request: it holds nothing between two reads, and is the session of whoever writes in the same unit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from stanch import WriteRefused
from stanch.fastapi import (
    ReaderDep,
    SessionDep,
    get_reader,
    get_session,
    install,
    provide_session,
    unit,
)
from tests.requests.shop import Order, User, call

if TYPE_CHECKING:
    from tests.requests.shop import Shop

pytestmark = pytest.mark.anyio

STOCK = (
    "INSERT INTO users VALUES (1, 'ada'), (2, 'bob'); INSERT INTO orders VALUES (1, 'tea', 1), (2, 'cup', 2)"
)


async def ada(session: ReaderDep) -> User:
    """A dependency that only reads, as of an app's authentication."""
    user = await session.get_one(User, 1)
    session.info["reader"] = session
    return user


AdaDep = Annotated[User, Depends(ada)]


async def test_nothing_is_held_between_two_reads(each_shop: Shop) -> None:
    shop = each_shop
    held: list[tuple[int, list[str]]] = []

    @shop.app.get("/orders")
    async def read(session: ReaderDep) -> list[str]:
        orders = (await session.scalars(select(Order).options(selectinload(Order.user)))).all()
        held.append((shop.db.stats().in_use, await shop.connections()))
        await session.refresh(orders[0])
        held.append((shop.db.stats().in_use, await shop.connections()))
        return [order.user.name for order in orders if order.user]

    await shop.judge.execute(STOCK)
    assert (await shop.get("/orders")).json() == ["ada", "bob"]
    assert held == [(0, ["idle"])] * 2


async def test_a_slow_call_after_a_read_costs_no_connection(each_shop: Shop) -> None:
    """Thirty handlers wait for something else at the same time on a pool of two; by a writer's session it is two."""
    shop = each_shop
    small = shop.database(name="small", pool_size=2)
    app = FastAPI()
    install(app, small)
    waiting = {"reader": 0, "session": 0}
    go_on, as_many_as_can = asyncio.Event(), asyncio.Event()

    async def read_and_wait(session: AsyncSession, kind: str) -> None:
        await session.get_one(User, 1)
        waiting[kind] += 1
        if waiting == {"reader": 30, "session": 2}:
            as_many_as_can.set()
        await go_on.wait()

    @app.get("/reader")
    async def by_reader(session: ReaderDep) -> None:
        await read_and_wait(session, "reader")

    @app.get("/session")
    async def by_session(session: SessionDep) -> None:
        await read_and_wait(session, "session")

    await shop.judge.execute(STOCK)
    async with small:
        paths = ["/reader"] * 30 + ["/session"] * 30
        asked = [asyncio.create_task(call(app, path, method="GET")) for path in paths]
        async with asyncio.timeout(4):
            await as_many_as_can.wait()
        stats = small.stats()
        assert (stats.in_use, stats.waiting) == (2, 28)
        go_on.set()
        replies = await asyncio.gather(*asked)
    assert [reply.starts for reply in replies] == [[200]] * 60


async def test_a_reader_that_meets_a_writer_is_one_session_with_its_objects(each_shop: Shop) -> None:
    shop = each_shop
    seen: list[list[str]] = []

    @shop.app.post("/orders")
    async def write(user: AdaDep, session: SessionDep) -> str:
        assert session is session.info["reader"]
        seen.append(await shop.connections())
        assert user in session
        assert user is await session.get(User, 1)  # of the identity map: no statement
        seen.append(await shop.connections())
        user.name = "ada lovelace"
        session.add(Order(id=9, item="pot", user=user))
        await session.flush()
        seen.append(await shop.connections())
        return str(user.name)

    await shop.judge.execute(STOCK)
    reply = await shop.post("/orders")
    assert (reply.status_code, reply.json()) == (200, "ada lovelace")
    assert seen == [["idle"], ["idle"], ["idle in transaction"]]
    assert await shop.judge.fetchval("SELECT name FROM users WHERE id = 1") == "ada lovelace"
    assert await shop.judge.fetchval("SELECT user_id FROM orders WHERE id = 9") == 1
    assert shop.db.stats().size == 1


async def test_in_whichever_order_they_are_asked_for_it_is_a_writer(each_shop: Shop) -> None:
    shop = each_shop

    for number, (first, second) in enumerate([(get_session, get_reader), (get_reader, get_session)]):

        @shop.app.post(f"/orders/{number}")
        async def place(
            one: AsyncSession = Depends(first),  # noqa: B008  # which of them is a parameter here
            other: AsyncSession = Depends(second),  # noqa: B008  # likewise
            number: int = number,
        ) -> int:
            assert one is other
            one.add(Order(id=number, item="pot"))
            return len((await other.scalars(select(Order))).all())  # flushes before

        assert (await shop.post(f"/orders/{number}")).json() == number + 1
    assert await shop.orders() == [0, 1]


async def test_what_a_reader_changed_is_stored_once_there_is_a_writer(each_shop: Shop) -> None:
    """The wish to write is known before the end, so nothing of what waited is lost or refused."""
    shop = each_shop

    async def renamed(user: AdaDep) -> User:
        user.name = "ada lovelace"
        return user

    @shop.app.post("/rename")
    async def write(
        session: SessionDep,
        user: User = Depends(renamed),  # noqa: B008  # a local dependency has no name to FastAPI
    ) -> str:
        assert user in session.dirty
        return str(await session.scalar(select(User.name).where(User.id == 1)))  # flushes before

    await shop.judge.execute(STOCK)
    assert (await shop.post("/rename")).json() == "ada lovelace"
    assert await shop.judge.fetchval("SELECT name FROM users WHERE id = 1") == "ada lovelace"


async def test_a_reader_that_ends_with_changes_is_an_error_and_stores_nothing(each_shop: Shop) -> None:
    shop = each_shop
    refused: list[WriteRefused] = []

    @shop.app.exception_handler(WriteRefused)
    async def _note(_request: object, error: WriteRefused) -> None:
        refused.append(error)
        raise error

    @shop.app.get("/users/1")
    async def read(session: ReaderDep) -> str:
        user = await session.get_one(User, 1)
        user.name = "***"
        assert [order.item for order in await session.scalars(select(Order).order_by(Order.id))]
        return user.name

    await shop.judge.execute(STOCK)
    assert (await shop.get("/users/1")).status_code == 500
    assert len(refused) == 1
    assert "GET /users/1 asked for a reader, but has written (User)" in str(refused[0])
    assert await shop.judge.fetchval("SELECT name FROM users WHERE id = 1") == "ada"


async def test_wishes_that_only_a_transaction_can_grant_are_granted_by_one(each_shop: Shop) -> None:
    shop = each_shop
    begun: list[object] = []

    async def told(session: AsyncSession) -> list[object]:
        level = await session.scalar(text("SHOW transaction_isolation"))
        return [level, await session.scalar(text("SHOW transaction_read_only")), await shop.connections()]

    @shop.app.get("/read-only")
    async def read_only(
        session: AsyncSession = Depends(provide_session(read_only=True)),  # noqa: B008  # as above
    ) -> None:
        begun.append(await told(session))

    @shop.app.get("/snapshot")
    @unit(isolation_level="REPEATABLE READ", read_only=True)
    async def snapshot(session: ReaderDep) -> None:
        before = len((await session.scalars(select(Order))).all())
        await shop.judge.execute("INSERT INTO orders VALUES (9, 'late', NULL)")
        assert len((await session.scalars(select(Order))).all()) == before
        begun.append(await told(session))

    @shop.app.get("/alone")
    async def alone(session: ReaderDep) -> None:
        begun.append(await told(session))

    for path in ("/read-only", "/snapshot", "/alone"):
        assert (await shop.get(path)).status_code == 200, path
    assert begun == [
        ["read committed", "on", ["idle in transaction"]],
        ["repeatable read", "on", ["idle in transaction"]],
        ["read committed", "off", ["idle"]],
    ]


async def test_a_reader_that_needs_a_transaction_gets_one_that_only_reads(each_shop: Shop) -> None:
    """And a writer that comes after it, one that writes; what was read before stays usable."""
    shop = each_shop

    @shop.app.post("/orders")
    @unit(isolation_level="REPEATABLE READ")
    async def write(session: ReaderDep) -> None:
        await (await session.connection()).execute(text("INSERT INTO orders VALUES (3, 'pot', 1)"))
        await session.commit()

    @shop.app.post("/both")
    @unit(isolation_level="REPEATABLE READ")
    async def both(user: AdaDep, session: SessionDep) -> str:
        session.add(Order(id=4, item="jug", user=user))
        return user.name

    await shop.judge.execute(STOCK)
    reply = await call(shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, WriteRefused)
    assert (await shop.post("/both")).json() == "ada"
    assert sorted(await shop.orders()) == [1, 2, 4]


async def test_committing_by_hand_in_a_reader_is_harmless(each_shop: Shop) -> None:
    shop = each_shop

    @shop.app.get("/users/1")
    async def read(session: ReaderDep) -> str:
        user = await session.get_one(User, 1)
        await session.commit()
        await session.rollback()
        return f"{user.name} {await session.scalar(text('SELECT count(*) FROM orders'))}"

    await shop.judge.execute(STOCK)
    assert (await shop.get("/users/1")).json() == "ada 2"
