"""Blocks and callbacks in requests and websockets: whose end is the end, and when the reply leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from websockets.asyncio.client import connect

from stanch import CommitRefused, UnitConflict, WriteRefused, after_rollback, atomic, on_commit, rollback_only
from stanch.events import HookFailed
from stanch.fastapi import ReaderDep, SessionDep, install, provide_session, unit
from stanch.testing import captured_hooks
from tests.requests.shop import Order, Shop, call, client_of, write_order
from tests.support.uvicorn_server import serve

pytestmark = pytest.mark.anyio

ManualDep = Annotated[AsyncSession, Depends(provide_session(commit_mode="manual"))]


# Blocks -----------------------------------------------------------------------------------------------------


async def test_in_an_auto_unit_a_block_is_a_savepoint(each_shop: Shop) -> None:
    seen: list[list[int]] = []

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> None:
        async with atomic(session):
            await write_order(session, 1)
        seen.append(await each_shop.orders())
        with suppress(IntegrityError):
            async with atomic(session):
                await write_order(session, 2)
                await write_order(session, 1)
        await write_order(session, 3)

    assert (await each_shop.post("/orders")).status_code == 201
    assert seen == [[]]
    assert await each_shop.orders() == [1, 3]


async def test_a_failed_request_undoes_the_blocks_that_had_succeeded(each_shop: Shop) -> None:
    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> None:
        async with atomic(session):
            await write_order(session, 1)
        raise HTTPException(409)

    assert (await each_shop.post("/orders")).status_code == 409
    assert await each_shop.orders() == []


async def test_in_an_auto_unit_a_durable_block_is_refused(each_shop: Shop) -> None:
    refused: list[str] = []

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> None:
        with pytest.raises(UnitConflict) as error:
            async with atomic(session, durable=True):
                pytest.fail("it was entered")
        refused.append(str(error.value))

    assert (await each_shop.post("/orders")).status_code == 201
    assert "inside POST /orders, which commits at its end" in refused[0]


async def test_in_an_auto_unit_an_error_in_a_joined_block_dooms_the_reply(each_shop: Shop) -> None:
    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        with suppress(ZeroDivisionError):
            async with atomic(session, savepoint=False):
                await write_order(session, 2)
                raise ZeroDivisionError

    reply = await call(each_shop.app, "/orders")
    assert reply.starts == [500]
    assert await each_shop.orders() == []
    assert isinstance(reply.error, CommitRefused)
    assert "ZeroDivisionError left atomic() at" in str(reply.error)


async def test_in_a_manual_unit_a_block_commits_at_its_end(each_shop: Shop) -> None:
    seen: list[list[int]] = []

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: ManualDep) -> None:
        await session.execute(text("SELECT 1"))
        async with atomic(session, durable=True):
            await write_order(session, 1)
        seen.append(await each_shop.orders())
        with suppress(ZeroDivisionError):
            async with atomic(session):
                await write_order(session, 2)
                raise ZeroDivisionError
        async with atomic(session):
            await write_order(session, 3)
        raise HTTPException(400)

    assert (await each_shop.post("/orders")).status_code == 400
    assert seen == [[1]]
    assert await each_shop.orders() == [1, 3]


async def test_a_unit_that_became_auto_has_promised_to_commit(each_shop: Shop) -> None:
    """A dependency asks for manual mode, the handler for auto: the stronger wish holds, so a block is a savepoint."""
    seen: list[list[int]] = []

    async def first(session: ManualDep) -> None:
        await session.execute(text("SELECT 1"))

    @each_shop.app.post("/orders", status_code=201, dependencies=[Depends(first)])
    async def place(session: SessionDep) -> None:
        async with atomic(session):
            await write_order(session, 1)
        seen.append(await each_shop.orders())

    assert (await each_shop.post("/orders")).status_code == 201
    assert seen == [[]]
    assert await each_shop.orders() == [1]


async def test_a_block_opened_before_the_unit_became_auto_ends_well(each_shop: Shop) -> None:
    @each_shop.app.post("/orders", status_code=201)
    async def place(first: ManualDep) -> None:
        async with atomic(first):
            await write_order(first, 1)
            second = await each_shop_unit().session(each_shop.db, auto_wish())
            assert second is first
            async with atomic(second):
                await write_order(second, 2)
        assert await each_shop.orders() == [1, 2]
        await write_order(first, 3)

    from stanch.asgi import unit_of
    from stanch.unit import Mode, Unit, Wish

    scopes: list[Any] = []

    def each_shop_unit() -> Unit:
        return unit_of(scopes[0])

    def auto_wish() -> Wish:
        return Wish(source="a late one", mode=Mode.AUTO)

    class Keep:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scopes.append(scope)
            await self.app(scope, receive, send)

    async with client_of(Keep(each_shop.app)) as client:
        assert (await client.post("/orders")).status_code == 201
    assert await each_shop.orders() == [1, 2, 3]


async def test_a_block_of_a_reader_is_refused_until_a_writer_is_asked_for(each_shop: Shop) -> None:
    async def reads(session: ReaderDep) -> None:
        with pytest.raises(WriteRefused):
            async with atomic(session):
                pytest.fail("it was entered")
        with pytest.raises(WriteRefused):
            on_commit(session, print)

    @each_shop.app.post("/orders", status_code=201, dependencies=[Depends(reads)])
    async def place(session: SessionDep) -> None:
        async with atomic(session):
            await write_order(session, 1)

    assert (await each_shop.post("/orders")).status_code == 201
    assert await each_shop.orders() == [1]


async def test_a_block_in_a_background_task_is_part_of_the_tasks_own_unit(each_shop: Shop) -> None:
    seen: list[list[int]] = []

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, later: BackgroundTasks) -> None:
        await write_order(session, 1)

        async def task() -> None:
            async with atomic(session):
                await write_order(session, 2)
            seen.append(await each_shop.orders())

        later.add_task(task)

    assert (await each_shop.post("/orders")).status_code == 201
    assert seen == [[1]]
    assert await each_shop.orders() == [1, 2]


async def test_a_block_for_each_message_of_a_websocket_commits(each_shop: Shop) -> None:
    ran: list[int] = []

    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        async for number in socket.iter_text():
            with suppress(IntegrityError):
                async with atomic(session):
                    on_commit(session, ran.append, int(number))
                    await write_order(session, int(number))
            await socket.send_text(f"{len(ran)}")

    async with (
        serve(each_shop.app) as url,
        connect(url.replace("http", "ws", 1) + "/ws", open_timeout=5) as socket,
    ):
        for number, callbacks, stored in ((1, 1, [1]), (1, 1, [1]), (2, 2, [1, 2])):
            await socket.send(str(number))
            assert await socket.recv() == str(callbacks)
            assert await each_shop.orders() == stored
            assert each_shop.db.stats().in_use == 0
    assert ran == [1, 2]


# Callbacks --------------------------------------------------------------------------------------------------


def one_connection(shop: Shop, **settings: Any) -> None:
    """Install the shop on a pool of one."""
    shop.db = shop.database(pool_size=1, pool_timeout=2.0, **settings)
    install(shop.app, shop.db)


async def test_a_callback_runs_after_the_commit_before_the_reply_holding_nothing(bare_shop: Shop) -> None:
    """The only connection of the pool is free for it."""
    one_connection(bare_shop)
    happened: list[Any] = []

    async def receipt(number: int) -> None:
        happened.append(await bare_shop.orders())
        async with bare_shop.db.transaction() as own:
            await own.execute(text("INSERT INTO audit (what) VALUES (:what)"), {"what": f"order {number}"})
        happened.append("receipt")

    @bare_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        on_commit(session, receipt, 1)
        happened.append("handler")

    async def on_message(message: Any) -> None:
        happened.append(message["type"])

    reply = await call(bare_shop.app, "/orders", on_message=on_message)
    assert reply.starts == [201]
    assert happened == ["handler", [1], "receipt", "http.response.start", "http.response.body"]
    assert (await bare_shop.orders(), await bare_shop.audit()) == ([1], ["order 1"])


@pytest.mark.parametrize(
    ("status", "ran"), [(200, "stored"), (303, "stored"), (400, "undone"), (500, "undone")]
)
async def test_the_status_decides_which_callbacks_run_also_with_nothing_begun(
    each_shop: Shop, status: int, ran: str
) -> None:
    seen: list[str] = []

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        on_commit(session, seen.append, "stored")
        after_rollback(session, seen.append, "undone")
        raise HTTPException(status)

    assert (await each_shop.post("/orders")).status_code == status
    assert seen == [ran]


async def test_a_handler_that_raises_runs_what_waits_for_the_rollback(each_shop: Shop) -> None:
    seen: list[str] = []

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        on_commit(session, seen.append, "stored")
        after_rollback(session, seen.append, "undone")
        raise ZeroDivisionError

    assert (await each_shop.post("/orders")).status_code == 500
    assert seen == ["undone"]


async def test_a_commit_that_fails_runs_what_waits_for_the_rollback(each_shop: Shop) -> None:
    seen: list[str] = []

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> None:
        await session.execute(text("INSERT INTO child VALUES (1, 404)"))
        on_commit(session, seen.append, "stored")
        after_rollback(session, seen.append, "undone")

    assert (await each_shop.post("/orders")).status_code == 409
    assert seen == ["undone"]


async def test_rollback_only_replies_200_and_drops_the_callbacks(each_shop: Shop) -> None:
    seen: list[str] = []

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        on_commit(session, seen.append, "stored")
        after_rollback(session, seen.append, "undone")
        rollback_only(session)

    assert (await each_shop.post("/orders")).status_code == 200
    assert seen == ["undone"]
    assert await each_shop.orders() == []


@pytest.mark.parametrize("kind", ["raises", "is too slow", "is cancelled"])
async def test_a_failing_callback_leaves_the_201_as_it_is(
    bare_shop: Shop, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    one_connection(bare_shop, hook_timeout=0.1)
    seen: list[str] = []

    async def fail() -> None:
        if kind == "raises":
            raise HTTPException(418)
        if kind == "is cancelled":
            raise asyncio.CancelledError
        await asyncio.Event().wait()

    @bare_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        on_commit(session, fail)
        on_commit(session, seen.append, "the next one")

    async with asyncio.timeout(5):
        assert (await bare_shop.post("/orders")).status_code == 201
    assert await bare_shop.orders() == [1]
    assert seen == ["the next one"]
    (told,) = bare_shop.told.events
    assert isinstance(told, HookFailed)
    assert told.place.startswith("test_nesting_over_http.py:")
    assert told.place in caplog.text


async def test_a_manual_unit_without_a_commit_names_the_callbacks_it_dropped(each_shop: Shop) -> None:
    seen: list[str] = []

    @each_shop.app.post("/orders", status_code=201)
    @unit(commit_mode="manual")
    async def place(session: SessionDep) -> None:
        on_commit(session, seen.append, "stored")
        after_rollback(session, seen.append, "undone")

    assert (await each_shop.post("/orders")).status_code == 201
    assert seen == ["undone"]
    assert each_shop.told.kinds == ["WorkDropped"]
    assert "on_commit(list.append)" in str(each_shop.told.events[0])


async def test_a_manual_unit_runs_callbacks_at_the_commit_by_hand(each_shop: Shop) -> None:
    seen: list[Any] = []

    @each_shop.app.post("/orders", status_code=201)
    @unit(commit_mode="manual")
    async def place(session: SessionDep) -> None:
        session.add(Order(id=1, item="tea"))
        on_commit(session, seen.append, "stored")
        await session.commit()
        seen.append("handler")

    assert (await each_shop.post("/orders")).status_code == 201
    assert seen == ["stored", "handler"]
    assert each_shop.told.kinds == []


async def test_callbacks_of_a_stream_run_when_its_work_is_committed(each_shop: Shop) -> None:
    seen: list[Any] = []

    async def look(what: str) -> None:
        seen.append((what, await each_shop.orders()))

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> StreamingResponse:
        await write_order(session, 1)
        on_commit(session, look, "before the start")

        async def body() -> AsyncGenerator[bytes]:
            yield b"one"
            await write_order(session, 2)
            on_commit(session, look, "before the end")
            yield b"two"

        return StreamingResponse(body())

    assert (await each_shop.post("/orders")).content == b"onetwo"
    assert seen == [("before the start", [1]), ("before the end", [1, 2])]


async def test_callbacks_over_two_databases_each_run_after_the_commit_of_their_own(bare_shop: Shop) -> None:
    """In the order of the commits, which is that of the installation; none before the last of them."""
    second = bare_shop.database()
    second.name = "second"
    install(bare_shop.app, bare_shop.db, second)
    seen: list[Any] = []

    async def look(what: str) -> None:
        seen.append((what, await bare_shop.orders()))

    @bare_shop.app.post("/orders", status_code=201)
    async def place(
        session: SessionDep, also: Annotated[AsyncSession, Depends(provide_session("second"))]
    ) -> None:
        await write_order(also, 2)
        on_commit(also, look, "second")
        await write_order(session, 1)
        on_commit(session, look, "first")

    try:
        assert (await bare_shop.post("/orders")).status_code == 201
    finally:
        await second.close()
    assert seen == [("first", [1, 2]), ("second", [1, 2])]


async def test_of_two_databases_the_one_that_failed_runs_what_waits_for_its_rollback(bare_shop: Shop) -> None:
    second = bare_shop.database()
    second.name = "second"
    install(bare_shop.app, bare_shop.db, second)
    seen: list[str] = []

    @bare_shop.app.post("/orders", status_code=201)
    async def place(
        session: SessionDep, also: Annotated[AsyncSession, Depends(provide_session("second"))]
    ) -> None:
        for each, name in ((session, "first"), (also, "second")):
            on_commit(each, seen.append, f"{name} stored")
            after_rollback(each, seen.append, f"{name} undone")
        await write_order(session, 1)
        with suppress(ZeroDivisionError):
            async with atomic(also, savepoint=False):
                raise ZeroDivisionError

    try:
        assert (await bare_shop.post("/orders")).status_code == 500
    finally:
        await second.close()
    assert seen == ["first stored", "second undone"]
    assert await bare_shop.orders() == [1]


async def test_a_callback_may_call_the_same_app(bare_shop: Shop) -> None:
    """With one connection in the pool: the request that waits for it holds none."""
    one_connection(bare_shop)

    async def again() -> None:
        assert (await bare_shop.post("/orders/2")).status_code == 201

    @bare_shop.app.post("/orders/{number}", status_code=201)
    async def place(number: int, session: SessionDep) -> None:
        await write_order(session, number)
        if number == 1:
            on_commit(session, again)

    assert (await bare_shop.post("/orders/1")).status_code == 201
    assert await bare_shop.orders() == [1, 2]
    assert bare_shop.told.kinds == []


async def test_callbacks_of_a_request_are_captured_for_a_test(shop: Shop) -> None:
    @shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        on_commit(session, print, "order", 1)

    with captured_hooks(shop.db) as hooks:
        assert (await shop.post("/orders")).status_code == 201
    assert [(hook.name, hook.arguments) for hook in hooks] == [("print", ("order", 1))]
    assert await shop.orders() == [1]
