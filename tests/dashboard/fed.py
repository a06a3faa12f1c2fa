"""A database whose numbers a test says, and an app that shows it; where the page is the subject, not the pool."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import httpx
from starlette.applications import Starlette
from starlette.routing import Route

from stanch.dashboard import Access, DashboardApp
from stanch.ledger import Stats
from stanch.measuring import Holding, Measuring

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from stanch import Database

PATH = "/_stanch"


class Fed:
    """Stands where a ``Database`` stands, and shows what the test has said."""

    def __init__(self, name: str = "main") -> None:
        self.name = name
        self.in_use, self.idle, self.waiting = 0, 0, 0
        self.holding: list[Holding] = []
        self.measuring = Measuring(name, stats=self.stats, holders=lambda: self.holding)

    def stats(self) -> Stats:
        return Stats(pool_size=5, max_overflow=2, in_use=self.in_use, idle=self.idle, waiting=self.waiting)

    def measure(self) -> Measuring:
        return self.measuring


def page_of(*databases: Fed, access: Access | None = "loopback") -> DashboardApp:
    return DashboardApp(cast("list[Database[Any]]", list(databases)), access=access)


def app_of(page: DashboardApp) -> Starlette:
    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        async with page.lifespan():
            yield

    return Starlette(routes=[Route(PATH, page), Route(PATH + "/{rest:path}", page)], lifespan=lifespan)


def visitor(app: Any, *, host: str = "localhost", client: str = "127.0.0.1") -> httpx.AsyncClient:
    """Somebody who asks without a socket, from the address *client* for the name *host*."""
    transport = httpx.ASGITransport(app, client=(client, 50000))
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}")


@dataclass(frozen=True)
class Told:
    """One message of a feed."""

    id: str
    event: str
    data: Any


async def told(client: httpx.AsyncClient, *, last: str | None = None) -> AsyncIterator[Told]:
    """The messages of one turn of the feed, as ``EventSource`` reads them."""
    headers = {} if last is None else {"last-event-id": last}
    async with client.stream("GET", f"{PATH}/feed", headers=headers, timeout=20) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        fields: dict[str, str] = {}
        async for line in reply.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                assert name not in fields, f"{name} twice in one message"
                fields[name] = value
            else:
                if "data" in fields:
                    yield Told(fields["id"], fields["event"], json.loads(fields["data"]))
                fields = {}


async def first_of(client: httpx.AsyncClient, *, last: str | None = None) -> list[Told]:
    """All up to the first snapshot, and that."""
    messages: list[Told] = []
    feed = told(client, last=last)
    try:
        async with asyncio.timeout(10):
            async for message in feed:
                messages.append(message)
                if message.event == "snapshot":
                    return messages
    finally:
        await feed.aclose()  # type: ignore[attr-defined]  # an async generator
    raise AssertionError("the feed ended before its first snapshot")
