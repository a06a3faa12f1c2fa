"""Calls an endpoint that has no session, a number of times, with stanch installed or not; for counting instructions.

python -m tests.faults.drive_endpoint bare|installed asgi|h11|httptools

Under valgrind only. One kind and one way in each process: Python specialises a line of code for what passes there.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any, Final

from fastapi import FastAPI
from uvicorn import Config
from uvicorn.server import ServerState

from stanch import Database
from stanch.fastapi import install

KINDS: Final = ("bare", "installed")
PROTOCOLS: Final = {
    "h11": "uvicorn.protocols.http.h11_impl:H11Protocol",
    "httptools": "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol",
}
SERVERS: Final = tuple(protocol for protocol in PROTOCOLS if find_spec(protocol))
"""The ways to serve HTTP that are installed; h11 comes with uvicorn."""
ASGI: Final = "asgi"
"""The way without a server: messages as uvicorn gives and takes them."""

WARMING: Final = 200
FEW, MANY = 50, 550
"""The difference of the two is what the calls cost, without what surrounds them."""

CLIENT, SERVER = ("127.0.0.1", 50000), ("127.0.0.1", 80)
SCOPE: Final = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": "GET",
    "scheme": "http",
    "path": "/items/7",
    "raw_path": b"/items/7",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"test"), (b"accept", b"application/json")],
    "client": CLIENT,
    "server": SERVER,
}
"""The keys that uvicorn gives, but for ``state``, which is made anew for each call."""

REQUEST: Final = b"GET /items/7 HTTP/1.1\r\nhost: test\r\naccept: application/json\r\n\r\n"
"""The same, as it comes over the wire."""
REPLY_BODY: Final = b'{"number":7}'

Calls = Callable[[int], Awaitable[None]]
"""Makes a number of calls, one after the other; each must succeed."""


def build(kind: str) -> FastAPI:
    app = FastAPI()
    if kind == "installed":
        install(app, Database("postgresql+asyncpg://app@127.0.0.1/shop"))

    @app.get("/items/{number}")
    async def item(number: int) -> dict[str, int]:
        return {"number": number}

    return app


def raw(app: FastAPI) -> Calls:
    """Call *app* as a server would."""
    replies = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal replies
        replies += message["type"] == "http.response.start" and message["status"] == 200

    async def calls(number: int) -> None:
        before = replies
        for _ in range(number):
            await app({**SCOPE, "state": {}}, receive, send)
        assert replies - before == number

    return calls


class Wire(asyncio.Transport):
    """One kept-alive connection of a client, without a socket: the event loop, and HTTP, but no system calls."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": CLIENT, "sockname": SERVER})
        self._protocol = protocol
        self._reply = b""
        self._replied: asyncio.Future[None] | None = None
        protocol.connection_made(self)

    async def request(self) -> None:
        self._reply = b""
        self._replied = asyncio.get_running_loop().create_future()
        self._protocol.data_received(REQUEST)
        await self._replied
        assert self._reply.startswith(b"HTTP/1.1 200 "), self._reply

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._reply += data
        if data == REPLY_BODY and self._replied is not None:
            self._replied.set_result(None)

    def close(self) -> None:
        raise AssertionError(f"the server hung up: {self._reply!r}")

    def is_closing(self) -> bool:
        return False


def served(app: FastAPI, by: str) -> Calls:
    """Let uvicorn serve *app*, as it does by default but without a log of requests, which would dilute."""
    config = Config(app, http=PROTOCOLS[by], lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"Sun, 22 Nov 2026 12:00:00 GMT"), *config.encoded_headers]
    module, _, name = PROTOCOLS[by].partition(":")
    protocol = getattr(importlib.import_module(module), name)

    async def calls(number: int) -> None:
        before = state.total_requests
        wire = Wire(protocol(config=config, server_state=state, app_state={}))
        for _ in range(number):
            await wire.request()
        assert state.total_requests - before == number

    return calls


def tell_valgrind(*words: str) -> None:
    """Say something to the valgrind that runs this process."""
    subprocess.run(["vgdb", f"--pid={os.getpid()}", *words], check=True, capture_output=True, timeout=300)


def main(kind: str, way: str) -> None:
    app = build(kind)
    calls = raw(app) if way == ASGI else served(app, way)

    async def drive(number: int) -> None:
        await calls(number)

    tell_valgrind("instrumentation", "on")
    asyncio.run(drive(WARMING))
    gc.collect()
    gc.freeze()  # what was imported is no garbage of a call
    for number in (FEW, MANY):
        gc.collect()
        tell_valgrind("zero")
        asyncio.run(drive(number))
        tell_valgrind("dump", f"{kind}-{way}-{number}")


if __name__ == "__main__":
    main(*sys.argv[1:])
