"""``request_timeout=`` and ``timeout=``: how long a request may wait for the database until its reply leaves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.websockets import WebSocket  # FastAPI reads it at run time
from websockets.exceptions import InvalidStatus

from stanch import ConfigError, Database
from stanch.fastapi import DatabaseDep, ReaderDep, SessionDep, UnitMiddleware, install, provide_session, unit
from tests.requests.shop import Shop, write_order
from tests.requests.test_websockets import dialled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

SHOWN = text("SHOW statement_timeout")
BRIEF, LONG = 0.4, 20.0

BriefDep = Annotated[AsyncSession, Depends(provide_session(timeout=BRIEF))]
LongDep = Annotated[AsyncSession, Depends(provide_session(timeout=LONG))]


async def told(session: AsyncSession) -> float:
    """How long the server lets a statement of *session* run, in seconds: a little less than what is left."""
    shown = str(await session.scalar(SHOWN))
    return float(shown.removesuffix("ms")) / 1000 if shown.endswith("ms") else float(shown.removesuffix("s"))


@pytest.mark.parametrize("whole", [BRIEF, LONG], ids=["app brief", "app long"])
@pytest.mark.parametrize("route", [BRIEF, LONG, None], ids=["route brief", "route long", "no route"])
async def test_the_shorter_of_app_route_and_dependency_holds(
    bare_shop: Shop, whole: float, route: float | None
) -> None:
    install(bare_shop.app, bare_shop.db, request_timeout=whole)

    @bare_shop.app.get("/plain")
    @unit(timeout=route)
    async def plain(session: SessionDep) -> float:
        return await told(session)

    @bare_shop.app.get("/brief")
    @unit(timeout=route)
    async def brief(reader: ReaderDep, session: BriefDep) -> float:
        return await told(session)

    @bare_shop.app.get("/long")
    @unit(timeout=route)
    async def long(session: LongDep) -> float:
        return await told(session)

    least = min(whole, route or whole)
    for path, timeout in {"/plain": least, "/brief": BRIEF, "/long": least}.items():
        left = (await bare_shop.get(path)).json()
        assert timeout * 0.5 < left < timeout, path


async def test_the_app_without_a_timeout_leaves_the_server_its_own(shop: Shop) -> None:
    @shop.app.get("/")
    async def plain(session: SessionDep) -> float:
        return await told(session)

    assert (await shop.get("/")).json() == 30.0


async def test_it_counts_from_the_arrival_of_the_request(bare_shop: Shop) -> None:
    """Not from the moment somebody asks for the session."""
    install(bare_shop.app, bare_shop.db, request_timeout=BRIEF)

    async def think() -> None:
        await asyncio.sleep(BRIEF / 2)

    @bare_shop.app.get("/", dependencies=[Depends(think)])
    async def late(session: SessionDep) -> float:
        return await told(session)

    assert (await bare_shop.get("/")).json() < BRIEF / 2


async def test_a_statement_that_takes_too_long_is_a_504(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db, request_timeout=BRIEF)

    @bare_shop.app.post("/{number}")
    async def slow(number: int, session: SessionDep, first: float = 0.0) -> None:
        await write_order(session, number)
        await asyncio.sleep(first)
        await session.execute(text("SELECT pg_sleep(20)"))

    for number, first in enumerate((0.0, BRIEF / 2, BRIEF * 1.2)):
        reply = await bare_shop.post(f"/{number}?first={first}")
        assert (reply.status_code, reply.json()["type"]) == (504, "urn:stanch:problem:timeout")
    assert await bare_shop.orders() == []


async def test_what_is_not_committed_in_time_is_a_504_and_not_stored(
    bare_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    install(bare_shop.app, bare_shop.db, request_timeout=BRIEF)

    @bare_shop.app.post("/orders")
    async def dawdle(session: SessionDep) -> None:
        await write_order(session, 1)
        await asyncio.sleep(BRIEF * 1.2)

    reply = await bare_shop.post("/orders")
    assert reply.status_code == 504
    assert await bare_shop.orders() == []
    assert "POST /orders: the 0.40 s of request_timeout have passed" in caplog.text


async def test_who_does_not_wait_for_the_database_is_not_disturbed(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db, request_timeout=BRIEF)

    @bare_shop.app.get("/none")
    async def none() -> None:
        await asyncio.sleep(BRIEF * 1.2)

    @bare_shop.app.get("/unused")
    async def unused(session: SessionDep) -> None:
        await asyncio.sleep(BRIEF * 1.2)

    for path in ("/none", "/unused"):
        assert (await bare_shop.get(path)).status_code == 200


async def test_after_the_start_of_the_reply_it_binds_no_more(bare_shop: Shop) -> None:
    """The body of a stream and a background task take the time they take."""
    install(bare_shop.app, bare_shop.db, request_timeout=BRIEF)

    @bare_shop.app.get("/stream")
    async def stream(session: SessionDep) -> StreamingResponse:
        await write_order(session, 1)

        async def body() -> AsyncIterator[str]:
            yield "begun "
            await asyncio.sleep(BRIEF * 1.2)
            await write_order(session, 2)
            yield str(await told(session))

        return StreamingResponse(body())

    @bare_shop.app.post("/later")
    async def later(session: SessionDep, tasks: BackgroundTasks) -> None:
        await write_order(session, 3)

        async def work() -> None:
            await asyncio.sleep(BRIEF * 1.2)
            await write_order(session, 4)

        tasks.add_task(work)

    assert (await bare_shop.get("/stream")).text == "begun 30.0"
    assert (await bare_shop.post("/later")).status_code == 200
    assert await bare_shop.orders() == [1, 2, 3, 4]


async def test_a_mounted_app_with_a_timeout_of_its_own(bare_shop: Shop) -> None:
    inner = FastAPI()
    install(inner, bare_shop.db, request_timeout=BRIEF, lifespan=False)
    install(bare_shop.app, bare_shop.db, request_timeout=LONG)

    @inner.get("/")
    async def read(session: SessionDep) -> float:
        return await told(session)

    bare_shop.app.mount("/inner", inner)
    assert (await bare_shop.get("/inner/")).json() < BRIEF


async def test_a_websocket_lasts_as_long_as_it_lasts(
    each_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """``request_timeout`` is not for it, and a ``timeout=`` of its own is refused, not ignored."""
    app = FastAPI()
    each_shop.app = app
    install(app, each_shop.db, request_timeout=BRIEF)

    @app.websocket("/chat")
    async def chat(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        await asyncio.sleep(BRIEF * 1.2)
        await socket.send_text(str(await told(session)))

    @app.websocket("/ws")
    async def refused(socket: WebSocket, session: BriefDep) -> None:
        await socket.accept()
        pytest.fail("accepted")

    async with dialled(each_shop, "/chat") as socket:
        assert await socket.recv() == "30.0"
    with pytest.raises(InvalidStatus):
        async with dialled(each_shop):
            pytest.fail("accepted")
    assert "a websocket lasts as long as its peer wants" in caplog.text


def _bad(timeout: Any) -> list[Any]:
    app = FastAPI()
    db: Any = object()
    return [
        lambda: UnitMiddleware(app, [db], request_timeout=timeout),
        lambda: unit(timeout=timeout),
        lambda: provide_session(timeout=timeout),
    ]


@pytest.mark.parametrize("timeout", [True, 0, -1.0, float("inf"), float("nan"), "2"])
async def test_what_is_no_length_of_time_is_refused_where_it_is_written(timeout: Any) -> None:
    for write in _bad(timeout):
        with pytest.raises(ConfigError, match=r"timeout must be seconds, as an int or float from 0\.001"):
            write()


async def test_a_second_install_cannot_say_otherwise(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db, request_timeout=2)
    billing = bare_shop.database(name="billing")
    with pytest.raises(
        ConfigError, match=r"request_timeout=3, but this app was installed with request_timeout=2"
    ):
        install(bare_shop.app, billing, request_timeout=3)
    install(bare_shop.app, billing)


@pytest.mark.parametrize("way", ["transaction", "session", "reader", "run_transaction", "gather"])
async def test_it_holds_for_the_units_that_a_handler_opens_by_itself(bare_shop: Shop, way: str) -> None:
    install(bare_shop.app, bare_shop.db, request_timeout=BRIEF)

    async def wait(session: AsyncSession) -> None:
        await session.execute(text("SELECT pg_sleep(20)"))

    @bare_shop.app.post("/")
    async def late(db: DatabaseDep) -> None:
        if way == "run_transaction":
            await db.run_transaction(wait)
        elif way == "gather":
            await db.gather(wait, wait)
        else:
            async with getattr(db, way)() as session:
                await wait(session)

    async with asyncio.timeout(10):
        assert (await bare_shop.post("/")).status_code == 504
    assert bare_shop.db.stats().in_use == 0


async def test_it_does_not_hold_for_what_a_background_task_opens(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db, request_timeout=BRIEF)

    async def write_later(db: Database[AsyncSession]) -> None:
        async with db.transaction() as session:
            await session.execute(text(f"SELECT pg_sleep({1.5 * BRIEF})"))
            await write_order(session, 1)

    @bare_shop.app.post("/")
    async def answer(db: DatabaseDep, later: BackgroundTasks) -> None:
        later.add_task(write_later, db)

    assert (await bare_shop.post("/")).status_code == 200
    assert await bare_shop.orders() == [1]
