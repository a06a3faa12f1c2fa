"""Websockets: nothing is committed but by hand, and nothing is held while the handler waits for its peer."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import WebSocket, WebSocketDisconnect
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from stanch.fastapi import ReaderDep, SessionDep, install
from tests.requests.shop import Order, Shop, User, doom, write_order
from tests.support.judge import OTHERS, FreshDatabase, until
from tests.support.uvicorn_server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def dialled(shop: Shop, path: str = "/ws") -> AsyncGenerator[ClientConnection]:
    """A real socket to *path* of the shop, on a real server."""
    async with serve(shop.app) as url, connect(_ws(url, path), open_timeout=5) as socket:
        yield socket


def _ws(url: str, path: str) -> str:
    return url.replace("http", "ws", 1) + path


async def close_code(socket: ClientConnection) -> int | None:
    """The code the server closes with, once it does."""
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(5):
            while True:
                await socket.recv()
    return socket.close_code


async def test_each_message_commits_by_hand_and_is_stored_at_once(each_shop: Shop) -> None:
    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        async for number in socket.iter_text():
            async with session.begin():
                session.add(Order(id=int(number), item="tea"))
            await socket.send_text("stored")

    async with dialled(each_shop) as socket:
        for number in (1, 2):
            await socket.send(str(number))
            assert await socket.recv() == "stored"
            assert await each_shop.orders() == list(range(1, number + 1))


async def test_a_socket_that_waits_for_its_peer_holds_nothing(each_shop: Shop) -> None:
    """Read from the server: not idle in transaction, and the pool has everything back."""
    await each_shop.judge.execute("INSERT INTO orders VALUES (1, 'tea')")

    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: ReaderDep) -> None:
        await socket.accept()
        async for number in socket.iter_text():
            order = await session.get_one(Order, int(number))
            await socket.send_text(order.item)

    async with dialled(each_shop) as socket:
        await socket.send("1")
        assert await socket.recv() == "tea"
        await each_shop.assert_clean()  # it is on its way back into receive()
        assert (each_shop.db.stats().in_use, await each_shop.connections()) == (0, ["idle"])
        await socket.send("1")
        assert await socket.recv() == "tea"


async def test_a_socket_that_waits_after_session_begin_holds_nothing_either(each_shop: Shop) -> None:
    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            async with session.begin():
                await session.execute(text("SELECT 1"))
            await socket.send_text("read")

    async with dialled(each_shop) as socket:
        await socket.send("go")
        assert await socket.recv() == "read"
        assert (each_shop.db.stats().in_use, await each_shop.connections()) == (0, ["idle"])


@pytest.mark.parametrize("flushed", [False, True])
async def test_unsaved_writes_at_receive_close_the_socket_and_are_named(
    each_shop: Shop, flushed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        async for number in socket.iter_text():
            session.add(Order(id=int(number), item="tea"))
            if flushed:
                await session.flush()

    async with dialled(each_shop) as socket:
        await socket.send("1")
        assert await close_code(socket) == 1011
    assert await each_shop.orders() == []
    assert "WEBSOCKET /ws waits for its peer with uncommitted writes (Order)" in caplog.text


async def test_closing_the_socket_commits_nothing(each_shop: Shop) -> None:
    """No message means commit; not the handler's return, not its close(1008) after an error."""

    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        await write_order(session, 1)
        await socket.send_text("written, not committed")
        await socket.close(1008)

    async with dialled(each_shop) as socket:
        assert await socket.recv() == "written, not committed"
        assert await close_code(socket) == 1008
    assert await each_shop.orders() == []
    assert [str(event) for event in each_shop.told.events] == [
        "WEBSOCKET /ws ended with uncommitted writes (Order); they were rolled back"
    ]


async def test_an_error_in_the_handler_commits_nothing(each_shop: Shop) -> None:
    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        await write_order(session, 1)
        raise ZeroDivisionError("mine")

    async with dialled(each_shop) as socket:
        await socket.wait_closed()
    assert await each_shop.orders() == []


async def test_the_broadcast_of_another_socket_commits_nothing_of_mine(each_shop: Shop) -> None:
    """Its message passes through my send in the middle of my pair of writes."""
    members: list[WebSocket] = []
    half_done, broadcast = asyncio.Event(), asyncio.Event()

    @each_shop.app.websocket("/member")
    async def member(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        members.append(socket)
        await socket.receive_text()
        await write_order(session, 1)
        half_done.set()
        await broadcast.wait()
        raise ZeroDivisionError("mine, before the second half")

    @each_shop.app.websocket("/herald")
    async def herald(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        await half_done.wait()
        async with session.begin():
            session.add(Order(id=3, item="tea"))
        for one in members:
            await one.send_text("news")
        broadcast.set()

    async with serve(each_shop.app) as url:
        base = url.replace("http", "ws", 1)
        async with connect(f"{base}/member") as mine, connect(f"{base}/herald") as other:
            await mine.send("go")
            assert await mine.recv() == "news"
            await mine.wait_closed()
            await other.wait_closed()
    assert await each_shop.orders() == [3]


async def test_a_commit_that_fails_closes_1011_and_is_logged(
    each_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        await write_order(session, 1)
        await doom(session)
        await session.commit()

    async with dialled(each_shop) as socket:
        assert await close_code(socket) == 1011
    assert (await each_shop.orders(), await each_shop.children()) == ([], 0)
    assert "WEBSOCKET /ws" in caplog.text
    assert "conflict" in caplog.text


async def test_a_swallowed_database_error_cannot_be_committed(each_shop: Shop) -> None:
    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        await write_order(session, 1)
        with suppress(SQLAlchemyError):
            await session.execute(text("SELECT 1 / 0"))
        await session.commit()
        await socket.send_text("stored")

    async with dialled(each_shop) as socket:
        assert await close_code(socket) == 1011
    assert await each_shop.orders() == []


@pytest.mark.parametrize("closed_by", ["handler", "client"])
async def test_a_database_error_after_the_socket_was_closed_still_reaches_the_log(
    each_shop: Shop, closed_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended = asyncio.Event()

    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        try:
            if closed_by == "handler":
                await socket.close(1000)
            else:
                with suppress(WebSocketDisconnect):
                    await socket.receive_text()
            await session.execute(text("SELECT 1 / 0"))
        finally:
            ended.set()

    async with dialled(each_shop) as socket:
        if closed_by == "client":
            await socket.close()
        await asyncio.wait_for(ended.wait(), 5)
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert len(logged) == 1
    assert isinstance(logged[0], DBAPIError)


async def test_a_commit_error_of_the_network_does_not_vanish_as_a_disconnect(
    each_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette takes any OSError for the peer's hang-up. Ours are none, so the client and the log get to know."""
    outcomes: list[str] = []

    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        await write_order(session, 1)
        await _kill(each_shop.judge)
        try:
            await session.commit()
        except (OSError, TimeoutError, WebSocketDisconnect):
            outcomes.append("vanished")
            raise
        except SQLAlchemyError as error:
            outcomes.append(type(error).__name__)
            raise

    async with dialled(each_shop) as socket:
        assert await close_code(socket) == 1011
    assert outcomes
    assert "vanished" not in outcomes
    assert await each_shop.orders() == []
    assert "WEBSOCKET /ws" in caplog.text


async def test_a_database_error_before_the_handshake_refuses_it(each_shop: Shop) -> None:
    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await session.execute(text("SELECT 1 / 0"))
        await socket.accept()

    with pytest.raises(InvalidStatus) as refused:
        async with dialled(each_shop):
            pass
    assert refused.value.response.status_code >= 400


async def test_a_client_that_hangs_up_in_the_middle_of_a_statement_leaves_nothing(each_shop: Shop) -> None:
    ended = asyncio.Event()

    @each_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        try:
            await write_order(session, 1)
            await socket.send_text("written")
            await session.execute(text("SELECT pg_sleep(0.2)"))
            await socket.receive_text()
        finally:
            ended.set()

    async with dialled(each_shop) as socket:
        assert await socket.recv() == "written"
        socket.transport.abort()
        await asyncio.wait_for(ended.wait(), 5)
    assert await each_shop.orders() == []


async def test_a_socket_sees_what_others_have_committed_once_it_asks_anew(each_shop: Shop) -> None:
    """Documented: with ``expire_on_commit=False`` a loaded object stays as it was read until it is refreshed."""
    await each_shop.judge.execute("INSERT INTO users VALUES (1, 'ada', 1)")

    @each_shop.app.websocket("/ws")
    async def visits(socket: WebSocket, session: ReaderDep) -> None:
        await socket.accept()
        user = await session.get_one(User, 1)
        async for word in socket.iter_text():
            if word == "refresh":
                await session.refresh(user)
            await socket.send_text(str(user.visits))

    async with dialled(each_shop) as socket:
        await socket.send("read")
        assert await socket.recv() == "1"
        await each_shop.judge.execute("UPDATE users SET visits = 2")
        await socket.send("read")
        assert await socket.recv() == "1"
        await socket.send("refresh")
        assert await socket.recv() == "2"


async def test_fifty_idle_sockets_leave_a_pool_of_five_to_the_requests(each_shop: Shop) -> None:
    @each_shop.app.websocket("/ws")
    async def idle(socket: WebSocket, session: ReaderDep) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            await session.execute(text("SELECT 1"))
            await socket.send_text("read")

    async with serve(each_shop.app) as url:
        sockets = [await connect(f"{url.replace('http', 'ws', 1)}/ws") for _ in range(50)]
        try:
            for socket in sockets:
                await socket.send("go")
            assert {await socket.recv() for socket in sockets} == {"read"}
            await each_shop.assert_clean()
            async with each_shop.db.transaction() as session:
                await write_order(session, 1)
        finally:
            for socket in sockets:
                await socket.close()
    assert await each_shop.orders() == [1]


async def test_writes_left_at_the_end_of_a_socket_can_be_refused(
    bare_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    install(bare_shop.app, bare_shop.db, unsaved="raise")

    @bare_shop.app.websocket("/ws")
    async def orders(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        await write_order(session, 1)

    async with dialled(bare_shop) as socket:
        assert await close_code(socket) != 1000
    assert "UnsavedWrites: WEBSOCKET /ws succeeded with uncommitted writes (Order)" in caplog.text
    assert await bare_shop.orders() == []


async def _kill(judge: FreshDatabase) -> None:
    killed: Any = await judge.fetchval(f"SELECT count(pg_terminate_backend(pid)) FROM {OTHERS}")
    assert killed == 1
    await until(judge, f"SELECT 1 WHERE NOT EXISTS (SELECT FROM {OTHERS})")
