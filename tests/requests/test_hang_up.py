"""A route may stop reading when its client hangs up; nothing that is written, or wanted otherwise, is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import BackgroundTasks, Form, Request, Response
from sqlalchemy import text
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from stanch.errors import ClientGone, ConfigError
from stanch.fastapi import DatabaseDep, ReaderDep, SessionDep, unit
from stanch.hangup import Reading
from tests.requests.shop import Shop, write_order
from tests.support.judge import until
from tests.support.uvicorn_server import serve

pytestmark = pytest.mark.anyio

SLEEP = text("SELECT pg_sleep(8)")
SLEEPING = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'SELECT pg_sleep%'"
    " AND state = 'active' AND pid <> pg_backend_pid()"
)


class Client:
    """One request over a socket, and a hang-up."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)

    async def send(self, method: str, path: str, body: bytes = b"") -> None:
        self.reader, self.writer = await asyncio.open_connection(self._url.hostname, self._url.port)
        head = f"{method} {path} HTTP/1.1\r\nhost: shop\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    async def hang_up(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


@asynccontextmanager
async def asleep(shop: Shop, path: str, *, clients: int) -> AsyncGenerator[list[Client]]:
    """So many clients whose requests are all asleep in the database."""
    async with serve(shop.app) as url:
        callers = [Client(url) for _ in range(clients)]
        for caller in callers:
            await caller.send("GET", path)
        await until(shop.judge, f"SELECT 1 FROM ({SLEEPING}) AS s HAVING count(*) = $1", clients)
        try:
            yield callers
        finally:
            # First the queries, then the clients: not a hang-up and the end of a backend at the same time.
            await shop.judge.fetch(SLEEPING.replace("SELECT pid", "SELECT pg_terminate_backend(pid)"))
            for caller in callers:
                await caller.hang_up()


async def within(seconds: float, condition: Any) -> float:
    """How long it took until *condition* was true; fails after *seconds*."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # the pool has no event for it
            await asyncio.sleep(0.005)
    return loop.time() - began


def watchers() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if "hang-up" in task.get_name()]


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "BaseHTTPMiddleware"])
async def test_five_clients_that_leave_free_their_connections_and_stop_their_queries(
    each_shop: Shop, wrapped: bool
) -> None:
    ends: list[BaseException] = []

    if wrapped:

        async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
            return await call_next(request)

        each_shop.app.add_middleware(BaseHTTPMiddleware, dispatch=passing)

    @each_shop.app.get("/report")
    @unit(cancel_on_disconnect=True)
    async def report(session: ReaderDep) -> None:
        try:
            await session.execute(SLEEP)
        except BaseException as error:
            ends.append(error)
            raise

    async with asleep(each_shop, "/report", clients=5) as callers:
        assert each_shop.db.stats().in_use == 5
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(caller.hang_up() for caller in callers))
        free = await within(0.5, lambda: each_shop.db.stats().in_use == 0)
        await until(each_shop.judge, f"SELECT 1 WHERE NOT EXISTS ({SLEEPING})", timeout=1.0)
        print(f"free after {free:.3f} s, gone after {asyncio.get_running_loop().time() - began:.3f} s")
        await within(1, lambda: not watchers())
    assert [type(error) for error in ends] == [ClientGone] * 5


async def test_without_the_option_the_query_runs_on(each_shop: Shop) -> None:
    """The bad subject: this is what the option is for."""

    @each_shop.app.get("/report")
    async def report(session: ReaderDep) -> None:
        await session.execute(SLEEP)

    async with asleep(each_shop, "/report", clients=2) as callers:
        await asyncio.gather(*(caller.hang_up() for caller in callers))
        with pytest.raises(TimeoutError):
            await within(1.0, lambda: each_shop.db.stats().in_use < 2)
        assert len(await each_shop.judge.fetch(SLEEPING)) == 2


async def test_a_client_that_leaves_while_it_waits_for_a_connection_waits_no_longer(shop: Shop) -> None:
    @shop.app.get("/report")
    @unit(cancel_on_disconnect=True)
    async def report(session: ReaderDep) -> None:
        await session.execute(SLEEP)

    async with asleep(shop, "/report", clients=5) as callers:
        sixth = Client(f"http://127.0.0.1:{callers[0].writer.get_extra_info('peername')[1]}")
        await sixth.send("GET", "/report")
        await within(2, lambda: shop.db.stats().waiting == 1)
        await sixth.hang_up()
        await within(0.5, lambda: shop.db.stats().waiting == 0)
        assert shop.db.stats().in_use == 5


async def test_a_write_goes_to_its_end_although_the_client_has_left(each_shop: Shop) -> None:
    inside, done = asyncio.Event(), asyncio.Event()

    @each_shop.app.get("/orders")
    @unit(cancel_on_disconnect=True)
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        inside.set()
        await session.execute(text("SELECT pg_sleep(0.5)"))
        await session.execute(text("SELECT 1"))
        done.set()

    async with serve(each_shop.app) as url, asyncio.timeout(10):
        client = Client(url)
        await client.send("GET", "/orders")
        await inside.wait()
        await client.hang_up()
        await done.wait()
        await until(each_shop.judge, "SELECT 1 FROM orders WHERE id = 1")


async def test_the_next_statement_of_a_client_that_is_gone_is_refused(shop: Shop) -> None:
    """Between two statements there is nothing to cancel."""
    inside, gone = asyncio.Event(), asyncio.Event()
    ends: list[type[BaseException]] = []

    @shop.app.get("/report")
    @unit(cancel_on_disconnect=True)
    async def report(request: Request, session: ReaderDep) -> None:
        await session.execute(text("SELECT 1"))
        inside.set()
        await gone.wait()
        await within(2, lambda: not watchers())
        for _ in range(2):  # also for those who catch it and go on
            try:
                await session.execute(text("SELECT 2"))
            except Exception as error:
                ends.append(type(error))

    async with serve(shop.app) as url, asyncio.timeout(10):
        client = Client(url)
        await client.send("GET", "/report")
        await inside.wait()
        await client.hang_up()
        gone.set()
        await within(2, lambda: len(ends) == 2)
    assert ends == [ClientGone, ClientGone]


async def test_the_endpoint_still_gets_its_body_and_background_tasks_run(each_shop: Shop) -> None:
    ran = asyncio.Event()

    @each_shop.app.post("/echo")
    @unit(cancel_on_disconnect=True)
    async def echo(request: Request, session: ReaderDep, later: BackgroundTasks, db: DatabaseDep) -> str:
        await session.execute(text("SELECT 1"))

        async def afterwards() -> None:
            await session.execute(text("SELECT 1"))
            ran.set()

        later.add_task(afterwards)
        return "".join([chunk.decode() async for chunk in request.stream()])

    async with serve(each_shop.app) as url, httpx.AsyncClient(base_url=url) as client, asyncio.timeout(10):
        body = "x" * 200_000
        assert (await client.post("/echo", content=body)).json() == body
        await ran.wait()
        assert watchers() == []


async def test_a_form_and_a_client_without_a_socket_are_served_too(shop: Shop) -> None:
    @shop.app.post("/form")
    @unit(cancel_on_disconnect=True)
    async def form(item: Annotated[str, Form()], session: SessionDep) -> str:
        await session.execute(text("INSERT INTO audit (what) VALUES (:what)"), {"what": item})
        return item

    assert (await shop.post("/form", data={"item": "tea"})).json() == "tea"
    assert await shop.audit() == ["tea"]
    assert watchers() == []


async def test_another_cancellation_at_the_same_time_wins() -> None:
    """As with asyncio.timeout: ours is taken back, theirs goes on, in whatever order they come."""
    for ours_first in (True, False):
        reading: list[Reading] = []
        entered = asyncio.Event()

        async def read() -> None:
            reading.append(Reading("GET /"))  # noqa: B023  # awaited in this turn
            with reading[0]:  # noqa: B023  # awaited in this turn
                entered.set()  # noqa: B023  # awaited in this turn
                await asyncio.Event().wait()

        task = asyncio.create_task(read())
        await entered.wait()
        for cancel in (reading[0].cancel, task.cancel)[:: 1 if ours_first else -1]:
            cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert task.cancelling() == 1


async def test_a_cancellation_of_ours_leaves_no_trace_in_the_task() -> None:
    async def read() -> int:
        reading = Reading("GET /")
        with pytest.raises(ClientGone), reading:
            asyncio.get_running_loop().call_soon(reading.cancel)
            await asyncio.Event().wait()
        async with asyncio.timeout(5):
            await asyncio.sleep(0)  # a timeout around later work counts right
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert await asyncio.create_task(read()) == 0


async def test_a_timeout_of_the_handlers_own_is_a_timeout_although_the_client_leaves(each_shop: Shop) -> None:
    ends: list[type[BaseException]] = []

    @each_shop.app.get("/report")
    @unit(cancel_on_disconnect=True)
    async def report(session: ReaderDep) -> None:
        try:
            async with asyncio.timeout(0.3):
                await session.execute(SLEEP)
        except TimeoutError:
            ends.append(TimeoutError)

    async with asleep(each_shop, "/report", clients=1):
        await within(2, lambda: bool(ends))
    assert ends == [TimeoutError]


def test_a_wrong_word_is_refused_where_it_is_written() -> None:
    with pytest.raises(ConfigError, match="cancel_on_disconnect 'yes'"):
        unit(cancel_on_disconnect="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
