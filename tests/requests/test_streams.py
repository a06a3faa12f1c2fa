"""Replies whose body is produced after the start: streams, server-sent events, generator endpoints, files."""

from __future__ import annotations

import asyncio
import importlib
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse, StreamingResponse
from sqlalchemy import text

from stanch.fastapi import ReaderDep, SessionDep, install
from tests.requests.shop import (
    Order,
    Shop,
    User,
    call,
    comes_from,
    doom,
    needs_new_fastapi,
    write_order,
)
from tests.support.judge import until
from tests.support.uvicorn_server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncSession

pytestmark = pytest.mark.anyio

SPECS = pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
"""Under 2.3, which uvicorn announces, Starlette streams from a child task; under 2.4 from the handler's own."""

SLOW_COMMIT = """
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON users DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION dawdle();
    INSERT INTO users VALUES (1, 'ada');
"""
"""An update of a user makes its COMMIT last 0.3 s."""

ASLEEP = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
IN_COMMIT = f"{ASLEEP} AND query ILIKE 'commit%'"


async def visitor(session: SessionDep) -> User:
    """A dependency that writes."""
    user = await session.get_one(User, 1)
    user.visits += 1
    return user


VisitorDep = Annotated[User, Depends(visitor)]


# Streams --------------------------------------------------------------------------------------------------


@SPECS
async def test_what_a_stream_writes_is_committed_before_its_last_message(
    each_shop: Shop, spec_version: str
) -> None:
    seen: list[list[int]] = []

    @each_shop.app.post("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "first"
            await write_order(session, 2)
            yield "second"

        await write_order(session, 1)
        return StreamingResponse(body())

    async def look(_message: Any) -> None:
        seen.append(await each_shop.orders())

    reply = await call(each_shop.app, "/orders", spec_version=spec_version, on_message=look)
    assert (reply.starts, reply.is_complete, reply.error) == ([200], True, None)
    # the start, "first", "second", and the empty last message
    assert seen == [[1], [1], [1], [1, 2]]


async def test_a_stream_whose_commit_fails_is_a_broken_reply_to_a_real_client(each_shop: Shop) -> None:
    ran: list[str] = []

    @each_shop.app.post("/orders")
    async def export(session: SessionDep, tasks: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "first"
            await doom(session)
            yield "second"

        tasks.add_task(ran.append, "background task of a broken reply")
        return StreamingResponse(body(), background=tasks)

    async with serve(each_shop.app) as url, httpx.AsyncClient(base_url=url) as client:
        received = b""
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            async with client.stream("POST", "/orders") as response:
                assert response.status_code == 200
                async for chunk in response.aiter_raw():
                    received += chunk
        assert received == b"firstsecond"
        assert (await each_shop.children(), ran) == (0, [])


@SPECS
async def test_a_stream_whose_first_commit_fails_never_starts(shop: Shop, spec_version: str) -> None:
    @shop.app.post("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "never seen"

        await doom(session)
        return StreamingResponse(body())

    reply = await call(shop.app, "/orders", spec_version=spec_version)
    assert (reply.starts, reply.is_complete, reply.error) == ([409], True, None)
    assert b"never seen" not in reply.body


@SPECS
async def test_a_stream_that_fails_keeps_what_was_committed_with_its_start_only(
    shop: Shop, spec_version: str
) -> None:
    @shop.app.post("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            await write_order(session, 2)
            yield "first"
            raise ZeroDivisionError("mine")

        await write_order(session, 1)
        return StreamingResponse(body())

    reply = await call(shop.app, "/orders", spec_version=spec_version)
    assert (reply.starts, reply.is_complete) == ([200], False)
    assert comes_from(reply.error, ZeroDivisionError)
    assert await shop.orders() == [1]


async def test_a_client_that_hangs_up_on_a_stream_leaves_no_half_of_it(each_shop: Shop) -> None:
    """Under 2.3 Starlette returns from the stream as if all were well: only the last message says so."""
    ended = asyncio.Event()

    @each_shop.app.post("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            try:
                await write_order(session, 1)
                yield "first"
                await asyncio.Event().wait()
                await write_order(session, 2)
            finally:
                ended.set()

        return StreamingResponse(body())

    async with serve(each_shop.app) as url:
        async with httpx.AsyncClient(base_url=url) as client, client.stream("POST", "/orders") as response:
            assert response.status_code == 200
            assert await anext(response.aiter_raw()) == b"first"
        await asyncio.wait_for(ended.wait(), 5)
    assert await each_shop.orders() == []
    await each_shop.assert_clean()


async def test_a_stream_that_does_not_use_the_session_holds_no_connection(each_shop: Shop) -> None:
    go_on = asyncio.Event()

    @each_shop.app.get("/orders")
    async def export(session: ReaderDep) -> StreamingResponse:
        orders = list(await session.scalars(text("SELECT id FROM orders")))

        async def body() -> AsyncIterator[str]:
            yield f"{orders}"
            await go_on.wait()

        return StreamingResponse(body())

    async with (
        serve(each_shop.app) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("GET", "/orders") as response,
    ):
        chunks = response.aiter_raw()
        assert await anext(chunks) == b"[]"
        assert each_shop.db.stats().in_use == 0
        assert await each_shop.connections() == ["idle"]
        go_on.set()
        assert [chunk async for chunk in chunks] == []


async def test_a_cursor_opened_in_the_handler_breaks_in_the_body_and_the_reply_with_it(
    each_shop: Shop,
) -> None:
    """Documented: the unit was settled in between. Open the cursor in the body."""

    @each_shop.app.get("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        result = await session.stream(text("SELECT generate_series(1, 100000)"))

        async def body() -> AsyncIterator[str]:
            yield "first"
            async for row in result:
                yield f"{row[0]}\n"

        return StreamingResponse(body())

    reply = await call(each_shop.app, "/orders", method="GET")
    assert (reply.starts, reply.is_complete) == ([200], False)
    assert reply.error is not None


@pytest.mark.parametrize("rows", [1, 5000])
async def test_a_cursor_opened_in_the_handler_disturbs_no_other_unit_from_the_body(
    each_shop: Shop, rows: int
) -> None:
    """Its connection has gone to the next: it would read, and break, somebody else's transaction."""
    small = each_shop.database(name="small", pool_size=1)
    app = FastAPI()
    install(app, small)
    await each_shop.judge.execute(f"INSERT INTO audit (what) SELECT 'public' FROM generate_series(1, {rows})")
    started, go_on = asyncio.Event(), asyncio.Event()
    reading = text("SELECT what FROM audit ORDER BY id")

    @app.get("/audit")
    async def export(session: SessionDep) -> StreamingResponse:
        result = await session.stream(reading)

        async def body() -> AsyncIterator[str]:
            started.set()
            await go_on.wait()
            async for row in result:
                yield f"{row[0]}\n"

        return StreamingResponse(body())

    async with small:
        asking = asyncio.create_task(call(app, "/audit", method="GET"))
        await started.wait()
        async with small.transaction() as other:
            await other.execute(text("INSERT INTO audit (what) VALUES ('not yet committed')"))
            go_on.set()
            reply = await asking
            mine = (await other.execute(text("SELECT count(*) FROM audit"))).scalar_one()
        assert mine == rows + 1
        assert b"not yet" not in reply.body
        assert reply.starts == [200]
        assert not reply.is_complete
        assert reply.error is not None
        assert len(await each_shop.audit()) == rows + 1, "the other unit was committed"
        assert small.stats().in_use == 0


async def test_a_cursor_opened_in_the_body_is_read_to_its_end(each_shop: Shop) -> None:
    @each_shop.app.get("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            async for row in await session.stream(text("SELECT generate_series(1, 5000)")):
                yield f"{row[0]}\n"

        return StreamingResponse(body())

    reply = await call(each_shop.app, "/orders", method="GET")
    assert (reply.starts, reply.is_complete, reply.error) == ([200], True, None)
    assert len(reply.body.split()) == 5000


async def test_an_error_reply_that_streams_stores_nothing(shop: Shop) -> None:
    @shop.app.post("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            await write_order(session, 2)
            yield "sorry"

        await write_order(session, 1)
        return StreamingResponse(body(), 409)

    reply = await call(shop.app, "/orders")
    assert (reply.starts, reply.is_complete) == ([409], True)
    assert await shop.orders() == []


# Who is inside --------------------------------------------------------------------------------------------


async def test_settling_waits_for_another_task_inside_the_session(each_shop: Shop) -> None:
    """Settling under a running statement would fail, and poison the pooled connection for the next requests."""
    tasks: list[asyncio.Task[Any]] = []

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        tasks.append(
            asyncio.create_task(_insert_slowly(session, 2))  # and nobody waits for it
        )
        await until(each_shop.judge, ASLEEP)
        return {"ok": True}

    @each_shop.app.get("/orders")
    async def read(session: ReaderDep) -> dict[str, int]:
        count: int = (await session.execute(text("SELECT count(*) FROM orders"))).scalar_one()
        return {"orders": count}

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.error) == ([200], None)
    await asyncio.gather(*tasks)
    assert await each_shop.orders() == [1, 2]
    for _ in range(6):
        assert (await each_shop.get("/orders")).json() == {"orders": 2}


async def test_a_task_that_comes_while_the_unit_is_being_settled_waits_its_turn(each_shop: Shop) -> None:
    """The start of a stream and the first statement of its generator may come at the same moment."""
    await each_shop.judge.execute(SLOW_COMMIT)
    committing = asyncio.Event()
    results: list[Any] = []

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> dict[str, bool]:
        async def late() -> None:
            await committing.wait()
            results.append((await session.execute(text("SELECT 1"))).scalar_one())

        (await session.get_one(User, 1)).visits += 1
        others.append(asyncio.create_task(late()))
        return {"ok": True}

    others: list[asyncio.Task[None]] = []
    calling = asyncio.create_task(call(each_shop.app, "/orders"))
    await until(each_shop.judge, IN_COMMIT)
    committing.set()
    reply = await calling
    await asyncio.gather(*others)
    assert (reply.starts, reply.error, results) == ([200], None, [1])


async def test_what_is_added_while_the_unit_is_being_settled_is_committed_with_the_rest(shop: Shop) -> None:
    """``session.add()`` asks nobody: it may come while COMMIT is on its way, and belongs to the next one."""
    await shop.judge.execute(SLOW_COMMIT)
    added = asyncio.Event()

    @shop.app.post("/orders")
    async def place(session: SessionDep) -> StreamingResponse:
        async def late() -> None:
            await until(shop.judge, IN_COMMIT)
            session.add(Order(id=1, item="tea"))
            added.set()

        async def body() -> AsyncIterator[str]:
            await asyncio.wait_for(added.wait(), 5)
            yield "first"

        (await session.get_one(User, 1)).visits += 1
        others.append(asyncio.create_task(late()))
        return StreamingResponse(body())

    others: list[asyncio.Task[None]] = []
    reply = await call(shop.app, "/orders")
    await asyncio.gather(*others)
    assert (reply.starts, reply.is_complete, reply.error) == ([200], True, None)
    assert await shop.orders() == [1]


# Generator endpoints and server-sent events ---------------------------------------------------------------


@needs_new_fastapi("generator endpoints")
@pytest.mark.parametrize("kind", ["lines", "events", "chunks"])
async def test_a_generator_endpoint_is_committed_before_its_last_message(each_shop: Shop, kind: str) -> None:
    """All of its code runs after the start, or beside it: what it wrote is there when the client has it all."""
    _add_generator(each_shop, kind)
    seen: list[list[int]] = []

    async def look(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            seen.append(await each_shop.orders())

    reply = await call(each_shop.app, "/orders", on_message=look)
    assert (reply.starts, reply.is_complete, reply.error) == ([200], True, None)
    assert seen == [[1, 2]]


@needs_new_fastapi("generator endpoints")
@pytest.mark.parametrize("kind", ["lines", "events", "chunks"])
async def test_a_generator_endpoint_whose_commit_fails_is_a_broken_reply(each_shop: Shop, kind: str) -> None:
    begun = asyncio.Event()
    _add_generator(each_shop, kind, begun=begun, doomed=True)
    async with serve(each_shop.app) as url, httpx.AsyncClient(base_url=url) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            async with client.stream("POST", "/orders") as response:
                assert response.status_code == 200
                begun.set()
                await response.aread()
    assert (await each_shop.orders(), await each_shop.children()) == ([], 0)
    await each_shop.assert_clean()


@needs_new_fastapi("generator endpoints")
@pytest.mark.parametrize("kind", ["lines", "events", "chunks"])
async def test_a_client_that_hangs_up_on_a_generator_leaves_no_half_of_it(each_shop: Shop, kind: str) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()
    _add_generator(each_shop, kind, begun=begun, ended=ended)
    async with serve(each_shop.app) as url:
        async with httpx.AsyncClient(base_url=url) as client, client.stream("POST", "/orders") as response:
            assert response.status_code == 200
            begun.set()
            assert b"one" in await anext(response.aiter_raw())
        await asyncio.wait_for(ended.wait(), 5)
    assert await each_shop.orders() == []
    await each_shop.assert_clean()


@needs_new_fastapi("server-sent events")
async def test_events_written_before_the_start_are_committed_with_it(each_shop: Shop) -> None:
    """Documented: FastAPI runs the generator beside the start, so where the first transaction ends is a race.

    Whoever must not keep half of a feed gives each event a transaction of its own.
    """
    sse = importlib.import_module("fastapi.sse")

    async def let_the_generator_run() -> AsyncIterator[None]:
        yield
        await wrote.wait()

    wrote = asyncio.Event()

    @each_shop.app.post(
        "/orders",
        response_class=sse.EventSourceResponse,
        dependencies=[Depends(let_the_generator_run, scope="function")],
    )
    async def feed(session: SessionDep) -> AsyncIterator[dict[str, str]]:
        await write_order(session, 1)
        wrote.set()
        yield {"event": "one"}
        raise ZeroDivisionError("mine")

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.is_complete) == ([200], False)
    assert await each_shop.orders() == [1]


@needs_new_fastapi("server-sent events")
async def test_events_and_a_dependency_that_writes_share_one_session_and_no_moment(each_shop: Shop) -> None:
    """FastAPI runs the generator in a task of its own, at once: it meets the commit of what the dependency did."""
    await each_shop.judge.execute(SLOW_COMMIT)
    sse = importlib.import_module("fastapi.sse")

    @each_shop.app.post("/orders", response_class=sse.EventSourceResponse)
    async def feed(session: SessionDep, user: VisitorDep) -> AsyncIterator[dict[str, str]]:
        await asyncio.sleep(0.1)  # on purpose: long enough for COMMIT to have begun, which lasts 0.3 s
        await write_order(session, 1)
        yield {"event": "one"}
        await write_order(session, 2)

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.is_complete, reply.error) == ([200], True, None)
    assert await each_shop.orders() == [1, 2]
    assert await each_shop.judge.fetchval("SELECT visits FROM users") == 1


@needs_new_fastapi("server-sent events")
async def test_events_hold_no_connection_while_nothing_happens(shop: Shop) -> None:
    """Each event its own transaction: commit by hand, and the connection is back before the wait."""
    go_on = asyncio.Event()
    sse = importlib.import_module("fastapi.sse")

    @shop.app.post("/orders", response_class=sse.EventSourceResponse)
    async def feed(session: SessionDep) -> AsyncIterator[dict[str, str]]:
        async with session.begin():
            session.add(Order(id=1, item="tea"))
        yield {"event": "one"}
        await go_on.wait()

    async with (
        serve(shop.app) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", "/orders") as response,
    ):
        chunks = response.aiter_raw()
        assert b"one" in await anext(chunks)
        assert await shop.orders() == [1]
        assert (shop.db.stats().in_use, await shop.connections()) == (0, ["idle"])
        go_on.set()
        assert [chunk async for chunk in chunks] == []


# Files ----------------------------------------------------------------------------------------------------


@SPECS
async def test_a_file_leaves_after_the_commit(each_shop: Shop, tmp_path: Path, spec_version: str) -> None:
    receipt = tmp_path / "receipt.txt"
    receipt.write_bytes(b"x" * 200_000)
    seen: list[list[int]] = []

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> FileResponse:
        await write_order(session, 1)
        return FileResponse(receipt)

    async def look(_message: Any) -> None:
        seen.append(await each_shop.orders())

    reply = await call(each_shop.app, "/orders", spec_version=spec_version, on_message=look)
    assert (reply.starts, len(reply.body), reply.error) == ([200], 200_000, None)
    assert seen[0] == [1]


@SPECS
async def test_a_file_whose_commit_fails_does_not_leave(
    each_shop: Shop, tmp_path: Path, spec_version: str
) -> None:
    receipt = tmp_path / "receipt.txt"
    receipt.write_bytes(b"secret receipt")

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> FileResponse:
        await doom(session)
        return FileResponse(receipt)

    reply = await call(each_shop.app, "/orders", spec_version=spec_version)
    assert (reply.starts, reply.error) == ([409], None)
    assert b"receipt" not in reply.body


async def test_a_missing_file_stores_nothing(shop: Shop, tmp_path: Path) -> None:
    @shop.app.post("/orders")
    async def place(session: SessionDep) -> FileResponse:
        await write_order(session, 1)
        return FileResponse(tmp_path / "nowhere.txt")

    reply = await call(shop.app, "/orders")
    assert reply.starts == [500]
    assert await shop.orders() == []


# Exit stacks and dependencies that outlive the reply ------------------------------------------------------


async def test_a_yield_dependency_that_sees_the_dead_reply_does_not_answer_it(shop: Shop) -> None:
    """Its exit runs while the reply unwinds; ``except Exception`` there does not catch what unwinds it."""
    caught: list[str] = []

    async def watched() -> AsyncIterator[None]:
        async with AsyncExitStack():
            try:
                yield
            except Exception as error:
                caught.append(type(error).__name__)
                raise HTTPException(418) from error

    @shop.app.post("/orders")
    async def place(session: SessionDep, _watched: None = Depends(watched)) -> dict[str, bool]:
        await doom(session)
        return {"ok": True}

    reply = await call(shop.app, "/orders")
    assert (reply.starts, reply.error, caught) == ([409], None, [])


async def _insert_slowly(session: AsyncSession, number: int) -> None:
    await session.execute(
        text("INSERT INTO orders SELECT :number, 'tea' FROM (SELECT pg_sleep(0.2)) AS slow"),
        {"number": number},
    )


def _add_generator(
    shop: Shop,
    kind: str,
    *,
    begun: asyncio.Event | None = None,
    ended: asyncio.Event | None = None,
    doomed: bool = False,
) -> None:
    """``POST /orders`` writes once *begun* is set; with *ended* it goes on until the client has hung up."""
    sse = importlib.import_module("fastapi.sse")

    async def write(session: AsyncSession) -> AsyncIterator[str]:
        if begun is not None:
            await begun.wait()
        try:
            await write_order(session, 1)
            yield "one"
            if ended is not None:
                await asyncio.Event().wait()
            await write_order(session, 2)
            if doomed:
                await doom(session)
            yield "two"
        finally:
            if ended is not None:
                ended.set()

    match kind:
        case "lines":

            @shop.app.post("/orders")
            async def lines(session: SessionDep) -> AsyncIterator[dict[str, str]]:
                async for word in write(session):
                    yield {"word": word}

        case "events":

            @shop.app.post("/orders", response_class=sse.EventSourceResponse)
            async def events(session: SessionDep) -> AsyncIterator[dict[str, str]]:
                async for word in write(session):
                    yield {"word": word}

        case _:

            @shop.app.post("/orders", response_class=StreamingResponse)
            async def chunks(session: SessionDep) -> AsyncIterator[str]:
                async for word in write(session):
                    yield word
