"""What stanch.testing gives to the tests of an app."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from stanch import Database
from stanch.atomic import after_rollback, on_commit
from stanch.testing import captured_hooks

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.ext.asyncio import AsyncSession

pytestmark = pytest.mark.anyio


@pytest.fixture
async def db(tmp_path: Path) -> AsyncGenerator[Database[AsyncSession]]:
    async with Database(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}") as db:
        async with db.begin() as connection:
            await connection.execute(text("CREATE TABLE orders (id INTEGER PRIMARY KEY)"))
        yield db


async def place_order(
    db: Database[AsyncSession], number: int, sent: list[int], *, fail: bool = False
) -> None:
    async with db.transaction() as session:
        await session.execute(text("INSERT INTO orders VALUES (:number)"), {"number": number})
        on_commit(session, sent.append, number)
        if fail:
            raise ZeroDivisionError


async def stored(db: Database[AsyncSession]) -> list[int]:
    async with db.session() as session:
        return list(await session.scalars(text("SELECT id FROM orders ORDER BY id")))


@pytest.mark.parametrize("run", [False, True])
async def test_callbacks_are_collected_in_order_and_run_only_if_asked(
    db: Database[AsyncSession], run: bool
) -> None:
    sent: list[int] = []
    with captured_hooks(db, run=run) as hooks:
        await place_order(db, 1, sent)
        await place_order(db, 2, sent)
    assert [(hook.name, hook.arguments) for hook in hooks] == [("list.append", (1,)), ("list.append", (2,))]
    assert "place_order" in str(hooks[0].place)
    assert sent == ([1, 2] if run else [])
    assert await stored(db) == [1, 2]


async def test_what_was_dropped_is_not_collected(db: Database[AsyncSession]) -> None:
    with captured_hooks(db) as hooks, pytest.raises(ZeroDivisionError):
        await place_order(db, 1, [], fail=True)
    assert hooks == []
    assert await stored(db) == []


async def test_a_callback_for_a_rollback_is_collected_too(db: Database[AsyncSession]) -> None:
    with captured_hooks(db) as hooks, pytest.raises(ZeroDivisionError):
        async with db.transaction() as session:
            await session.execute(text("INSERT INTO orders VALUES (1)"))
            after_rollback(session, print, "undone")
            raise ZeroDivisionError
    assert [hook.arguments for hook in hooks] == [("undone",)]


async def test_after_the_block_callbacks_run_as_before_also_when_it_failed(
    db: Database[AsyncSession],
) -> None:
    sent: list[int] = []
    with captured_hooks(db) as outer:
        with pytest.raises(ZeroDivisionError), captured_hooks(db) as inner:
            await place_order(db, 1, sent)
            raise ZeroDivisionError
        await place_order(db, 2, sent)
    await place_order(db, 3, sent)
    assert [hook.arguments for hook in inner] == [(1,)]
    assert [hook.arguments for hook in outer] == [(2,)]
    assert sent == [3]
