"""Plain Starlette: the middleware alone, without ``install`` and handlers of ours, and then with both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect

from stanch.errors import ConfigError
from stanch.fastapi import SessionDep
from stanch.starlette import UnitMiddleware, install, reader_of, session_of
from tests.requests.shop import Shop, call, doom, write_order
from tests.support.uvicorn_server import serve

pytestmark = pytest.mark.anyio


def starlette(shop: Shop, ran: list[str], **options: object) -> Starlette:
    """``/orders`` with its statuses, and ways for a commit to fail."""

    async def place(request: Request) -> Response:
        session = await session_of(request)
        await write_order(session, 1)
        return JSONResponse({"ok": True}, int(request.query_params.get("status", "201")))

    async def doomed(request: Request) -> Response:
        await request.body()
        await doom(await session_of(request))
        return JSONResponse({"ok": True}, background=BackgroundTask(ran.append, "dead"))

    async def broken(request: Request) -> Response:
        await write_order(await session_of(request), 1)
        raise ZeroDivisionError("mine")

    async def export(request: Request) -> Response:
        session = await session_of(request)

        async def body() -> AsyncIterator[str]:
            await write_order(session, 1)
            yield "first"

        return StreamingResponse(body())

    async def socket(websocket: WebSocket) -> None:
        session = await session_of(websocket)
        await websocket.accept()
        async for number in websocket.iter_text():
            async with session.begin():
                await write_order(session, int(number))
            await websocket.send_text("stored")

    routes = [
        Route("/orders", place, methods=["GET", "POST"]),
        Route("/doomed", doomed, methods=["POST"]),
        Route("/broken", broken, methods=["POST"]),
        Route("/export", export, methods=["POST"]),
        WebSocketRoute("/ws", socket),
    ]
    middleware = [Middleware(UnitMiddleware, databases=[shop.db])]
    return Starlette(routes=routes, middleware=middleware, **options)  # type: ignore[arg-type]  # options by name


@pytest.mark.parametrize(("status", "stored"), [(200, [1]), (303, [1]), (404, []), (500, [])])
async def test_the_status_decides(bare_shop: Shop, status: int, stored: list[int]) -> None:
    async with bare_shop.client(starlette(bare_shop, [])) as client:
        assert (await client.post("/orders", params={"status": status})).status_code == status
    assert await bare_shop.orders() == stored


async def test_a_head_request_commits_like_a_get(bare_shop: Shop) -> None:
    reply = await call(starlette(bare_shop, []), "/orders", method="HEAD")
    assert reply.starts == [201]
    assert await bare_shop.orders() == [1]


async def test_a_failed_commit_is_one_500_and_raised_to_the_server(bare_shop: Shop) -> None:
    ran: list[str] = []
    reply = await call(starlette(bare_shop, ran), "/doomed")
    assert (reply.starts, ran) == ([500], [])
    assert isinstance(reply.error, IntegrityError)
    assert await bare_shop.children() == 0


async def test_a_failed_commit_is_answered_by_the_apps_handler_which_may_read_the_body(
    bare_shop: Shop,
) -> None:
    async def conflict(request: Request, _error: Exception) -> Response:
        return PlainTextResponse(b"mine: " + await request.body(), 409)

    ran: list[str] = []
    app = starlette(bare_shop, ran, exception_handlers={IntegrityError: conflict})
    reply = await call(app, "/doomed", body=b"tea")
    assert (reply.starts, reply.body, reply.error, ran) == ([409], b"mine: tea", None, [])


async def test_an_error_stores_nothing(bare_shop: Shop) -> None:
    reply = await call(starlette(bare_shop, []), "/broken")
    assert isinstance(reply.error, ZeroDivisionError)
    assert await bare_shop.orders() == []


async def test_a_stream_is_committed_before_its_last_message(bare_shop: Shop) -> None:
    reply = await call(starlette(bare_shop, []), "/export")
    assert (reply.starts, reply.is_complete) == ([200], True)
    assert await bare_shop.orders() == [1]


async def test_a_websocket_commits_by_hand(bare_shop: Shop) -> None:
    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        async with bare_shop.db:
            yield

    app = starlette(bare_shop, [], lifespan=lifespan)
    async with serve(app) as url, connect(f"{url.replace('http', 'ws', 1)}/ws") as socket:
        await socket.send("1")
        assert await asyncio.wait_for(socket.recv(), 5) == "stored"
        assert bare_shop.db.stats().in_use == 0
    assert await bare_shop.orders() == [1]


async def test_databases_own_lifespan_serves_starlette(bare_shop: Shop) -> None:
    async with serve(starlette(bare_shop, [], lifespan=bare_shop.db.lifespan)):
        assert repr(bare_shop.db) == "<Database 'main', open>"
    assert repr(bare_shop.db) == "<Database 'main', closed>"


async def test_a_starlette_app_mounted_in_fastapi_shares_the_unit(shop: Shop) -> None:
    async def place(request: Request) -> Response:
        await write_order(await session_of(request), 1)
        return JSONResponse({"ok": True})

    shop.app.mount("/sub", Starlette(routes=[Route("/orders", place, methods=["POST"])]))
    assert (await call(shop.app, "/sub/orders")).starts == [200]
    assert await shop.orders() == [1]


async def test_a_fastapi_app_mounted_in_starlette_settles_where_it_is_wrapped(bare_shop: Shop) -> None:
    sub = FastAPI()

    @sub.post("/doomed")
    async def doomed(session: SessionDep) -> dict[str, bool]:
        await doom(session)
        return {"ok": True}

    app = Starlette(
        routes=[Mount("/sub", sub)], middleware=[Middleware(UnitMiddleware, databases=[bare_shop.db])]
    )
    reply = await call(app, "/sub/doomed")
    assert reply.starts == [500]
    assert await bare_shop.children() == 0


async def test_install_gives_starlette_lifespan_and_problems_too(bare_shop: Shop) -> None:
    async def doomed(request: Request) -> Response:
        await doom(await session_of(request))
        return JSONResponse({"ok": True})

    async def peek(request: Request) -> Response:
        reader = await reader_of(request, "main")
        await reader.scalar(text("SELECT count(*) FROM orders"))
        writer = await session_of(request)
        await write_order(writer, 1)
        return JSONResponse({"same": reader is writer})

    app = Starlette(
        routes=[Route("/doomed", doomed, methods=["POST"]), Route("/orders", peek, methods=["POST"])]
    )
    install(app, bare_shop.db)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        assert repr(bare_shop.db) == "<Database 'main', open>"
        answer = await client.post("/doomed")
        assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
        assert (await client.post("/orders")).json() == {"same": True}
    assert repr(bare_shop.db) == "<Database 'main', closed>"
    assert await bare_shop.orders() == [1]


def test_a_wrong_word_is_refused_where_the_middleware_is_made(bare_shop: Shop) -> None:
    options = {"commit_mode": "autocommit"}
    with pytest.raises(ConfigError, match="commit_mode"):
        UnitMiddleware(Starlette(), [bare_shop.db], **options)  # type: ignore[arg-type]  # the wrong word
