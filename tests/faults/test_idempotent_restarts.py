"""An Idempotency-Key outlives its server: a crash at any commit, then the same request, and the work is there once."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import MetaData, text

from stanch import Database
from stanch.embedded import EmbeddedPostgres
from stanch.fastapi import SessionDep, install
from stanch.idempotency import IdempotencyKey, idempotency_table
from tests.support.judge import FreshDatabase, assert_nothing_left
from tests.support.proxy import FaultProxy, Verdict, at_commit

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(120)]

ROUNDS = 5
METADATA = MetaData()
KEYS = idempotency_table(METADATA)


@pytest.fixture(scope="module")
def fragile() -> Iterator[EmbeddedPostgres]:
    """A server of this module's own, to be crashed."""
    with EmbeddedPostgres(durable=True) as server:
        yield server


async def test_a_request_repeated_after_a_crash_at_its_commit_has_one_effect(
    fragile: EmbeddedPostgres, driver: str, chance: random.Random, anyio_backend: str
) -> None:
    judged = await FreshDatabase.create(fragile)
    await judged.execute("CREATE TABLE work (id int GENERATED ALWAYS AS IDENTITY, what text)")
    ends: list[Verdict] = []
    async with FaultProxy(fragile.port) as proxy:
        db = Database(proxy.through(judged.url(driver)), pool_size=2, max_overflow=0)
        app = FastAPI()
        install(app, db)

        @app.post("/tasks/{what}", status_code=201, dependencies=[Depends(IdempotencyKey(KEYS))])
        async def work(what: str, session: SessionDep) -> str:
            await session.execute(text("INSERT INTO work (what) VALUES (:what)"), {"what": what})
            return f"did {what}"

        async with db.begin() as connection:
            await connection.run_sync(METADATA.create_all)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:

            async def post(number: int) -> httpx.Response:
                return await client.post(f"/tasks/{number}", headers={"idempotency-key": str(number)})

            for number in range(ROUNDS):
                verdict = chance.choice([Verdict.CUT, Verdict.CUT_ANSWER])
                ends.append(verdict)
                proxy.on_client_message = at_commit(verdict)
                unknown = await post(number)
                assert (unknown.status_code, unknown.headers.get("retry-after")) == (503, "1")
                await asyncio.to_thread(fragile.restart, "immediate")
                replies: list[httpx.Response] = []
                async with asyncio.timeout(20):
                    while not replies or replies[-1].status_code == 503:
                        replies.append(await post(number))
                assert (replies[-1].status_code, replies[-1].json()) == (201, f"did {number}")
                replayed = replies[-1].headers.get("idempotent-replayed") == "true"
                assert replayed is (verdict is Verdict.CUT_ANSWER)
            assert proxy.verdicts[Verdict.CUT] + proxy.verdicts[Verdict.CUT_ANSWER] == ROUNDS
        assert set(ends) == {Verdict.CUT, Verdict.CUT_ANSWER}
        done = [row["what"] for row in await judged.fetch("SELECT what FROM work ORDER BY id")]
        assert done == [str(number) for number in range(ROUNDS)]
        await assert_nothing_left(judged, db)
        await db.close()
    await judged.drop()
