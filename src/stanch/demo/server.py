"""One shop in a process of its own: what runs there, and the handle on it from the process that started it.

The child is told where its database is on its standard input, the password too, and ends when that input ends:
so it cannot outlive its parent, however that died. It is in a session of its own, so that Ctrl-C reaches the
parent only, which then takes it down in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Self

import httpx
import uvicorn
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from stanch import Database
from stanch.demo import culprits, handwritten, probes, shop
from stanch.demo.shop import PAGE
from stanch.demo.trouble import DemoFailed

if TYPE_CHECKING:
    from pathlib import Path

    from fastapi import FastAPI

POOL_SIZE: Final = 5
HOST: Final = "127.0.0.1"
START_TIMEOUT: Final = 60.0
LEAK_AFTER: Final = 3.0
"""Seconds; the default is ten times as much, and a demo would be over by then."""

STOP_TIMEOUT: Final = 8.0
GRACE: Final = 3
"""Seconds that requests still running get when the server is told to stop."""


class Layer(StrEnum):
    """Which session layer a shop stands on; the value is the name of its database as well."""

    STANCH = "stanch"
    HANDWRITTEN = "handwritten"

    @property
    def label(self) -> str:
        """The name for people."""
        return {Layer.STANCH: "stanch", Layer.HANDWRITTEN: "hand-written"}[self]


# The parent's side ----------------------------------------------------------------------------------------


class ShopServer:
    """A shop that is served on a free loopback port, as its starter sees it.

    ``async with`` starts the process and makes sure that it is gone at the end; ``open`` makes it serve.
    """

    def __init__(self, layer: Layer, log: Path) -> None:
        self.layer = layer
        self.url = ""
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def page(self) -> str:
        """The address at which the shop on stanch shows what its connections do."""
        return self.url + PAGE

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._spawn)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self._process is not None:
            # a second cancellation ends this wait, not the funeral: the loop waits for its threads
            await asyncio.shield(asyncio.to_thread(_bury, self._process))

    async def open(self, database_url: str) -> None:
        """Have it create its tables and serve; returns when it answers. Raises ``DemoFailed``."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: check() tells
            self._process.stdin.write(database_url.encode() + b"\n")
            self._process.stdin.flush()
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=START_TIMEOUT) as client:
            asking = asyncio.create_task(client.get("/openapi.json"))
            try:
                while not (await asyncio.wait({asking}, timeout=0.1))[0]:
                    self.check()
                asking.result().raise_for_status()
            except httpx.HTTPError as error:
                self.check()
                raise DemoFailed(
                    f"the {self.layer.label} shop does not answer ({type(error).__name__}); its log: {self.log}"
                ) from None
            finally:
                asking.cancel()

    def check(self) -> None:
        """Raise ``DemoFailed`` if the process has ended."""
        if self._process is not None and (status := self._process.poll()) is not None:
            raise DemoFailed(f"the {self.layer.label} shop ended with status {status}; its log: {self.log}")

    def _spawn(self) -> None:
        with socket.create_server((HOST, 0), backlog=256) as line, self.log.open("ab") as log:
            self.url = f"http://{HOST}:{line.getsockname()[1]}"
            self._process = subprocess.Popen(  # noqa: S603  # our own module
                [sys.executable, "-m", "stanch.demo.server", self.layer, str(line.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[line.fileno()],
                env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
                start_new_session=True,
            )


def _bury(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has ended already
        process.stdin.close()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# The child's side -----------------------------------------------------------------------------------------


async def _furnish(url: str) -> None:
    async with Database(url, poolclass=NullPool) as db:
        async with db.begin() as connection:
            await connection.run_sync(shop.Base.metadata.create_all)
        async with db.transaction() as session:
            await shop.furnish(session)


def make_app(layer: Layer, url: str) -> FastAPI:
    """The shop on *layer*, with the probes. The pools are of the same size."""
    if layer is Layer.STANCH:
        db = Database(url, pool_size=POOL_SIZE, max_overflow=0, leak_after=LEAK_AFTER)
        app = shop.make_app(db)
        app.include_router(probes.make_router(lambda: asdict(db.stats())))
    else:
        engine = create_async_engine(url, pool_size=POOL_SIZE, max_overflow=0, pool_pre_ping=True)
        app = handwritten.make_app(engine)
        app.include_router(probes.make_router(dict))
    app.include_router(culprits.router)
    return app


def main(layer: Layer, line_number: int) -> None:
    """Read the URL of the database, then serve until the standard input ends."""
    if not (url := sys.stdin.readline().strip()):
        return  # the parent has changed its mind
    asyncio.run(_furnish(url))
    config = uvicorn.Config(
        make_app(layer, url),
        lifespan="on",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
    )
    server = uvicorn.Server(config)
    ended = threading.Event()

    def watch() -> None:
        sys.stdin.read()  # returns when the parent closes it, and when the parent dies
        server.should_exit = True
        if not ended.wait(STOP_TIMEOUT - 1):
            os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
    with socket.socket(fileno=line_number) as line:
        server.run(sockets=[line])
    ended.set()


if __name__ == "__main__":
    main(Layer(sys.argv[1]), int(sys.argv[2]))
