"""Runs a subject on a real uvicorn in a process of its own, which dies with this one.

The processes are forked from one that has imported everything already: a start takes a tenth of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from tests.faults.wire import Wire
from tests.support.abandoned import TELLTALE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

    from tests.faults.subject import Subject
    from tests.faults.wire import Reply

ROOT: Final = Path(__file__).parents[2]
START_TIMEOUT: Final = 60.0
STOP_TIMEOUT: Final = 20.0

COMPLAINTS: Final = (
    TELLTALE,
    "was never retrieved",
    "Task was destroyed",
    "was never awaited",
    "non-checked-in",
)
"""What the garbage collector says, about connections and about tasks, when somebody left something behind."""

OF_ASYNCPG: Final = "unexpected connection_lost() call"
"""asyncpg asks for TLS first; a connect that is cancelled in just that moment leaves it a future of its own."""

_forks: Final = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["tests.faults.served", "tests.faults.subject", "stanch.drivers.asyncpg", "stanch.drivers.psycopg"]
)


@dataclass
class Served:
    """The app's process, as the test sees it: a port, a log, a pid."""

    process: ForkServerProcess
    port: int
    log_path: Path

    @property
    def log(self) -> str:
        """Everything the process has said so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def complaints(self) -> list[str]:
        """Lines of the log by which something was left to the garbage collector."""
        lines = [*self.log.splitlines(), ""]
        return [
            line
            for line, following in itertools.pairwise(lines)
            if any(word in line for word in COMPLAINTS) and OF_ASYNCPG not in following
        ]

    def wire(self) -> Wire:
        """A new connection of a client, opened on first use."""
        return Wire(self.port)

    async def request(self, method: str, path: str) -> Reply:
        """One request on a connection of its own: after an unhandled error the server closes the old one."""
        async with self.wire() as wire:
            return await wire.request(method, path)

    async def ask(self, method: str, path: str) -> Any:
        """As `request`, for looking inside; its JSON."""
        reply = await self.request(method, path)
        assert reply.status == 200, f"{method} {path} gave {reply.status}: {reply.body[:500]!r}"
        return json.loads(reply.body)

    async def stats(self) -> dict[str, int]:
        found: dict[str, int] = await self.ask("GET", "/_/stats")
        return found

    async def terminate(self) -> int | None:
        """SIGTERM, and wait for the end; the exit status, None if it does not end in time."""
        self.process.terminate()
        await asyncio.to_thread(self.process.join, STOP_TIMEOUT)
        return self.process.exitcode


@contextlib.asynccontextmanager
async def serving(subject: Subject, folder: Path) -> AsyncGenerator[Served]:
    """Serve *subject*; its log goes to a file in *folder*. Left, the process gets SIGTERM, then SIGKILL."""
    log_path = _new_log(folder)
    here, there = _forks.Pipe()
    process = _forks.Process(target=_serve, args=(subject, there, log_path))
    with here:
        process.start()
        there.close()
        try:
            heard = await asyncio.to_thread(here.poll, START_TIMEOUT)
            try:
                port = int(here.recv()) if heard else None
            except EOFError:
                port = None
            assert port is not None, (
                f"the server did not start:\n{log_path.read_text(errors='replace')[-4000:]}"
            )
            served = Served(process, port, log_path)
            yield served
        finally:
            process.terminate()
            await asyncio.to_thread(process.join, STOP_TIMEOUT)
            survived = process.exitcode is None
            if survived:
                process.kill()
                await asyncio.to_thread(process.join)
    assert not survived, f"the server survived SIGTERM for {STOP_TIMEOUT} s"


def _new_log(folder: Path) -> Path:
    return folder / f"uvicorn-{len(list(folder.iterdir()))}.log"


# In the process itself ------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn that says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, parent: Connection) -> None:
        super().__init__(config)
        self._parent = parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        self._parent.send(sockets[0].getsockname()[1])


def _serve(subject: Subject, parent: Connection, log_path: Path) -> None:
    with log_path.open("wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    config = uvicorn.Config(
        subject.build(), log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5
    )
    line = socket.create_server(("127.0.0.1", 0), backlog=512)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Server(config, parent).run(sockets=[line])


def _die_with(parent: Connection) -> None:
    """The parent never says anything: when there is something to read, it is the parent's end."""
    parent.poll(None)
    os._exit(1)
