"""One page that shows what the databases of an app are doing now, for those who are let in."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import Response

from stanch.dashboard.access import Access, judged, refusal
from stanch.dashboard.feed import RETRY, Feed
from stanch.dashboard.history import History

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from starlette.types import Receive, Scope, Send

    from stanch.database import Database

__all__ = ["Access", "DashboardApp"]

VIEWERS: Final = 16
"""How many may watch the feed of one process at once; the page of one more asks for a snapshot now and then."""

_TURN: Final = 15.0
"""Seconds after which a feed ends: no server waits longer for an open page, and access is asked for again."""

_LOOK: Final = 0.2
"""Seconds between two looks whether there is a new sample, and whether the server is about to stop."""

_PATIENCE: Final = 5.0
"""Seconds in which a viewer must have taken what it is sent."""

_SCRIPT: Final = "text/javascript"
_PAGE: Final = {
    "": ("index.html", "text/html"),
    "style.css": ("style.css", "text/css"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"{name}.js": (f"{name}.js", _SCRIPT)
        for name in ("main", "chart", "feed", "format", "model", "parts")
    },
    "uplot.js": ("vendor/uplot/uPlot.iife.min.js", _SCRIPT),
    "uplot.css": ("vendor/uplot/uPlot.min.css", "text/css"),
}
"""All that can be asked for, and nothing else: the files of the page, and what they are."""

HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""What every reply says, refusals too: runs only its own files, is framed, stored, read by nobody else."""


class DashboardApp:
    """The ASGI app behind ``install(dashboard=)``: the page, its files, ``feed`` and ``snapshot``.

    Answers GET and HEAD alone, changes nothing, sets no cookie and takes no connection of a database. Each request is
    judged by *access*, and who is not let in gets a 403. None lets nobody in.
    """

    def __init__(self, databases: Sequence[Database[Any]], *, access: Access | None) -> None:
        judged(access)
        self._access: Access | None = access
        self._databases = databases
        self._history = History(databases)
        self._feed = Feed(databases, self._history)
        self.viewers = 0
        """How many are watching the feed now."""

    @asynccontextmanager
    async def lifespan(self) -> AsyncGenerator[None]:
        """Keep what the page will show, from now on. Without it that begins with the first visitor."""
        self._history.begin()
        try:
            yield
        finally:
            self._history.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        if scope["method"] not in {"GET", "HEAD"}:
            response = _text(405, "This is only for looking at.", allow="GET, HEAD")
        elif (why := await refusal(self._access, request)) is not None:
            response = _text(403, why)
        else:
            rest: str | None = scope.get("path_params", {}).get("rest")
            self._history.begin()
            if rest == "feed" and scope["method"] == "GET":
                await self._show(request, send)
                return
            response = self._answer(request, rest)
        if scope["method"] == "HEAD":
            response.body = b""
        await response(scope, receive, send)

    def _answer(self, request: Request, rest: str | None) -> Response:
        if rest is None:
            # What the page asks for is named relative to it, so that it works behind any prefix.
            here = request.url.path.rpartition("/")[2]
            return _text(307, "", location=f"{here}/")
        if rest == "snapshot":
            return Response(self._feed.document(), 200, HEADERS, "application/json")
        if rest == "feed":  # its head alone
            return Response(None, 200, HEADERS, "text/event-stream")
        if rest not in _PAGE:
            return _text(404, "The page has no such part.")
        file, kind = _PAGE[rest]
        content = files("stanch.dashboard").joinpath("page", *file.split("/")).read_bytes()
        return Response(content, 200, HEADERS, kind)

    # The feed -------------------------------------------------------------------------------------------

    async def _show(self, request: Request, send: Send) -> None:
        if self.viewers >= VIEWERS:
            full = _text(503, f"{VIEWERS} are watching already.", **{"retry-after": "5"})
            await full(request.scope, request.receive, send)
            return
        self.viewers += 1
        gone = asyncio.create_task(_until_gone(request), name="stanch dashboard viewer")
        try:
            # A client that has left, or takes nothing: there is nobody to tell.
            with suppress(OSError, TimeoutError):
                await self._tell(request, send, gone)
        finally:
            self.viewers -= 1
            gone.cancel()

    async def _tell(self, request: Request, send: Send, gone: asyncio.Task[None]) -> None:
        start = Response(None, 200, HEADERS | {"x-accel-buffering": "no"}, "text/event-stream")
        del start.headers["content-length"]
        await _sent(send, {"type": "http.response.start", "status": 200, "headers": start.raw_headers})
        position = self._feed.position(request.headers.get("last-event-id"))
        part: bytes = RETRY
        end = asyncio.get_running_loop().time() + _TURN
        told = 0
        while not gone.done():
            if self._history.latest != told:
                messages, position = self._feed.messages(position)
                told = position.sample
                await _sent(send, _body(part + messages, more=True))
                part = b""
            if self._history.is_over or _server_is_stopping() or asyncio.get_running_loop().time() > end:
                await _sent(send, _body(b"", more=False))
                return
            await asyncio.wait({gone}, timeout=_LOOK)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _sent(send: Send, message: dict[str, Any]) -> None:
    async with asyncio.timeout(_PATIENCE):
        await send(message)


def _body(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _server_is_stopping() -> bool:
    """Whether uvicorn has been told to stop. It waits for open replies first, for ever if not told otherwise.

    An app hears of it only afterwards, when its lifespan ends. But the one who gets the signal is uvicorn's ``Server``,
    whose ``should_exit`` says so. Other servers end a reply that takes too long, and at worst its turn is over soon.
    """
    handlers = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    return any(
        getattr(getattr(handler, "__self__", None), "should_exit", False) is True for handler in handlers
    )


def _text(status: int, text: str, **headers: str) -> Response:
    return Response(text and text + "\n", status, HEADERS | headers, "text/plain")
