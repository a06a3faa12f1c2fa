"""A small app, on stanch and as written by hand, served by uvicorn in a process of its own; and clients to load it.

The clients are here and not a tool's, because what is counted is when a reply came and what it was: a client of an open
loop comes when it comes, whether or not the others have been served, and leaves when its patience is over.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Generator  # noqa: TC003  # FastAPI evaluates annotations at run time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import uvicorn
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from stanch import Database
from stanch.fastapi import ReaderDep, SessionDep, install
from stanch.pool import Pool

if TYPE_CHECKING:
    import random
    from multiprocessing.connection import Connection

    from stanch.asgi import ASGIApp, Message, Receive, Scope, Send

Kind = Literal["stanch", "by hand on its pool", "by hand"]

READ: Final = text("SELECT 1")
START_TIMEOUT: Final = 60.0
TOLD_AFTER: Final = b"x-told-after"
"""The header of a refusal: seconds between the pool's decision and the reply."""


# The app ----------------------------------------------------------------------------------------------------


def by_hand(engine: AsyncEngine) -> FastAPI:
    """As in the article: a yield dependency, on the pool of *engine*."""
    app = FastAPI()
    factory = async_sessionmaker(engine, expire_on_commit=False)

    async def get_db() -> AsyncGenerator[AsyncSession]:
        async with factory() as session:
            yield session

    @app.get("/hold/{seconds}")
    async def endpoint(seconds: float, session: Annotated[AsyncSession, Depends(_never)]) -> dict[str, bool]:
        return await hold(session, seconds)

    @app.get("/read")
    async def reading(session: Annotated[AsyncSession, Depends(_never)]) -> dict[str, bool]:
        return await read(session)

    app.dependency_overrides[_never] = get_db
    return app


async def _never() -> AsyncSession:
    raise AssertionError("overridden")


def on_stanch(url: str, **settings: Any) -> FastAPI:
    """The same handlers on stanch."""
    app = FastAPI()
    install(app, Database(url, **settings))

    @app.get("/hold/{seconds}")
    async def endpoint(seconds: float, session: SessionDep) -> dict[str, bool]:
        return await hold(session, seconds)

    @app.get("/read")
    async def reading(session: ReaderDep) -> dict[str, bool]:
        return await read(session)

    return app


async def read(session: AsyncSession) -> dict[str, bool]:
    """One statement that takes no time."""
    await session.execute(READ)
    return {"done": True}


async def hold(session: AsyncSession, seconds: float) -> dict[str, bool]:
    """One statement, which keeps its connection for so long."""
    await session.execute(
        text("SELECT pg_sleep(:seconds)" if seconds else "SELECT 1"), {"seconds": seconds} if seconds else {}
    )
    return {"done": True}


_decided: Final[ContextVar[list[float]]] = ContextVar("when a refusal was decided")


class Stopwatch:
    """Tells in a header how long it took from the pool's decision to refuse until the reply leaves."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        decided: list[float] = []
        _decided.set(decided)

        async def timed(message: Message) -> None:
            if decided and message["type"] == "http.response.start":
                told_after = time.monotonic() - decided[0]
                message["headers"] = [*message["headers"], (TOLD_AFTER, f"{told_after:.6f}".encode())]
            await send(message)

        await self.app(scope, receive, timed)


def _watch_refusals() -> None:
    """Note when the pool decided to refuse; it is looked at, and not changed."""
    refuse = Pool._overloaded  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # as the docstring says

    def noted(self: Pool, ledger: Any, refusal: Any) -> Any:
        if (decided := _decided.get(None)) is not None:
            decided.append(refusal.at)
        return refuse(self, ledger, refusal)

    Pool._overloaded = noted  # type: ignore[method-assign]  # noqa: SLF001


# Its process ------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn that says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, parent: Connection) -> None:
        super().__init__(config)
        self._parent = parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        assert sockets
        self._parent.send(sockets[0].getsockname()[1])


def _app(kind: Kind, url: str, settings: dict[str, Any]) -> FastAPI:
    if kind == "stanch":
        return on_stanch(url, **settings)
    if kind == "by hand on its pool":
        return by_hand(Database(url, **settings).engine)
    return by_hand(create_async_engine(url, **settings))


def _serve(kind: Kind, url: str, settings: dict[str, Any], parent: Connection, *, timed: bool) -> None:
    def die_with_the_parent() -> None:
        parent.poll(None)  # the parent never says anything: when there is something to read, it is its end
        os._exit(1)

    threading.Thread(target=die_with_the_parent, daemon=True).start()
    _watch_refusals()
    logging.getLogger("stanch").setLevel(logging.CRITICAL)  # a line for each refusal is not what is measured
    app = _app(kind, url, settings)
    if timed:
        app.add_middleware(Stopwatch)
    config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    # asyncio leaves Nagle's algorithm on where a socket does not say that it is TCP: each reply would take 40 ms more.
    line = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    line.bind(("127.0.0.1", 0))
    line.listen(1024)
    _Server(config, parent).run(sockets=[line])


@contextmanager
def serving(kind: Kind, url: str, *, timed: bool = False, **settings: Any) -> Generator[int]:
    """Serve the app; gives its port. *timed*: refusals tell how long ago they were decided."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(kind, url, settings, there), kwargs={"timed": timed}
    )
    process.start()
    there.close()
    try:
        if not here.poll(START_TIMEOUT):
            raise TimeoutError("the server did not start")
        yield here.recv()
    finally:
        process.kill()  # with by hand's requests still waiting it would take half a minute to end by itself
        process.join()
        here.close()


# Clients ----------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What came back: *status* 0 if nothing did in time."""

    status: int
    took: float
    told_after: float | None = None


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def get(self, path: str, *, timeout: float) -> Answer:
        """One request; after *timeout* seconds the client has gone."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(timeout):
                head = await self._ask(path)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            self.close()
            return Answer(0, time.perf_counter() - began)
        told = [line for line in head if line.startswith(TOLD_AFTER + b":")]
        told_after = float(told[0].partition(b":")[2]) if told else None
        return Answer(int(head[0].split()[1]), time.perf_counter() - began, told_after)

    def close(self) -> None:
        """Hang up."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _ask(self, path: str) -> list[bytes]:
        if self._reader is None or self._writer is None or self._reader.at_eof():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(f"GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n".encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        length = next(
            int(line.partition(b":")[2]) for line in head if line.lower().startswith(b"content-length:")
        )
        await self._reader.readexactly(length)
        return head


async def closed_loop(
    port: int, path: str, *, clients: int, seconds: float, patience: float = 30.0
) -> list[Answer]:
    """Each of so many *clients* asks again as soon as it is answered."""
    answers: list[Answer] = []
    over = time.perf_counter() + seconds

    async def one() -> None:
        client = Client(port)
        while time.perf_counter() < over:
            answers.append(await client.get(path, timeout=patience))
        client.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
    return answers


async def open_loop(
    port: int, path: str, *, rate: float, seconds: float, patience: float, chance: random.Random
) -> list[Answer]:
    """So many clients a second, at moments of chance, whoever is still waiting; each leaves after its *patience*."""
    answers: list[Answer] = []
    idle: list[Client] = []
    asking: set[asyncio.Task[None]] = set()

    async def one() -> None:
        client = idle.pop() if idle else Client(port)
        answers.append(await client.get(path, timeout=patience))
        idle.append(client)

    began = time.perf_counter()
    arrival = 0.0
    while (arrival := arrival + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(began + arrival - time.perf_counter())
        task = asyncio.create_task(one())
        asking.add(task)
        task.add_done_callback(asking.discard)
    while asking:
        await asyncio.wait(asking)
    for client in idle:
        client.close()
    return answers


def share(values: list[float], part: float) -> float:
    """The value that *part* of all *values* do not exceed.

    >>> share([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, round(len(ordered) * part) - 1)] if ordered else 0.0
