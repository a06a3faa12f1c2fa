"""Whose a unit is: the whole template of its route, through routers and mounts, and no value of a path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from stanch import Database
from stanch.asgi import unit_of
from stanch.fastapi import SessionDep, install
from stanch.starlette import install as install_starlette, session_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

SECRET = "5ecre7"


def orders() -> APIRouter:
    """Two routers, one in the other, as apps write them."""
    inner = APIRouter(prefix="/orders")

    @inner.get("/{number}")
    async def read(number: str, request: Request, _session: SessionDep) -> dict[str, str]:
        return {"holder": unit_of(request.scope).holder}

    @inner.websocket("/{number}/live")
    async def live(number: str, socket: WebSocket, _session: SessionDep) -> None:
        await socket.accept()
        await socket.send_json({"holder": unit_of(socket.scope).holder})
        await socket.close()

    outer = APIRouter(prefix="/api")
    outer.include_router(inner)
    return outer


async def plain(request: Request) -> PlainTextResponse:
    await session_of(request)
    return PlainTextResponse(unit_of(request.scope).holder)


def database() -> Database[Any]:
    return Database("sqlite+aiosqlite:///:memory:")


def client(app: ASGIApp, root_path: str = "") -> TestClient:
    return TestClient(app, root_path=root_path)


def told(app: ASGIApp, path: str, root_path: str = "") -> str:
    return str(client(app, root_path).get(root_path + path).json()["holder"])


def test_an_included_router_is_named_with_its_prefixes() -> None:
    app = FastAPI()
    app.include_router(orders())
    install(app, database(), lifespan=False)
    assert told(app, f"/api/orders/{SECRET}") == "GET /api/orders/{number}"


def test_a_websocket_in_an_included_router_is_named_with_its_prefixes() -> None:
    app = FastAPI()
    app.include_router(orders())
    install(app, database(), lifespan=False)
    with client(app).websocket_connect(f"/api/orders/{SECRET}/live") as socket:
        assert socket.receive_json()["holder"] == "WEBSOCKET /api/orders/{number}/live"


@pytest.mark.parametrize("root_path", ["", "/behind/a/proxy"])
def test_a_mounted_app_is_named_with_the_templates_of_its_mounts(root_path: str) -> None:
    app, tenant, decoy = FastAPI(), FastAPI(), FastAPI()
    tenant.include_router(orders())
    decoy.include_router(orders())
    app.mount("/decoy/{tenant}", decoy)
    app.mount("/tenants/{tenant}", tenant)
    install(app, database(), lifespan=False)
    path = f"/tenants/{SECRET}/api/orders/7"
    assert told(app, path, root_path) == "GET /tenants/{tenant}/api/orders/{number}"
    assert told(app, path, root_path) == "GET /tenants/{tenant}/api/orders/{number}"


def test_an_app_in_a_mount_with_middleware_of_its_own_is_named_from_the_outermost() -> None:
    app, inner = FastAPI(), FastAPI()
    inner.include_router(orders())
    install(inner, database(), lifespan=False)
    app.mount("/v2", inner)
    install(app, Database("sqlite+aiosqlite:///:memory:", name="other"), lifespan=False)
    assert told(app, "/v2/api/orders/7") == "GET /v2/api/orders/{number}"


def test_an_app_whose_mounts_are_not_seen_is_named_by_its_own_routes() -> None:
    app, inner = FastAPI(), FastAPI()
    inner.include_router(orders())
    install(inner, database(), lifespan=False)
    app.mount("/tenants/{tenant}", inner)
    assert told(app, f"/tenants/{SECRET}/api/orders/7") == "GET /api/orders/{number}"


def test_starlette_routes_are_named_by_their_templates_too() -> None:
    leaf = Starlette(routes=[Route("/plain/{x}", plain)])
    app = Starlette(
        routes=[Route("/{x}", plain), Mount("/{area}", routes=[Mount("/leaf/{y}", app=leaf)])],
    )
    install_starlette(app, database(), lifespan=False)
    assert client(app).get("/7").text == "GET /{x}"
    assert client(app).get(f"/{SECRET}/leaf/{SECRET}/plain/8").text == "GET /{area}/leaf/{y}/plain/{x}"


def test_a_mount_in_an_included_router_is_named_with_the_prefix() -> None:
    router = APIRouter()
    router.routes.append(Mount("/area/{y}", routes=[Route("/plain/{x}", plain)]))
    router.routes.append(Route("/alone/{x}", plain))
    app = FastAPI()
    app.include_router(router, prefix="/api")
    install(app, database(), lifespan=False)
    if client(app).get("/api/area/6/plain/7").status_code == 404:
        pytest.skip("this FastAPI includes no mounts")
    assert client(app).get("/api/alone/7").text == "GET /api/alone/{x}"
    assert client(app).get(f"/api/area/{SECRET}/plain/7").text == "GET /api/area/{y}/plain/{x}"


def test_a_connection_of_a_request_is_held_by_its_route_and_taken_by_a_line_of_the_handler() -> None:
    db, app = database(), FastAPI()

    @app.get("/orders/{number}")
    async def read(number: str, session: SessionDep) -> dict[str, str]:
        await session.execute(text("SELECT 1"))
        (held,) = db.holdings()
        return {"holder": held.holder, "place": held.place}

    install(app, db, lifespan=False)
    told = client(app).get(f"/orders/{SECRET}").json()
    assert told["holder"] == "GET /orders/{number}"
    assert told["place"].endswith("read()")
    assert told["place"].startswith("test_routes.py:")


def test_a_word_that_a_client_makes_up_as_its_method_names_nothing() -> None:
    """It may be anything, a secret too, and every new one would be a route, and a time series, of its own."""

    async def any_method(scope: Scope, receive: Receive, send: Send) -> None:
        await (await plain(Request(scope, receive)))(scope, receive, send)

    app = Starlette(routes=[Mount("/any", app=any_method)])
    install_starlette(app, database(), lifespan=False)
    for method, told_as in (("DELETE", "DELETE"), (SECRET.upper(), "OTHER")):
        assert client(app).request(method, "/any/7").text.partition(" ")[0] == told_as
