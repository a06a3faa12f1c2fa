"""A real uvicorn in the test's own loop, on a free loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

GRACE = 5
"""Seconds that requests still running get when the server is left."""


class StartupFailed(Exception):
    """The app's lifespan did not start; the cause is what it raised, if it raised anything."""


class _Server(uvicorn.Server):
    """uvicorn without signal handlers, without ``sys.exit``, and with an event for "now it serves"."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serves = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            raise StartupFailed("the app did not start, see the log of uvicorn.error") from None
        self.serves.set()


@contextlib.asynccontextmanager
async def serve(app: Callable[..., Any], **options: Any) -> AsyncGenerator[str]:
    """Serve the ASGI *app* with its lifespan; gives the base URL, such as ``http://127.0.0.1:40123``.

    *options* are uvicorn's. When left: no new requests, those that run get five seconds, then they are
    cancelled, then the lifespan ends. Raises StartupFailed.
    """
    raised: list[BaseException] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except BaseException as error:
            if scope["type"] == "lifespan":
                raised.append(error)
            raise

    defaults: dict[str, Any] = {
        "log_config": None,
        "lifespan": "on",
        "ws": "websockets-sansio",
        "timeout_graceful_shutdown": GRACE,
    }
    line = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = _Server(uvicorn.Config(watched, **(defaults | options)))
    serving = asyncio.create_task(server.serve(sockets=[line]), name="uvicorn")
    ready = asyncio.create_task(server.serves.wait())
    try:
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            try:
                serving.result()
            except StartupFailed as failure:
                raise failure from next(iter(raised), None)
        yield f"http://127.0.0.1:{line.getsockname()[1]}"
    finally:
        ready.cancel()
        server.should_exit = True
        with contextlib.suppress(StartupFailed):
            await _finish(serving)
        line.close()


async def _finish(task: asyncio.Task[None]) -> None:
    """Wait for *task*, also while the one who waits is being cancelled, and let the cancel out afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()
