"""When a request's work is committed, when it is rolled back, and that the reply never says otherwise."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, cast

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from stanch import rollback_only
from stanch.completion import OutOfReach
from stanch.errors import UnitConflict, UnsavedWrites, WriteRefused
from stanch.fastapi import DatabaseDep, ReaderDep, SessionDep, install, provide_session, unit
from tests.requests.shop import Order, Shop, call, doom, write_order
from tests.support.judge import assert_nothing_left

pytestmark = pytest.mark.anyio

ManualDep = Annotated[AsyncSession, Depends(provide_session(commit_mode="manual"))]
SerializableDep = Annotated[AsyncSession, Depends(provide_session(isolation_level="SERIALIZABLE"))]
ReadOnlyDep = Annotated[AsyncSession, Depends(provide_session(read_only=True))]
OneDep = Annotated[AsyncSession, Depends(provide_session("one"))]
TwoDep = Annotated[AsyncSession, Depends(provide_session("two"))]


async def count_orders(session: SessionDep) -> int:
    found: int = (await session.execute(text("SELECT count(*) FROM orders"))).scalar_one()
    return found


async def count_users(session: ReaderDep) -> int:
    count: int = (await session.execute(text("SELECT count(*) FROM users"))).scalar_one()
    return count


class OrderOut(BaseModel):
    id: int
    item: int  # on purpose not what the orders hold


# What it costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "tasks"), [("/unused", 0), ("/read", 0), ("/read-in-a-transaction", 1), ("/written", 1)]
)
async def test_a_request_takes_one_task_of_ours_to_commit_in_and_none_to_read(
    each_shop: Shop, monkeypatch: pytest.MonkeyPatch, path: str, tasks: int
) -> None:
    """What holds nothing is settled and closed where the reply passes: there is nothing that could be cut short."""
    begun: list[str] = []
    begin = cast("Any", OutOfReach).__init__

    def count(self: OutOfReach[Any], operation: Any, *arguments: Any) -> None:
        begun.append(operation.__qualname__)
        begin(self, operation, *arguments)

    @each_shop.app.get("/unused")
    async def unused(session: SessionDep) -> dict[str, int]:
        return {}

    @each_shop.app.get("/read")
    async def read(users: Annotated[int, Depends(count_users)]) -> dict[str, int]:
        return {"users": users}

    @each_shop.app.get("/read-in-a-transaction")
    async def read_in_a_transaction(orders: Annotated[int, Depends(count_orders)]) -> dict[str, int]:
        return {"orders": orders}

    @each_shop.app.get("/written")
    async def write(session: SessionDep) -> dict[str, int]:
        session.add(Order(id=1, item="tea"))
        return {}

    async with each_shop.client(each_shop.app) as client:
        await client.get("/read-in-a-transaction")  # the connection is open from here on
        monkeypatch.setattr(OutOfReach, "__init__", count)
        assert (await client.get(path)).status_code == 200
        monkeypatch.undo()
    assert len(begun) == tasks, begun


# Below 400 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 301, 303, 304, 307, 399])
async def test_a_reply_below_400_is_committed(shop: Shop, status: int) -> None:
    @shop.app.post("/orders")
    async def place(session: SessionDep) -> Response:
        await write_order(session, 1)
        return Response(status_code=status)

    assert (await shop.post("/orders")).status_code == status
    assert await shop.orders() == [1]


async def test_what_was_added_but_not_flushed_is_committed_too(each_shop: Shop) -> None:
    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, int]:
        session.add(Order(id=1, item="tea"))
        return {"id": 1}

    assert (await each_shop.post("/orders")).status_code == 201
    assert await each_shop.orders() == [1]


async def test_a_redirect_is_committed(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def place(session: SessionDep) -> RedirectResponse:
        await write_order(session, 1)
        return RedirectResponse("/orders/1", 303)

    assert (await shop.post("/orders")).status_code == 303
    assert await shop.orders() == [1]


async def test_a_raised_redirect_is_committed(shop: Shop) -> None:
    """The status decides, not how it came about."""

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        raise HTTPException(303, headers={"location": "/orders/1"})

    assert (await shop.post("/orders")).status_code == 303
    assert await shop.orders() == [1]


async def test_a_head_request_is_committed_like_a_get(shop: Shop) -> None:
    @shop.app.api_route("/orders", methods=["GET", "HEAD"])
    async def read(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    async with shop.client() as client:
        assert (await client.head("/orders")).status_code == 200
    assert await shop.orders() == [1]


async def test_the_commit_stands_before_the_first_byte_of_the_reply(each_shop: Shop) -> None:
    seen: list[list[int]] = []

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    async def look(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.append(await each_shop.orders())
            assert each_shop.db.stats().in_use == 0, "a connection is held while the reply leaves"

    reply = await call(each_shop.app, "/orders", on_message=look)
    assert (reply.starts, reply.error) == ([201], None)
    assert seen == [[1]]


# From 400 on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 409, 422, 451, 500, 503])
@pytest.mark.parametrize("how", ["raised", "returned", "set"])
async def test_an_error_reply_stores_nothing(shop: Shop, how: str, status: int) -> None:
    @shop.app.post("/orders")
    async def place(session: SessionDep, response: Response) -> Any:
        await write_order(session, 1)
        if how == "raised":
            raise HTTPException(status)
        if how == "returned":
            return JSONResponse({"no": True}, status)
        response.status_code = status
        return {"no": True}

    assert (await shop.post("/orders")).status_code == status
    assert await shop.orders() == []


async def test_a_reply_that_does_not_validate_stores_nothing(shop: Shop) -> None:
    @shop.app.post("/orders", response_model=OrderOut)
    async def place(session: SessionDep) -> Any:
        await write_order(session, 1)
        return {"id": 1, "item": "tea"}

    assert (await shop.post("/orders")).status_code == 500
    assert await shop.orders() == []


async def test_an_unhandled_error_stores_nothing_and_stays_itself(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        raise ZeroDivisionError("mine")

    reply = await call(shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, ZeroDivisionError)
    assert await shop.orders() == []


async def test_no_reply_at_all_stores_nothing(shop: Shop) -> None:
    class Silence(Response):
        async def __call__(self, scope: object, receive: object, send: object) -> None:
            """Sends nothing."""

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> Response:
        await write_order(session, 1)
        return Silence()

    reply = await call(shop.app, "/orders")
    assert reply.messages == []
    assert await shop.orders() == []


async def test_an_error_that_a_handler_answers_below_400_commits(shop: Shop) -> None:
    """Documented: the status decides, so whoever turns an error into a 200 keeps what was done before it."""

    class Soft(Exception):
        pass

    @shop.app.exception_handler(Soft)
    async def soften(_request: Request, _error: Exception) -> Response:
        return PlainTextResponse("never mind")

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        raise Soft

    assert (await shop.post("/orders")).status_code == 200
    assert await shop.orders() == [1]


async def test_a_counter_in_a_transaction_of_its_own_survives_the_error_reply(shop: Shop) -> None:
    @shop.app.post("/login")
    async def log_in(session: SessionDep, db: DatabaseDep) -> None:
        await write_order(session, 1)
        async with db.transaction() as own:
            await own.execute(text("INSERT INTO audit (what) VALUES ('failed login')"))
        raise HTTPException(401)

    assert (await shop.post("/login")).status_code == 401
    assert (await shop.orders(), await shop.audit()) == ([], ["failed login"])


async def test_rollback_only_answers_200_and_stores_nothing(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def preview(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        rollback_only(session)
        return {"preview": True}

    assert (await each_shop.post("/orders")).json() == {"preview": True}
    assert await each_shop.orders() == []


async def test_a_rolled_back_unit_keeps_what_was_loaded_readable(shop: Shop) -> None:
    """A reader's objects are serialised after the handler: nothing may have expired by then."""
    loaded: list[Order] = []

    @shop.app.get("/orders/1")
    async def read(session: ReaderDep) -> dict[str, bool]:
        loaded.append(await session.get_one(Order, 1))
        return {"ok": True}

    await shop.judge.execute("INSERT INTO orders VALUES (1, 'tea')")
    assert (await shop.get("/orders/1")).status_code == 200
    assert loaded[0].item == "tea"


# What the handler closed itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["with", "close"])
async def test_a_session_closed_by_the_handler_with_uncommitted_writes_is_not_answered_201(
    each_shop: Shop, how: str
) -> None:
    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        if how == "with":
            async with session:
                await write_order(session, 1)
        else:
            await write_order(session, 1)
            await session.close()
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, UnsavedWrites)
    assert "(Order)" in reply.error.what
    assert await each_shop.orders() == []


async def test_a_session_closed_by_the_handler_after_its_commit_is_answered_201(each_shop: Shop) -> None:
    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        async with session:
            await write_order(session, 1)
            await session.commit()
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.error) == ([201], None)
    assert await each_shop.orders() == [1]


# Two databases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
async def test_settling_behind_a_lock_ends_within_the_commit_timeout_also_with_two_databases(
    bare_shop: Shop, several: bool
) -> None:
    """The flush waits for somebody else's uncommitted row; no timeout of the server's ends that."""
    patience: dict[str, Any] = {
        "commit_timeout": 0.5, "close_timeout": 0.5, "statement_timeout": None, "lock_timeout": None,
    }  # fmt: skip
    one, two = (bare_shop.database(name=name, **patience) for name in ("one", "two"))
    install(bare_shop.app, *([one, two] if several else [two]))

    @bare_shop.app.post("/orders", status_code=201)
    async def place(first: OneDep, second: TwoDep) -> dict[str, bool]:
        first.add(Order(id=7, item="tea"))
        second.add(Order(id=1, item="tea"))
        return {"ok": True}

    @bare_shop.app.post("/order", status_code=201)
    async def place_one(session: TwoDep) -> dict[str, bool]:
        session.add(Order(id=1, item="tea"))
        return {"ok": True}

    async with one, two:
        async with bare_shop.db.connect() as blocker:
            await blocker.execute(text("INSERT INTO orders VALUES (1, 'coffee')"))
            begun = time.monotonic()
            reply = await call(bare_shop.app, "/orders" if several else "/order")
            assert 0.4 < time.monotonic() - begun < 4
            await blocker.rollback()
        assert reply.starts == [503]
        await assert_nothing_left(bare_shop.judge, one)
        await assert_nothing_left(bare_shop.judge, two)
    assert await bare_shop.orders() == []


# A commit that fails --------------------------------------------------------------------------------------


async def test_a_failed_commit_is_answered_by_us_where_the_app_has_no_handler(each_shop: Shop) -> None:
    ran: list[str] = []

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, tasks: BackgroundTasks) -> dict[str, bool]:
        tasks.add_task(ran.append, "background task of a dead reply")
        await write_order(session, 1)
        await doom(session)
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.is_complete, reply.error) == ([409], True, None)
    assert b"ok" not in reply.body
    assert (await each_shop.orders(), await each_shop.children(), ran) == ([], 0, [])


@pytest.mark.parametrize("reads_body", [False, True])
async def test_a_failed_commit_is_answered_by_the_apps_own_handler(each_shop: Shop, reads_body: bool) -> None:
    """Its handler may wait for the body: FastAPI's own request has it, a fresh one would wait for ever."""

    @each_shop.app.exception_handler(IntegrityError)
    async def conflict(request: Request, error: Exception) -> Response:
        assert isinstance(error, IntegrityError)
        sent = await request.body() if reads_body else b""
        return PlainTextResponse(b"mine: " + sent, 418)

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep, new: dict[str, str]) -> dict[str, bool]:
        await doom(session)
        return {"ok": True}

    reply = await call(
        each_shop.app, "/orders", body=b'{"item": "tea"}', headers={"content-type": "application/json"}
    )
    assert (reply.starts, reply.error) == ([418], None)
    assert reply.body == (b'mine: {"item": "tea"}' if reads_body else b"mine: ")
    assert await each_shop.children() == 0


@pytest.mark.parametrize("kind", [DBAPIError, SQLAlchemyError])
async def test_a_handler_of_the_app_for_a_base_class_wins_over_ours(
    shop: Shop, kind: type[Exception]
) -> None:
    @shop.app.exception_handler(kind)
    async def conflict(_request: Request, _error: Exception) -> Response:
        return PlainTextResponse("mine", 418)

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await doom(session)

    assert (await call(shop.app, "/orders")).starts == [418]


@pytest.mark.parametrize("key", [Exception, 500])
async def test_the_apps_handler_for_everything_answers_what_ours_leaves(
    bare_shop: Shop, key: type[Exception] | int
) -> None:
    """As without stanch: it answers, and the error still goes on to the server's log."""
    calls: list[str] = []
    install(bare_shop.app, bare_shop.db, exception_handlers=False)

    @bare_shop.app.exception_handler(key)
    async def everything(_request: Request, error: Exception) -> Response:
        calls.append(type(error).__name__)
        return PlainTextResponse("sorry", 500)

    @bare_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await doom(session)
        return {"ok": True}

    reply = await call(bare_shop.app, "/orders")
    assert (reply.starts, reply.body, calls) == ([500], b"sorry", ["IntegrityError"])
    assert isinstance(reply.error, IntegrityError)


async def test_without_any_handler_the_failed_commit_is_one_plain_500(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db, exception_handlers=False)

    @bare_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await doom(session)
        return {"ok": True}

    reply = await call(bare_shop.app, "/orders")
    assert (reply.starts, reply.body) == ([500], b"Internal Server Error")
    assert isinstance(reply.error, IntegrityError)


async def test_a_dead_reply_cannot_be_swallowed_and_sent_all_the_same(shop: Shop) -> None:
    """An app that catches everything its response raises, and answers again: only the failure's reply leaves."""

    class Stubborn(JSONResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            for _ in range(3):
                with suppress(BaseException):
                    await super().__call__(scope, receive, send)

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> Response:
        await doom(session)
        return Stubborn({"ok": True})

    reply = await call(shop.app, "/orders")
    assert (reply.starts, reply.is_complete, reply.error) == ([409], True, None)
    assert b"ok" not in reply.body


async def test_what_else_fails_while_a_dead_reply_unwinds_is_kept_as_a_note(shop: Shop) -> None:
    noted: list[str] = []

    @shop.app.exception_handler(IntegrityError)
    async def conflict(_request: Request, error: Exception) -> Response:
        noted.extend(getattr(error, "__notes__", []))
        return PlainTextResponse("mine", 409)

    class Clumsy(JSONResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                raise KeyError("teardown")

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> Response:
        await doom(session)
        return Clumsy({"ok": True})

    assert (await call(shop.app, "/orders")).starts == [409]
    assert noted == ["while the reply was being abandoned, KeyError was raised as well"]


async def test_the_replacement_may_write_and_answer_200_and_is_committed(each_shop: Shop) -> None:
    sessions: list[AsyncSession] = []

    @each_shop.app.exception_handler(IntegrityError)
    async def note(_request: Request, _error: Exception) -> Response:
        await sessions[0].execute(text("INSERT INTO audit (what) VALUES ('conflict')"))
        return PlainTextResponse("noted", 200)

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        sessions.append(session)
        await write_order(session, 1)
        await doom(session)
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.body) == ([200], b"noted")
    assert (await each_shop.orders(), await each_shop.audit()) == ([], ["conflict"])


async def test_the_replacement_may_write_and_answer_409_and_is_rolled_back(shop: Shop) -> None:
    sessions: list[AsyncSession] = []

    @shop.app.exception_handler(IntegrityError)
    async def note(_request: Request, _error: Exception) -> Response:
        await sessions[0].execute(text("INSERT INTO audit (what) VALUES ('conflict')"))
        return PlainTextResponse("noted", 409)

    @shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        sessions.append(session)
        await doom(session)
        return {"ok": True}

    assert (await call(shop.app, "/orders")).starts == [409]
    assert await shop.audit() == []


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("response_class", [PlainTextResponse, StreamingResponse])
async def test_a_replacement_whose_commit_fails_too_is_one_500(
    shop: Shop, response_class: type[Response], spec_version: str
) -> None:
    """There is no second replacement. Under 2.3 a stream sends from a task group, which wraps what it raises."""
    sessions: list[AsyncSession] = []

    @shop.app.exception_handler(IntegrityError)
    async def note(_request: Request, _error: Exception) -> Response:
        await doom(sessions[0])
        if response_class is StreamingResponse:
            return StreamingResponse(_chunks("noted"))
        return PlainTextResponse("noted")

    @shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        sessions.append(session)
        await doom(session)
        return {"ok": True}

    reply = await call(shop.app, "/orders", spec_version=spec_version)
    assert (reply.starts, reply.body) == ([500], b"Internal Server Error")
    assert isinstance(reply.error, IntegrityError)
    assert isinstance(reply.error.__cause__, IntegrityError)
    assert await shop.children() == 0


async def test_a_replacement_that_swallows_its_own_failed_commit_is_still_one_500(shop: Shop) -> None:
    sessions: list[AsyncSession] = []

    class Stubborn(PlainTextResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            with suppress(BaseException):
                await super().__call__(scope, receive, send)

    @shop.app.exception_handler(IntegrityError)
    async def note(_request: Request, _error: Exception) -> Response:
        await doom(sessions[0])
        return Stubborn("noted")

    @shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        sessions.append(session)
        await doom(session)
        return {"ok": True}

    reply = await call(shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, IntegrityError)


# A commit that the server turned into a rollback ------------------------------------------------------------


@pytest.mark.parametrize("layer", ["orm", "core"])
async def test_a_swallowed_database_error_never_gets_a_2xx(each_shop: Shop, layer: str) -> None:
    """COMMIT of an aborted transaction is answered ROLLBACK, without an error; every other stack says 201."""

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        if layer == "orm":
            await write_order(session, 1)
        else:
            await session.execute(insert(Order).values(id=1, item="tea"))
        with suppress(DBAPIError):
            if layer == "orm":
                await session.execute(text("SELECT 1 / 0"))
            else:
                await (await session.connection()).exec_driver_sql("SELECT 1 / 0")
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert reply.starts == [500]
    assert b"ok" not in reply.body
    assert type(reply.error).__name__ == "CommitRefused"
    assert await each_shop.orders() == []


async def test_a_swallowed_flush_error_never_gets_a_2xx(each_shop: Shop) -> None:
    """SQLAlchemy knows of this one itself, and asks for a rollback first."""

    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        session.add(Order(id=2, item=""))
        with suppress(IntegrityError):
            await session.flush()
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert len(reply.starts) == 1
    assert reply.starts[0] >= 400
    assert await each_shop.orders() == []


async def test_an_error_in_a_savepoint_costs_only_the_savepoint(each_shop: Shop) -> None:
    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        with suppress(DBAPIError):
            async with session.begin_nested():
                await write_order(session, 2)
                await session.execute(text("SELECT 1 / 0"))
        return {"ok": True}

    assert (await call(each_shop.app, "/orders")).starts == [201]
    assert await each_shop.orders() == [1]


# Manual mode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["app", "route", "dependency"])
async def test_in_manual_mode_only_what_the_handler_commits_is_stored(bare_shop: Shop, how: str) -> None:
    app = bare_shop.app
    install(app, bare_shop.db, commit_mode="manual" if how == "app" else "auto")

    async def place(session: AsyncSession) -> dict[str, bool]:
        await write_order(session, 1)
        await session.commit()
        await write_order(session, 2)
        return {"ok": True}

    @app.post("/app", status_code=201)
    async def by_app(session: SessionDep) -> dict[str, bool]:
        return await place(session)

    @app.post("/route", status_code=201)
    @unit(commit_mode="manual")
    async def by_route(session: SessionDep) -> dict[str, bool]:
        return await place(session)

    @app.post("/dependency", status_code=201)
    async def by_dependency(session: ManualDep) -> dict[str, bool]:
        return await place(session)

    assert (await bare_shop.post(f"/{how}")).status_code == 201
    assert await bare_shop.orders() == [1]
    assert [str(event) for event in bare_shop.told.events] == [
        f"POST /{how} ended with uncommitted writes (Order); they were rolled back"
    ]


async def test_unsaved_writes_can_be_refused(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db, commit_mode="manual", unsaved="raise")

    @bare_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    reply = await call(bare_shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, UnsavedWrites)
    assert "(Order)" in reply.error.what
    assert await bare_shop.orders() == []


async def test_unsaved_writes_can_be_ignored(bare_shop: Shop) -> None:
    install(bare_shop.app, bare_shop.db, commit_mode="manual", unsaved="ignore")

    @bare_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    assert (await call(bare_shop.app, "/orders")).starts == [201]
    assert (await bare_shop.orders(), bare_shop.told.kinds) == ([], [])


async def test_an_error_reply_in_manual_mode_tells_of_no_unsaved_writes(bare_shop: Shop) -> None:
    """They were to be rolled back; there is nothing to warn of."""
    install(bare_shop.app, bare_shop.db, commit_mode="manual", unsaved="raise")

    @bare_shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        raise HTTPException(409)

    reply = await call(bare_shop.app, "/orders")
    assert (reply.starts, reply.error, bare_shop.told.kinds) == ([409], None, [])
    assert await bare_shop.orders() == []


async def test_a_route_can_be_auto_in_a_manual_app(bare_shop: Shop) -> None:
    """The way in for an app with many endpoints: route by route."""
    install(bare_shop.app, bare_shop.db, commit_mode="manual")

    @bare_shop.app.post("/orders", status_code=201)
    @unit(commit_mode="auto")
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    assert (await bare_shop.post("/orders")).status_code == 201
    assert await bare_shop.orders() == [1]


# Mixes ----------------------------------------------------------------------------------------------------


async def test_a_reader_that_writes_is_refused_and_stores_nothing(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def place(session: ReaderDep) -> dict[str, bool]:
        session.add(Order(id=1, item="tea"))
        return {"ok": True}

    reply = await call(each_shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, WriteRefused)
    assert "POST /orders" in reply.error.what
    assert "(Order)" in reply.error.what
    assert await each_shop.orders() == []


async def test_auto_beside_manual_is_auto_and_it_is_one_session(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def place(
        reader: ReaderDep,
        writer: SessionDep,
        own: ManualDep,
    ) -> dict[str, bool]:
        await write_order(own, 1)
        return {"same": reader is writer is own}

    assert (await shop.post("/orders")).json() == {"same": True}
    assert await shop.orders() == [1]


async def test_the_stronger_isolation_level_holds_for_the_whole_unit(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def place(
        reader: ReaderDep,
        session: SerializableDep,
    ) -> dict[str, str]:
        await write_order(session, 1)
        level: str = (await reader.execute(text("SHOW transaction_isolation"))).scalar_one()
        return {"level": level}

    assert (await each_shop.post("/orders")).json() == {"level": "serializable"}
    assert await each_shop.orders() == [1]


async def test_an_isolation_level_that_comes_too_late_is_a_conflict_that_names_both(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def place(
        orders: Annotated[int, Depends(count_orders)],
        session: SerializableDep,
    ) -> None: ...

    reply = await call(shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, UnitConflict)
    assert "provide_session(...)" in reply.error.what
    assert "SessionDep" in reply.error.what
    assert "@unit" in str(reply.error)


async def test_an_isolation_level_comes_in_time_after_a_reader_which_begins_nothing(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def place(
        users: Annotated[int, Depends(count_users)],
        session: SerializableDep,
    ) -> dict[str, str]:
        level: str = (await session.execute(text("SHOW transaction_isolation"))).scalar_one()
        return {"level": level}

    assert (await shop.post("/orders")).json() == {"level": "serializable"}


async def test_unit_on_the_route_sets_the_isolation_level_before_any_dependency_runs(each_shop: Shop) -> None:
    async def level(session: ReaderDep) -> str:
        found: str = (await session.execute(text("SHOW transaction_isolation"))).scalar_one()
        return found

    @each_shop.app.post("/orders")
    @unit(isolation_level="REPEATABLE READ")
    async def place(session: SessionDep, found: str = Depends(level)) -> dict[str, str]:
        await write_order(session, 1)
        return {"level": found}

    assert (await each_shop.post("/orders")).json() == {"level": "repeatable read"}
    assert await each_shop.orders() == [1]


async def test_a_writer_in_a_read_only_unit_is_a_conflict_that_names_both(shop: Shop) -> None:
    @shop.app.post("/orders")
    @unit(read_only=True)
    async def place(session: SessionDep) -> None: ...

    reply = await call(shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, UnitConflict)
    assert "SessionDep" in reply.error.what
    assert "@unit is read_only" in reply.error.what


async def test_a_read_only_unit_is_read_only_on_the_server_too(each_shop: Shop) -> None:
    @each_shop.app.get("/setting")
    async def read(session: ReadOnlyDep) -> dict[str, str]:
        found: str = (await session.execute(text("SHOW transaction_read_only"))).scalar_one()
        return {"read_only": found}

    assert (await each_shop.get("/setting")).json() == {"read_only": "on"}


# Cost and state -------------------------------------------------------------------------------------------


async def test_a_session_that_is_not_used_opens_no_connection(each_shop: Shop) -> None:
    @each_shop.app.get("/")
    async def idle(session: SessionDep, reader: ReaderDep) -> dict[str, bool]:
        return {"ok": True}

    assert (await each_shop.get("/")).status_code == 200
    assert await each_shop.connections() == []


async def test_the_next_request_starts_clean(shop: Shop) -> None:
    """Nothing of one unit is visible in the next, whatever became of it."""
    seen: list[bool] = []

    @shop.app.post("/orders/{number}")
    async def place(number: int, session: SessionDep, fail: bool = False) -> None:
        seen.append(bool(list(session)) or session.in_transaction())
        await write_order(session, number)
        if fail:
            raise HTTPException(409)

    for number, fail in enumerate([True, False, True, False]):
        await shop.post(f"/orders/{number}", params={"fail": fail})
    assert seen == [False] * 4
    assert await shop.orders() == [1, 3]


async def test_an_app_without_stanch_is_left_alone() -> None:
    app = FastAPI()

    @app.get("/")
    async def hello() -> dict[str, bool]:
        return {"ok": True}

    assert (await call(app, "/", method="GET")).starts == [200]


async def _chunks(*texts: str) -> AsyncIterator[str]:
    for chunk in texts:
        yield chunk
