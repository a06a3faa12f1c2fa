"""Background tasks: one more unit after the reply, which a dead reply never gets."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.background import BackgroundTask

from stanch.errors import SessionClosed
from stanch.fastapi import DatabaseDep, SessionDep
from tests.requests.shop import Shop, call, doom, write_order
from tests.support.uvicorn_server import serve

pytestmark = pytest.mark.anyio


async def test_what_a_background_task_writes_is_committed_when_the_call_has_ended(each_shop: Shop) -> None:
    before: list[list[int]] = []

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, tasks: BackgroundTasks) -> dict[str, bool]:
        async def later() -> None:
            before.append(await each_shop.orders())
            await write_order(session, 2)

        tasks.add_task(later)
        await write_order(session, 1)
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.is_complete, reply.error) == ([201], True, None)
    assert before == [[1]]
    assert await each_shop.orders() == [1, 2]


async def test_a_background_task_that_raises_stores_nothing_of_its_own(each_shop: Shop) -> None:
    """Two tasks of one reply are one unit: the second's error rolls back the first as well."""

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, tasks: BackgroundTasks) -> dict[str, bool]:
        async def fail() -> None:
            raise ZeroDivisionError("mine")

        tasks.add_task(write_order, session, 2)
        tasks.add_task(fail)
        await write_order(session, 1)
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.is_complete) == ([201], True)
    assert isinstance(reply.error, ZeroDivisionError)
    assert await each_shop.orders() == [1]


async def test_a_background_commit_that_fails_is_raised_to_the_server(each_shop: Shop) -> None:
    """The reply has left complete; nobody but the log can be told."""

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, tasks: BackgroundTasks) -> dict[str, bool]:
        tasks.add_task(doom, session)
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.is_complete) == ([201], True)
    assert isinstance(reply.error, IntegrityError)
    assert await each_shop.children() == 0


async def test_the_failed_commit_of_a_background_task_is_in_the_servers_log(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    @shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, tasks: BackgroundTasks) -> dict[str, bool]:
        tasks.add_task(doom, session)
        return {"ok": True}

    async with serve(shop.app) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/orders")).json() == {"ok": True}
    logged = [record for record in caplog.records if record.name == "uvicorn.error" and record.exc_info]
    assert len(logged) == 1
    assert logged[0].exc_info is not None
    assert isinstance(logged[0].exc_info[1], IntegrityError)


@pytest.mark.parametrize("attached", ["tasks", "response"])
async def test_the_background_tasks_of_a_dead_reply_do_not_run(each_shop: Shop, attached: str) -> None:
    ran: list[str] = []

    @each_shop.app.post("/orders")
    async def place(session: SessionDep, tasks: BackgroundTasks) -> Any:
        await doom(session)
        if attached == "tasks":
            tasks.add_task(ran.append, "receipt")
            return {"ok": True}
        return JSONResponse({"ok": True}, background=BackgroundTask(ran.append, "receipt"))

    for spec_version in ("2.3", "2.4"):
        assert (await call(each_shop.app, "/orders", spec_version=spec_version)).starts == [409]
    assert ran == []


async def test_the_background_task_of_an_error_reply_is_a_unit_of_its_own(shop: Shop) -> None:
    """Documented: the 409 rolled back what came before it; what its task writes is committed when all ends well."""

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> JSONResponse:
        await write_order(session, 1)
        return JSONResponse({}, 409, background=BackgroundTask(_audit, session))

    assert (await call(shop.app, "/orders")).starts == [409]
    assert (await shop.orders(), await shop.audit()) == ([], ["refused"])


async def test_a_background_task_holds_no_connection_until_it_asks(shop: Shop) -> None:
    go_on, waiting = asyncio.Event(), asyncio.Event()

    @shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, tasks: BackgroundTasks) -> dict[str, bool]:
        async def later() -> None:
            waiting.set()
            await go_on.wait()
            await write_order(session, 2)

        tasks.add_task(later)
        await write_order(session, 1)
        return {"ok": True}

    calling = asyncio.create_task(call(shop.app, "/orders"))
    await asyncio.wait_for(waiting.wait(), 5)
    assert (shop.db.stats().in_use, await shop.connections()) == (0, ["idle"])
    go_on.set()
    assert (await calling).starts == [201]
    assert await shop.orders() == [1, 2]


async def test_a_task_that_outlives_the_call_is_refused_and_told_what_to_do(shop: Shop) -> None:
    go_on = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> dict[str, bool]:
        async def outlive() -> None:
            await go_on.wait()
            await write_order(session, 1)

        tasks.append(asyncio.create_task(outlive()))
        return {"ok": True}

    assert (await call(shop.app, "/orders")).starts == [200]
    go_on.set()
    with pytest.raises(SessionClosed, match=r"POST /orders") as refused:
        await tasks[0]
    assert "db.transaction()" in str(refused.value)
    assert await shop.orders() == []


async def test_work_that_outlives_the_call_opens_a_transaction_of_its_own(shop: Shop) -> None:
    tasks: list[asyncio.Task[None]] = []

    @shop.app.post("/orders")
    async def place(db: DatabaseDep) -> dict[str, bool]:
        async def outlive() -> None:
            async with db.transaction() as session:
                await write_order(session, 1)

        tasks.append(asyncio.create_task(outlive()))
        return {"ok": True}

    assert (await call(shop.app, "/orders")).starts == [200]
    await tasks[0]
    assert await shop.orders() == [1]


async def _audit(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO audit (what) VALUES ('refused')"))
