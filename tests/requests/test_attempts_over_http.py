"""An endpoint that does its work with run_transaction: its reply says what is stored, and contention is a 503."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from stanch import Retry, attempt_of
from stanch.events import AttemptFailed
from stanch.fastapi import DatabaseDep, SessionDep
from tests.requests.shop import write_order

if TYPE_CHECKING:
    from tests.requests.shop import Shop

pytestmark = pytest.mark.anyio

ACCOUNTS = 10
OPENING = 100
TRANSFERS = 200
AT_ONCE = 20
SCHEMA = f"""
    CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL);
    INSERT INTO accounts SELECT id, {OPENING} FROM generate_series(1, {ACCOUNTS}) id;
    CREATE TABLE entries (key text PRIMARY KEY);
"""
CONFLICT = text("DO $$ BEGIN RAISE EXCEPTION 'planted' USING ERRCODE = '40001'; END $$")
BALANCE = text("SELECT balance FROM accounts WHERE id = :id")
SET_BALANCE = text("UPDATE accounts SET balance = :balance WHERE id = :id")


async def transfer(session: AsyncSession, source: int, target: int, key: str) -> int:
    taken = int(await session.scalar(BALANCE, {"id": source}) or 0) - 1
    given = int(await session.scalar(BALANCE, {"id": target}) or 0) + 1
    await session.execute(SET_BALANCE, {"id": source, "balance": taken})
    await session.execute(SET_BALANCE, {"id": target, "balance": given})
    await session.execute(text("INSERT INTO entries VALUES (:key)"), {"key": key})
    return taken


@pytest.mark.slow
async def test_two_hundred_transfers_over_http_are_200_or_503_and_the_sum_is_exact(each_shop: Shop) -> None:
    shop = each_shop
    await shop.judge.execute(SCHEMA)
    retry = Retry(attempts=6)

    @shop.app.post("/transfers/{source}/{target}/{key}")
    async def move(source: int, target: int, key: str, db: DatabaseDep) -> int:
        return await db.run_transaction(
            transfer, source, target, key, retry=retry, isolation_level="SERIALIZABLE"
        )

    chance = random.Random(11)
    queue = [
        (source, target, f"t{number}")
        for number in range(TRANSFERS)
        for source, target in [chance.sample(range(1, ACCOUNTS + 1), 2)]
    ]
    statuses: Counter[int] = Counter()
    acknowledged: list[str] = []
    async with shop.client() as client:

        async def one_by_one() -> None:
            while queue:
                source, target, key = queue.pop()
                reply = await client.post(f"/transfers/{source}/{target}/{key}")
                statuses[reply.status_code] += 1
                if reply.is_success:
                    acknowledged.append(key)
                else:
                    assert reply.json()["type"] == "urn:stanch:problem:contention"

        await asyncio.gather(*(one_by_one() for _ in range(AT_ONCE)))
    conflicts = shop.told.kinds.count("AttemptFailed")
    print(f"{shop.driver}: {dict(statuses)}, {conflicts} conflicts")
    assert statuses.total() == TRANSFERS
    assert set(statuses) <= {200, 503}
    assert conflicts > TRANSFERS // 20, "there was no contention"
    stored = {row["key"] for row in await shop.judge.fetch("SELECT key FROM entries")}
    assert stored == set(acknowledged)
    assert await shop.judge.fetchval("SELECT sum(balance) FROM accounts") == ACCOUNTS * OPENING


async def test_contention_that_does_not_end_is_a_503_to_be_tried_again(each_shop: Shop) -> None:
    async def never(session: AsyncSession) -> None:
        await write_order(session, 1)
        await session.execute(CONFLICT)

    @each_shop.app.post("/orders")
    async def order(db: DatabaseDep) -> None:
        await db.run_transaction(never, retry=2)

    reply = await each_shop.post("/orders")
    assert (reply.status_code, reply.json()["type"]) == (503, "urn:stanch:problem:contention")
    assert reply.headers["retry-after"] == "1"
    assert await each_shop.orders() == []
    assert each_shop.told.kinds == ["AttemptFailed"]


async def test_a_conflict_that_another_attempt_mends_is_a_plain_200(each_shop: Shop) -> None:
    @each_shop.db.transactional(retry=3)
    async def place(session: AsyncSession, number: int) -> int:
        await write_order(session, number)
        if attempt_of(session).number == 1:
            await session.execute(CONFLICT)
        return number

    @each_shop.app.post("/orders/{number}")
    async def order(number: int) -> int:
        return await place(number)

    reply = await each_shop.post("/orders/5")
    assert (reply.status_code, reply.json()) == (200, 5)
    assert await each_shop.orders() == [5]
    assert [event.attempt for event in each_shop.told.events if isinstance(event, AttemptFailed)] == [1]


async def test_work_behind_a_session_that_has_read_is_refused_until_it_is_given_back(each_shop: Shop) -> None:
    @each_shop.app.post("/orders/{number}")
    async def order(number: int, session: SessionDep, db: DatabaseDep, *, commit: bool = False) -> None:
        await session.execute(text("SELECT 1"))
        if commit:
            await session.commit()
        await db.run_transaction(write_order, number)

    refused = await each_shop.post("/orders/1")
    assert refused.status_code == 500
    assert (await each_shop.post("/orders/2?commit=true")).status_code == 200
    assert await each_shop.orders() == [2]
