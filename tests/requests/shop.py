"""A small shop: the tables and models the request tests write to, and the ways they talk to an app."""

from __future__ import annotations

import asyncio
import importlib.metadata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import ForeignKey, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from stanch import Database
from tests.support.judge import assert_nothing_left, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping

    from stanch.events import Event
    from tests.support.judge import FreshDatabase

    Message: TypeAlias = MutableMapping[str, Any]
    ASGIApp: TypeAlias = Callable[
        [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
    ]

SCHEMA = """
    CREATE TABLE users (id int PRIMARY KEY, name text NOT NULL, visits int NOT NULL DEFAULT 0);
    CREATE TABLE orders (
        id int PRIMARY KEY,
        item varchar(20) NOT NULL CHECK (item <> ''),
        user_id int REFERENCES users
    );
    CREATE TABLE p (id int PRIMARY KEY);
    CREATE TABLE child (id int PRIMARY KEY, p_id int REFERENCES p DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE audit (id int GENERATED ALWAYS AS IDENTITY, what text NOT NULL);
"""


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


IS_NEW_FASTAPI = _version("fastapi") >= (0, 165)
"""The newest of the releases that are tested; the oldest is 0.115."""


LEAVES_A_STREAM = () if IS_NEW_FASTAPI else (pytest.mark.abandons_connections,)
"""Marks: Starlette 0.38's BaseHTTPMiddleware leaves its stream unclosed when a BaseException passes through it."""


def needs_new_fastapi(what: str) -> pytest.MarkDecorator:
    """For a test of *what*, which the oldest FastAPI that is tested does not have; the report names it."""
    return pytest.mark.skipif(not IS_NEW_FASTAPI, reason=f"fastapi 0.115 has no {what}")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    visits: Mapped[int] = mapped_column(default=0)


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    item: Mapped[str]
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"), default=None)
    user: Mapped[User | None] = relationship()


async def write_order(session: AsyncSession, number: int) -> None:
    """An order that has reached the server and is not committed."""
    session.add(Order(id=number, item="tea"))
    await session.flush()


async def doom(session: AsyncSession) -> None:
    """Nothing fails until COMMIT, which then must: a deferred foreign key that refers to nothing."""
    await session.execute(text("INSERT INTO child VALUES (1, 404)"))


@dataclass
class Told:
    """An observer that remembers what it was told."""

    events: list[Event] = field(default_factory=list["Event"])

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    """A client without a socket; an error that leaves *app* is a 500, as a server makes it."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://shop")


class Shop:
    """An app, its database with the shop's tables, and the judge of what is stored."""

    def __init__(self, judge: FreshDatabase, *, driver: str = "asyncpg") -> None:
        self.judge = judge
        self.driver = driver
        self.app = FastAPI()
        self.told = Told()
        self.db = self.database()

    def database(self, **settings: Any) -> Database[AsyncSession]:
        """One more ``Database`` of the same shop."""
        chosen: dict[str, Any] = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 5.0} | settings
        database = Database(self.judge.url(self.driver), **chosen)
        database.observe(self.told)
        return database

    def client(self, app: ASGIApp | None = None) -> httpx.AsyncClient:
        return client_of(app or self.app)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.get(path, **options)

    async def post(self, path: str, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, **options)

    # The truth --------------------------------------------------------------------------------------------

    async def orders(self) -> list[int]:
        return [row["id"] for row in await self.judge.fetch("SELECT id FROM orders ORDER BY id")]

    async def audit(self) -> list[str]:
        return [row["what"] for row in await self.judge.fetch("SELECT what FROM audit ORDER BY id")]

    async def children(self) -> int:
        count: int = await self.judge.fetchval("SELECT count(*) FROM child")
        return count

    async def connections(self) -> list[str]:
        """The state of each connection that the server has, the judge's own left out."""
        return [str(row["state"]) for row in await self.judge.activity()]

    async def assert_disconnected(self) -> None:
        """The server has no connection left, or has none in a moment: it hears of a closed socket by itself."""
        await until(
            self.judge,
            "SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid())",
        )

    async def assert_clean(self) -> None:
        await assert_nothing_left(self.judge, self.db)


# Raw ASGI -------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """Every message an app sent, and what came out of it besides."""

    messages: list[Message]
    error: BaseException | None = None

    @property
    def starts(self) -> list[int]:
        """The status of every start that was sent; there must be exactly one."""
        return [message["status"] for message in self.messages if message["type"] == "http.response.start"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def is_complete(self) -> bool:
        return (
            bool(self.messages)
            and self.messages[-1]["type"] == "http.response.body"
            and not self.messages[-1].get("more_body", False)
        )


def comes_from(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether *error* is of *kind* or was raised because of one.

    Under the oldest Starlette an error after the start of a stream leaves its task group as a group.
    """
    if isinstance(error, BaseExceptionGroup):
        parts = cast("BaseExceptionGroup[BaseException]", error).exceptions
        return any(comes_from(part, kind) for part in parts)
    return error is not None and (isinstance(error, kind) or comes_from(error.__cause__, kind))


async def call(
    app: ASGIApp,
    path: str,
    *,
    method: str = "POST",
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    spec_version: str = "2.3",
    on_message: Callable[[Message], Awaitable[None]] | None = None,
) -> Reply:
    """One HTTP request without any client in between, which would hide a second start or a broken end.

    uvicorn announces *spec_version* 2.3, under which Starlette streams from a child task. As on a server,
    ``receive`` gives the body once and then waits for the client to hang up.
    """
    reply = Reply([])
    chunks = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if chunks:
            return chunks.pop()
        await asyncio.Event().wait()  # the client waits for its reply
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        reply.messages.append(message)
        if on_message is not None:
            await on_message(message)

    scope: Message = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
        "extensions": {},
    }
    try:
        async with asyncio.timeout(10):
            await app(scope, receive, send)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        reply.error = error
    return reply
