"""Who is refused is told at once, before anything was done for the request that would be in vain."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text

from stanch import Database
from stanch.fastapi import ReaderDep, SessionDep, install
from tests.support.judge import FreshDatabase, assert_nothing_left

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

done: list[str] = []


async def costly() -> None:
    done.append("costly")


Costly = Annotated[None, Depends(costly)]


@pytest.mark.parametrize("path", ["/written", "/read"])
async def test_a_refused_request_runs_no_further_dependency_and_no_statement(
    fresh_database: FreshDatabase, driver: str, path: str
) -> None:
    db: Database[Any] = Database(
        fresh_database.url(driver), pool_size=1, max_overflow=0, max_waiting=1, pool_timeout=10
    )
    app = FastAPI()
    install(app, db)
    done.clear()
    go_on = asyncio.Event()

    @app.get("/written")
    async def write(session: SessionDep, _costly: Costly) -> None:
        done.append("entered")
        await session.execute(text("SELECT 1"))

    @app.get("/read")
    async def read(session: ReaderDep, _costly: Costly) -> None:
        done.append("entered")
        await session.execute(text("SELECT 1"))

    async with db, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:

        async def hold() -> None:
            async with db.connect():
                await go_on.wait()

        holder = asyncio.create_task(hold())
        async with asyncio.timeout(10):
            while db.stats().in_use == 0:  # noqa: ASYNC110  # the pool tells of it in its figures
                await asyncio.sleep(0.001)
            patient = asyncio.create_task(client.get(path))
            while db.stats().waiting == 0:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.001)
        assert done == ["costly", "entered"]
        begun = asyncio.get_running_loop().time()
        refused = await client.get(path)
        took = asyncio.get_running_loop().time() - begun
        assert done == ["costly", "entered"], "nothing more was done"
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert took < 2, "it did not wait"
        go_on.set()
        assert (await patient).status_code == 200
        await holder
        await assert_nothing_left(fresh_database, db)
