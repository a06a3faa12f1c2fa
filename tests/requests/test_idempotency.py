"""Idempotency-Key: whatever happens to a request or its answer, repeating it has one effect and one answer."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Form, Header, HTTPException, Request, Response, UploadFile
from fastapi.responses import FileResponse, StreamingResponse
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from stanch import Database, rollback_only
from stanch.errors import ConfigError, ReplyNotRecordable, UnitConflict
from stanch.fastapi import SessionDep, install, provide_session, unit
from stanch.idempotency import IdempotencyKey, idempotency_table, purge
from tests.requests.shop import Shop, call, client_of, comes_from, doom
from tests.support.judge import assert_nothing_left
from tests.support.proxy import FaultProxy, Verdict, at_commit

if TYPE_CHECKING:
    from tests.requests.shop import Reply
    from tests.support.judge import FreshDatabase
    from tests.support.proxy import OnClientMessage

pytestmark = pytest.mark.anyio

METADATA = MetaData()
KEYS = idempotency_table(METADATA)
ONCE = [Depends(IdempotencyKey(KEYS))]
OtherDep = Annotated[AsyncSession, Depends(provide_session("other"))]
WORK = text("INSERT INTO audit (what) VALUES (:what)")


async def make_table(db: Database[Any]) -> None:
    async with db.begin() as connection:
        await connection.run_sync(METADATA.create_all)


@pytest.fixture
async def once(each_shop: Shop) -> Shop:
    """The shop on each driver, with the table, and one route that may be repeated."""
    await make_table(each_shop.db)
    add_orders(each_shop.app)
    return each_shop


def add_orders(app: FastAPI) -> None:
    @app.post("/orders/{kind}", status_code=201, dependencies=ONCE)
    async def place(kind: str, request: Request, response: Response, session: SessionDep) -> dict[str, Any]:
        await session.execute(WORK, {"what": kind})
        number = (await session.execute(text("SELECT count(*) FROM audit"))).scalar_one()
        response.headers["location"] = f"/orders/{number}"
        response.headers["set-cookie"] = "mine=1"
        return {"number": number, "got": (await request.body()).decode()}


def keyed(key: str = "k1") -> dict[str, str]:
    return {"idempotency-key": key}


async def records(shop: Shop) -> int:
    count: int = await shop.judge.fetchval("SELECT count(*) FROM stanch_idempotency")
    return count


# The same again -------------------------------------------------------------------------------------------


async def test_a_repeated_request_gets_the_same_reply_and_works_once(once: Shop) -> None:
    first = await once.post("/orders/tea", headers=keyed(), content=b"{}")
    again = await once.post("/orders/tea", headers=keyed(), content=b"{}")

    assert (first.status_code, first.json()) == (201, {"number": 1, "got": "{}"})
    assert (again.status_code, again.content) == (first.status_code, first.content)
    for name in ("content-type", "location", "content-length"):
        assert again.headers[name] == first.headers[name]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert "set-cookie" not in again.headers
    assert await once.audit() == ["tea"]


async def test_another_key_and_another_route_are_other_requests(once: Shop) -> None:
    @once.app.post("/refunds/{kind}", dependencies=ONCE)
    async def refund(kind: str, session: SessionDep) -> None:
        await session.execute(WORK, {"what": f"refund {kind}"})

    await once.post("/orders/tea", headers=keyed("k1"))
    await once.post("/orders/tea", headers=keyed("k2"))
    await once.post("/refunds/tea", headers=keyed("k1"))
    assert await once.audit() == ["tea", "tea", "refund tea"]


async def test_neither_the_endpoint_nor_later_dependencies_run_in_a_replay(once: Shop) -> None:
    ran: list[str] = []

    async def after() -> None:
        ran.append("dependency")

    @once.app.post("/lamps", dependencies=[*ONCE, Depends(after)])
    async def place(session: SessionDep) -> Response:
        ran.append("endpoint")
        await session.execute(WORK, {"what": "lamp"})
        return Response(status_code=204)

    replies = [await call(once.app, "/lamps", headers=keyed()) for _ in range(2)]
    assert [reply.starts for reply in replies] == [[204], [204]]
    assert all(reply.is_complete and reply.body == b"" for reply in replies)
    assert ran == ["dependency", "endpoint"]


async def test_what_a_dependency_before_the_key_has_written_is_not_written_again_by_a_replay(
    once: Shop,
) -> None:
    async def visit(session: SessionDep) -> None:
        await session.execute(WORK, {"what": "visit"})

    @once.app.post("/lamps", dependencies=[Depends(visit), *ONCE])
    async def place(session: SessionDep) -> None:
        await session.execute(WORK, {"what": "lamp"})

    for _ in range(2):
        assert (await once.post("/lamps", headers=keyed())).status_code == 200
    assert await once.audit() == ["visit", "lamp"]


async def test_an_apps_own_handler_for_http_exceptions_does_not_spoil_a_replay(once: Shop) -> None:
    @once.app.exception_handler(StarletteHTTPException)
    async def mine(_request: Request, error: StarletteHTTPException) -> Response:
        raise ZeroDivisionError(error.detail)

    first = await once.post("/orders/tea", headers=keyed())
    again = await once.post("/orders/tea", headers=keyed())
    assert (again.status_code, again.content) == (201, first.content)


async def test_a_replay_needs_none_of_our_exception_handlers(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db, exception_handlers=False)
    await make_table(bare_shop.db)
    add_orders(bare_shop.app)
    first = await bare_shop.post("/orders/tea", headers=keyed())
    again = await bare_shop.post("/orders/tea", headers=keyed())
    assert (again.status_code, again.content) == (201, first.content)
    assert await bare_shop.audit() == ["tea"]


async def test_a_status_that_no_standard_knows_is_replayed_too(once: Shop) -> None:
    @once.app.post("/lamps", dependencies=ONCE)
    async def place() -> Response:
        return Response("odd", 299)

    replies = [await once.post("/lamps", headers=keyed()) for _ in range(2)]
    assert [(reply.status_code, reply.text) for reply in replies] == [(299, "odd")] * 2


async def test_a_raised_redirect_is_recorded_like_a_returned_one(once: Shop) -> None:
    @once.app.post("/lamps", dependencies=ONCE)
    async def place(session: SessionDep) -> None:
        await session.execute(WORK, {"what": "lamp"})
        raise HTTPException(303, headers={"location": "/lamps/1"})

    for _ in range(2):
        reply = await once.post("/lamps", headers=keyed())
        assert (reply.status_code, reply.headers["location"]) == (303, "/lamps/1")
    assert await once.audit() == ["lamp"]


async def test_a_route_in_a_mounted_app_has_keys_of_its_own(once: Shop) -> None:
    for name in ("a", "b"):
        inner = FastAPI()
        add_orders(inner)
        once.app.mount(f"/{name}", inner)
    for path in ("/a/orders/tea", "/b/orders/tea", "/a/orders/tea", "/b/orders/tea"):
        assert (await once.post(path, headers=keyed())).status_code == 201
    assert await once.audit() == ["tea", "tea"]


async def test_a_mounted_app_with_middleware_of_its_own_records_and_replays(once: Shop) -> None:
    """The innermost settles; a BaseHTTPMiddleware in between sends each reply in pieces."""

    async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    inner = FastAPI()
    inner.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    install(inner, once.db, lifespan=False)
    add_orders(inner)
    once.app.mount("/inner", inner)
    around = FastAPI()
    around.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    add_orders(around)
    once.app.mount("/around", around)
    for path in ("/inner/orders/tea", "/around/orders/pie"):
        first, again = [await once.post(path, headers=keyed()) for _ in range(2)]
        assert (first.status_code, again.status_code) == (201, 201)
        assert (first.content, again.headers["idempotent-replayed"]) == (again.content, "true")
    assert await once.audit() == ["tea", "pie"]


async def test_the_key_is_given_to_the_endpoint_and_described_in_the_api(once: Shop) -> None:
    @once.app.post("/lamps")
    async def place(key: Annotated[str | None, Depends(IdempotencyKey(KEYS, required=False))]) -> str | None:
        return key

    assert (await once.post("/lamps", headers=keyed())).json() == "k1"
    assert (await once.post("/lamps")).json() is None
    described = once.app.openapi()["paths"]["/lamps"]["post"]["parameters"]
    assert [(each["name"], each["in"]) for each in described] == [("Idempotency-Key", "header")]


# Not the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["body", "query", "path"])
async def test_another_request_under_the_same_key_is_422(once: Shop, change: str) -> None:
    await once.post("/orders/tea", headers=keyed(), content=b"1")
    reply = await once.post(
        "/orders/pie" if change == "path" else "/orders/tea",
        headers=keyed(),
        content=b"2" if change == "body" else b"1",
        params={"q": "1"} if change == "query" else {},
    )
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["type"] == "urn:stanch:problem:idempotency-reused"
    assert await once.audit() == ["tea"]


async def test_a_form_is_the_same_by_its_fields(once: Shop) -> None:
    """Its boundary is another one each time; FastAPI has read it before any dependency runs."""

    @once.app.post("/forms", dependencies=ONCE)
    async def place(item: Annotated[str, Form()], file: UploadFile, session: SessionDep) -> str:
        await session.execute(WORK, {"what": item})
        return (await file.read()).decode()

    async def send(content: bytes) -> httpx.Response:
        return await once.post("/forms", headers=keyed(), data={"item": "x"}, files={"file": ("f", content)})

    replies = [await send(b"one"), await send(b"one"), await send(b"two")]
    assert [reply.status_code for reply in replies] == [200, 200, 422]
    assert [reply.json() for reply in replies[:2]] == ["one", "one"]
    assert await once.audit() == ["x"]


async def test_a_request_under_a_key_that_is_in_use_is_409_and_may_come_back(once: Shop) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    @once.app.post("/slow", dependencies=ONCE)
    async def slow(session: SessionDep) -> str:
        inside.set()
        await go_on.wait()
        await session.execute(WORK, {"what": "slow"})
        return "done"

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        first = tasks.create_task(once.post("/slow", headers=keyed()))
        await inside.wait()
        meanwhile = await once.post("/slow", headers=keyed())
        other = tasks.create_task(once.post("/orders/tea", headers=keyed("k2")))
        await asyncio.wait({other})
        go_on.set()
    assert meanwhile.status_code == 409
    assert meanwhile.json()["type"] == "urn:stanch:problem:idempotency-in-progress"
    assert meanwhile.headers["retry-after"] == "1"
    assert other.result().status_code == 201
    later = await once.post("/slow", headers=keyed())
    assert (first.result().status_code, first.result().json()) == (200, "done")
    assert (later.status_code, later.json()) == (200, "done")
    assert await once.audit() == ["tea", "slow"]


@pytest.mark.parametrize(
    "keys",
    [[], [""], ["x" * 256], ["a b"], ["\x7f"], ["é"], ["one", "two"]],
    ids=lambda keys: repr(keys)[:20],
)
async def test_what_is_no_key_is_400(shop: Shop, keys: list[str]) -> None:
    await make_table(shop.db)
    add_orders(shop.app)
    headers = [(b"idempotency-key", key.encode("latin-1")) for key in keys]
    async with shop.client() as client:
        reply = await client.post("/orders/tea", headers=headers)
    assert reply.status_code == 400
    assert reply.json()["type"] == "urn:stanch:problem:idempotency-key"
    assert await shop.audit() == []


async def test_the_longest_key_is_a_key(once: Shop) -> None:
    key = "~" * 255
    for _ in range(2):
        assert (await once.post("/orders/tea", headers=keyed(key))).status_code == 201
    assert await once.audit() == ["tea"]


async def test_without_a_key_a_route_that_does_not_require_one_runs_unrecorded(once: Shop) -> None:
    @once.app.post("/lamps", dependencies=[Depends(IdempotencyKey(KEYS, required=False))])
    async def place(session: SessionDep) -> None:
        await session.execute(WORK, {"what": "lamp"})

    for headers in ({}, {}, keyed(), keyed()):
        assert (await once.post("/lamps", headers=headers)).status_code == 200
    assert await once.audit() == ["lamp"] * 3
    assert await records(once) == 1


# Callers --------------------------------------------------------------------------------------------------


async def current_user(authorization: Annotated[str, Header()] = "") -> str:
    if not authorization:
        raise HTTPException(401)
    return authorization


async def test_a_key_belongs_to_its_caller_and_nobody_gets_no_replay(once: Shop) -> None:
    @once.app.post("/lamps", dependencies=[Depends(IdempotencyKey(KEYS, caller=current_user))])
    async def place(session: SessionDep, request: Request) -> str:
        await session.execute(WORK, {"what": request.headers["authorization"]})
        return request.headers["authorization"]

    async def post(*who: str) -> httpx.Response:
        return await once.post(
            "/lamps", headers={**keyed(), **dict.fromkeys(["authorization"] if who else [], *who)}
        )

    replies = [await post("ann"), await post("bob"), await post("ann"), await post()]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 401]
    assert [reply.json() for reply in replies[:3]] == ["ann", "bob", "ann"]
    assert await once.audit() == ["ann", "bob"]
    stored = await once.judge.fetch("SELECT caller FROM stanch_idempotency")
    assert not {"ann", "bob"} & {row["caller"] for row in stored}


@pytest.mark.parametrize("nobody", [None, "", True, ["list"]])
async def test_a_caller_who_is_nobody_is_refused(shop: Shop, nobody: object) -> None:
    """Else all who are nobody would share their keys."""
    await make_table(shop.db)

    @shop.app.post("/lamps", dependencies=[Depends(IdempotencyKey(KEYS, caller=lambda: nobody))])
    async def place() -> None: ...

    reply = await call(shop.app, "/lamps", headers=keyed())
    assert comes_from(reply.error, ConfigError)


# What is not recorded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["returned", "raised", "streamed", "broken"])
async def test_a_reply_that_stores_nothing_is_not_recorded(once: Shop, how: str) -> None:
    tried: list[str] = []

    @once.app.post("/lamps", dependencies=ONCE)
    async def place(session: SessionDep) -> Response:
        tried.append(how)
        await session.execute(WORK, {"what": "lamp"})
        if len(tried) > 1:
            return Response(status_code=201)
        if how == "raised":
            raise HTTPException(404)
        if how == "broken":
            raise ZeroDivisionError
        if how == "streamed":  # what is not recorded need not be recordable
            return StreamingResponse(iter([b"no", b"such", b"lamp"]), 410)
        return Response(status_code=409)

    first, second, third = [(await once.post("/lamps", headers=keyed())).status_code for _ in range(3)]
    assert first == {"returned": 409, "raised": 404, "streamed": 410, "broken": 500}[how]
    assert (second, third, len(tried)) == (201, 201, 2)
    assert await once.audit() == ["lamp"]


async def test_a_commit_that_fails_records_nothing(once: Shop) -> None:
    @once.app.post("/lamps", dependencies=ONCE)
    async def place(session: SessionDep) -> None:
        await doom(session)

    for _ in range(2):
        assert (await once.post("/lamps", headers=keyed())).status_code == 409
    assert (await records(once), await once.children()) == (0, 0)


async def test_a_unit_marked_rollback_only_is_not_recorded(once: Shop) -> None:
    @once.app.post("/lamps", dependencies=ONCE)
    async def place(session: SessionDep) -> None:
        await session.execute(WORK, {"what": "lamp"})
        rollback_only(session)

    assert (await once.post("/lamps", headers=keyed())).status_code == 200
    assert (await records(once), await once.audit()) == (0, [])


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("stream", "is streamed without a declared length"),
        ("too large", "has more than the 100 bytes that are recorded"),
        ("declared too large", "has 101 bytes, more than the 100 that are recorded"),
        ("pieces too large", "has more than the 100 bytes that are recorded"),
    ],
)
async def test_a_reply_that_cannot_be_recorded_is_refused_and_nothing_is_stored(
    once: Shop, kind: str, told: str
) -> None:
    async def pieces() -> AsyncGenerator[bytes]:
        for _ in range(3):
            yield b"x" * 50

    @once.app.post("/lamps", dependencies=[Depends(IdempotencyKey(KEYS, max_body=100))])
    async def place(session: SessionDep) -> Response:
        await session.execute(WORK, {"what": "lamp"})
        match kind:
            case "stream":
                return StreamingResponse(iter([b"short"]))
            case "pieces too large":
                return StreamingResponse(pieces(), headers={"content-length": "100"})
            case "declared too large":
                return Response(b"x" * 101)
            case _:
                reply = Response(b"x" * 101)
                del reply.headers["content-length"]
                return reply

    reply = await call(once.app, "/lamps", headers=keyed())
    assert reply.starts == [500]
    assert comes_from(reply.error, ReplyNotRecordable)
    assert f"POST /lamps: the reply {told}" in str(reply.error)
    assert (await records(once), await once.audit()) == (0, [])


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_reply_in_pieces_of_a_declared_length_is_recorded_whole(
    once: Shop, tmp_path: Path, spec_version: str
) -> None:
    file = tmp_path / "big"
    file.write_bytes(b"0123456789" * 20_000)

    @once.app.post("/lamps", dependencies=ONCE)
    async def place(session: SessionDep) -> FileResponse:
        await session.execute(WORK, {"what": "lamp"})
        return FileResponse(file, media_type="text/plain")

    replies: list[Reply] = [
        await call(once.app, "/lamps", headers=keyed(), spec_version=spec_version) for _ in range(2)
    ]
    assert [reply.starts for reply in replies] == [[200], [200]]
    assert [reply.body for reply in replies] == [file.read_bytes()] * 2
    assert await once.audit() == ["lamp"]


# What parts the work from its record ----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["app", "route"])
async def test_manual_mode_is_refused(bare_shop: Shop, where: str) -> None:
    install(bare_shop.app, bare_shop.db, commit_mode="manual" if where == "app" else None)
    await make_table(bare_shop.db)

    async def place(session: SessionDep) -> None:
        raise AssertionError("the endpoint ran")

    endpoint = unit(commit_mode="manual")(place) if where == "route" else place
    bare_shop.app.post("/lamps", dependencies=ONCE)(endpoint)
    reply = await call(bare_shop.app, "/lamps", headers=keyed())
    assert comes_from(reply.error, UnitConflict)


async def test_a_commit_by_hand_is_refused_and_a_savepoint_is_not(once: Shop) -> None:
    @once.app.post("/lamps/{how}", dependencies=ONCE)
    async def place(how: str, session: SessionDep) -> None:
        async with session.begin_nested():
            await session.execute(WORK, {"what": how})
        if how == "by hand":
            await session.commit()

    reply = await call(once.app, "/lamps/by hand", headers=keyed())
    assert comes_from(reply.error, UnitConflict)
    assert "commits by hand" in str(reply.error)
    assert (await once.post("/lamps/unit", headers=keyed())).status_code == 200
    assert await once.audit() == ["unit"]


async def test_a_handler_of_the_app_that_answers_instead_may_commit(once: Shop) -> None:
    @once.app.exception_handler(ZeroDivisionError)
    async def sorry(_request: Request, _error: Exception) -> Response:
        return Response("sorry", 503)

    @once.app.post("/lamps", dependencies=ONCE)
    async def place() -> None:
        raise ZeroDivisionError

    assert (await once.post("/lamps", headers=keyed())).status_code == 503
    assert await records(once) == 0


async def test_two_keys_on_one_route_are_refused(once: Shop) -> None:
    second = Depends(IdempotencyKey(KEYS, max_body=5))

    @once.app.post("/lamps", dependencies=[*ONCE, second])
    async def place() -> None: ...

    assert comes_from((await call(once.app, "/lamps", headers=keyed())).error, UnitConflict)


async def test_writes_to_another_database_are_refused_and_reads_are_not(bare_shop: Shop) -> None:
    """Its commit could fail after the record of a success is stored."""
    other = bare_shop.database(name="other")
    install(bare_shop.app, bare_shop.db, other)
    await make_table(bare_shop.db)

    @bare_shop.app.post("/{how}", dependencies=ONCE)
    async def place(how: str, session: SessionDep, second: OtherDep) -> None:
        await session.execute(WORK, {"what": how})
        await second.execute(WORK if how == "write" else text("SELECT 1"), {"what": "other"})

    try:
        assert comes_from((await call(bare_shop.app, "/write", headers=keyed())).error, UnitConflict)
        assert await bare_shop.audit() == []
        assert (await bare_shop.post("/read", headers=keyed())).status_code == 200
        assert await bare_shop.audit() == ["read"]
    finally:
        await other.close()


# Races and faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_twenty_clients_with_one_key_have_one_effect(once: Shop, isolation_level: Any) -> None:
    @once.app.post("/race", dependencies=ONCE, status_code=201)
    @unit(isolation_level=isolation_level)
    async def race(session: SessionDep) -> str:
        await session.execute(WORK, {"what": "race"})
        await session.execute(text("SELECT pg_sleep(0.02)"))
        return "made"

    async def insist() -> tuple[int, list[int]]:
        seen: list[int] = []
        while True:
            reply = await once.post("/race", headers=keyed())
            seen.append(reply.status_code)
            if reply.status_code not in (409, 503):
                return reply.status_code, seen
            await asyncio.sleep(0.01)  # the client's own patience

    async with asyncio.timeout(30):
        ends = await asyncio.gather(*(insist() for _ in range(20)))
    assert {status for status, _ in ends} == {201}
    assert any(409 in seen for _, seen in ends), "nobody met anybody"
    assert await once.audit() == ["race"]
    assert await records(once) == 1


async def test_the_primary_key_has_the_last_word_where_no_lock_was_held(once: Shop) -> None:
    """A rollback by hand gives the lock back: two may work at once, and one of them is rolled back."""
    inside, go_on = asyncio.Event(), asyncio.Event()

    @once.app.post("/slow", dependencies=ONCE)
    async def slow(session: SessionDep) -> None:
        await session.rollback()
        await session.execute(WORK, {"what": "slow"})
        if not inside.is_set():
            inside.set()
            await go_on.wait()

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        first = tasks.create_task(once.post("/slow", headers=keyed()))
        await inside.wait()
        second = await once.post("/slow", headers=keyed())
        go_on.set()
    assert (second.status_code, first.result().status_code) == (200, 409)
    assert first.result().json()["type"] == "urn:stanch:problem:idempotency-in-progress"
    assert await once.audit() == ["slow"]


@asynccontextmanager
async def served_through(judge: FreshDatabase, driver: str) -> AsyncGenerator[tuple[FastAPI, FaultProxy]]:
    async with FaultProxy(judge.server.port) as proxy:
        db = Database(proxy.through(judge.url(driver)), pool_size=2, max_overflow=0, commit_timeout=2)
        app = FastAPI()
        install(app, db)
        add_orders(app)
        try:
            yield app, proxy
            await assert_nothing_left(judge, db)
        finally:
            await db.close()


@pytest.mark.parametrize("verdict", [Verdict.CUT_ANSWER, Verdict.CUT])
async def test_a_lost_commit_says_that_it_may_be_repeated_with_the_key_and_only_then(
    once: Shop, verdict: Verdict
) -> None:
    @once.app.post("/unsafe")
    async def unsafe(session: SessionDep) -> None:
        await session.execute(WORK, {"what": "unsafe"})

    async with served_through(once.judge, once.driver) as (app, proxy), client_of(app) as client:
        app.include_router(once.app.router)
        proxy.on_client_message = at_commit(verdict)
        unknown = await client.post("/orders/tea", headers=keyed())
        assert proxy.verdicts[verdict] == 1
        assert unknown.status_code == 503
        assert unknown.json()["type"] == "urn:stanch:problem:commit-outcome-unknown"
        assert unknown.headers["retry-after"] == "1"
        again = await client.post("/orders/tea", headers=keyed())
        proxy.on_client_message = at_commit(verdict)
        without = await client.post("/unsafe")
    assert again.json() == {"number": 1, "got": ""}
    assert (again.headers.get("idempotent-replayed") == "true") is (verdict is Verdict.CUT_ANSWER)
    assert (without.status_code, without.headers.get("retry-after")) == (503, None)
    assert (await once.audit())[:1] == ["tea"]


CUTS = (Verdict.CUT, Verdict.CUT_ANSWER)


def cut_at(chance: random.Random) -> OnClientMessage:
    """A hook that cuts the wire at one random message of those that a request takes.

    After an answer only where the answer has an end: to a Query or a Sync.
    """
    verdict, left = chance.choice(CUTS), chance.randrange(1, 12)

    def judge(kind: str, _payload: bytes) -> Verdict:
        nonlocal left
        if verdict is Verdict.CUT_ANSWER and kind not in "QS":
            return Verdict.FORWARD
        left -= 1
        return verdict if left == 0 else Verdict.FORWARD

    return judge


async def _insist(client: httpx.AsyncClient, key: str, outcomes: list[int]) -> httpx.Response:
    """Repeat an order until the answer is a success, at most five times."""
    for _ in range(5):
        reply = await client.post("/orders/tea", headers=keyed(key))
        outcomes.append(reply.status_code)
        if reply.status_code == 201:
            return reply
    raise AssertionError(f"no success: {outcomes}")


async def test_thirty_requests_cut_off_at_random_points_and_repeated_have_thirty_effects(once: Shop) -> None:
    """The wire is cut at a random message, before it or after its answer; the client repeats until it is told."""
    seed = int(os.environ.get("STANCH_SEED", "20261122"))
    print(f"STANCH_SEED={seed}")
    chance = random.Random(seed)
    outcomes: list[int] = []
    async with served_through(once.judge, once.driver) as (app, proxy), client_of(app) as client:
        for number in range(30):
            proxy.on_client_message = cut_at(chance) if number % 3 else at_commit(chance.choice(CUTS))
            reply = await _insist(client, f"key-{number}", outcomes)
            assert (reply.status_code, reply.json()["number"]) == (201, number + 1)
        faults = sum(proxy.verdicts[verdict] for verdict in CUTS)
    print({status: outcomes.count(status) for status in set(outcomes)}, "faults:", faults)
    assert faults >= 20
    assert await once.audit() == ["tea"] * 30
    assert await records(once) == 30


# SQLite ---------------------------------------------------------------------------------------------------


async def test_on_sqlite_writers_take_turns_and_the_second_gets_the_reply_of_the_first(
    tmp_path: Path,
) -> None:
    async with Database(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", pool_size=5, max_overflow=0) as db:
        async with db.begin() as connection:
            await connection.run_sync(METADATA.create_all)
            await connection.execute(text("CREATE TABLE audit (id INTEGER PRIMARY KEY, what TEXT)"))
        app = FastAPI()
        install(app, db)
        add_orders(app)
        async with client_of(app) as client:
            replies = await asyncio.gather(*(client.post("/orders/tea", headers=keyed()) for _ in range(5)))
            other = await client.post("/orders/tea", headers=keyed(), content=b"other")
        assert [(reply.status_code, reply.json()["number"]) for reply in replies] == [(201, 1)] * 5
        assert other.status_code == 422
        async with db.session() as session:
            assert (await session.execute(text("SELECT count(*) FROM audit"))).scalar_one() == 1
        assert await purge(db, KEYS, older_than=timedelta(hours=1)) == 0
        async with db.begin() as connection:
            await connection.execute(text("UPDATE stanch_idempotency SET created_at = '2020-01-01 00:00:00'"))
        assert await purge(db, KEYS, older_than=timedelta(hours=1)) == 1


# The table ------------------------------------------------------------------------------------------------


async def test_purge_forgets_what_is_older_and_nothing_else(once: Shop) -> None:
    for key in ("old", "new"):
        await once.post("/orders/tea", headers=keyed(key))
    await once.judge.execute(
        "UPDATE stanch_idempotency SET created_at = now() - interval '3 days' WHERE key = 'old'"
    )
    async with once.db.session() as session:  # its own transaction decides
        assert await purge(session, KEYS, older_than=timedelta(days=2)) == 1
        await session.rollback()
    assert await records(once) == 2
    assert await purge(once.db, KEYS, older_than=timedelta(days=2)) == 1
    await once.post("/orders/tea", headers=keyed("new"))
    assert await once.audit() == ["tea", "tea"]


async def test_purge_refuses_to_forget_everything(shop: Shop) -> None:
    with pytest.raises(ConfigError, match="older_than must be a positive length of time"):
        await purge(shop.db, KEYS, older_than=timedelta(0))


@pytest.mark.parametrize("wrong", [{"table": "keys"}, {"table": None}, {"max_body": 0}, {"max_body": True}])
def test_a_wrong_argument_is_refused_where_it_is_written(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"table": KEYS, **wrong}
    with pytest.raises(ConfigError, match="IdempotencyKey"):
        IdempotencyKey(**arguments)


def test_equal_arguments_make_equal_dependencies() -> None:
    assert IdempotencyKey(KEYS) == IdempotencyKey(KEYS)
    assert len({IdempotencyKey(KEYS), IdempotencyKey(KEYS), IdempotencyKey(KEYS, required=False)}) == 2


async def test_no_key_and_no_body_shows_in_logs_or_replies(
    once: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    key, body = "planted-key-canary", "planted-body-canary"

    @once.app.post("/large", dependencies=[Depends(IdempotencyKey(KEYS, max_body=3))])
    async def large(request: Request) -> Response:
        return Response(await request.body())

    caplog.set_level("DEBUG", "stanch")
    shown: list[str] = []
    for content in (body, body, "else"):
        reply = await once.post("/orders/tea", headers=keyed(key), content=content)
        shown += [str(reply.headers), reply.text if reply.status_code >= 400 else ""]
    shown.append(str((await call(once.app, "/large", headers=keyed(key), body=body.encode())).error))
    shown.append((await once.post("/orders/tea", headers=keyed(key + " "))).text)
    shown += [record.getMessage() for record in caplog.records]
    assert not [text for text in shown if "canary" in text]
    assert "IdempotencyKeyReused" in repr(caplog.records) or "idempotency-reused" in "".join(shown)
