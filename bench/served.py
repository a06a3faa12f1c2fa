"""A subject, served by uvicorn in processes of its own, as it would be in production.

    with serving_subject(SUBJECTS["stanch"], Setting(url)) as served:
        asyncio.run(closed_loop(served.port, ...))
        served.cpu()

uvicorn takes uvloop and httptools where they are installed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from bench.children import Child, answer
from bench.subjects import SUBJECTS, Setting, Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from multiprocessing.connection import Connection

    from fastapi import FastAPI

BACKLOG: Final = 2048
"""Connections that wait to be accepted: more than any case has clients."""


class Served:
    """A subject that is being served."""

    def __init__(self, name: str, port: int, processes: list[Child]) -> None:
        self.name = name
        self.port = port
        self._processes = processes

    @property
    def pids(self) -> list[int]:
        """Its processes, one for each worker."""
        return [process.pid for process in self._processes]

    def cpu(self) -> float:
        """Seconds of processor time, user's and system's, that its processes have taken since they started."""
        return float(sum(process.ask("cpu") for process in self._processes))


@contextmanager
def serving_subject(
    subject: Subject, setting: Setting, *, workers: int = 1, prepared: Callable[[FastAPI], None] | None = None
) -> Generator[Served]:
    """Serve one *subject* until the block is left.

    *workers* processes share one listening socket, as uvicorn's do. *prepared* is called with the app in each of them
    before it is served: a function of a module, which may add routes and middleware. Raised: ``ChildFailed``.
    """
    with serving([subject], setting, workers=workers, prepared=prepared) as served:
        yield served[subject.name]


@contextmanager
def serving(
    subjects: Iterable[Subject],
    setting: Setting,
    *,
    workers: int = 1,
    prepared: Callable[[FastAPI], None] | None = None,
) -> Generator[dict[str, Served]]:
    """All *subjects*, each in processes of its own, started side by side; by their names."""
    with ExitStack() as stack:
        served: dict[str, Served] = {}
        started: list[Child] = []
        for subject in subjects:
            with _listening() as line:  # closed here: it is open in the children, and ends with them
                processes: list[Child] = []
                for _ in range(workers):
                    child = Child(
                        f"the server of {subject.name}", _serve, subject.name, setting, prepared, line
                    )
                    stack.callback(child.end)
                    processes.append(child)
                started += processes
                served[subject.name] = Served(subject.name, line.getsockname()[1], processes)
        for child in started:
            child.ready()
        yield served


def _listening() -> socket.socket:
    # asyncio leaves Nagle's algorithm on where a socket does not say that it is TCP: each reply would take 40 ms more.
    line = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    line.bind(("127.0.0.1", 0))
    line.listen(BACKLOG)
    return line


# In its process ---------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn that says when it serves, and leaves signals alone."""

    def __init__(self, config: uvicorn.Config, parent: Connection) -> None:
        super().__init__(config)
        self._parent = parent

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """None: the parent ends it."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if not self.should_exit:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # from now on failures are counted
            self._parent.send("serving")


def _tell(question: Any) -> Any:
    match question:
        case "cpu":
            return time.process_time()
        case _:
            raise ValueError(f"nobody answers {question!r}")


def _serve(
    subject: str,
    setting: Setting,
    prepared: Callable[[FastAPI], None] | None,
    line: socket.socket,
    parent: Connection,
) -> None:
    answer(parent, _tell, at_the_end=lambda: os._exit(1))
    logging.getLogger("stanch").setLevel(logging.CRITICAL)  # a line for each refusal is not what is measured
    app = SUBJECTS[subject].build(setting)
    if prepared is not None:
        prepared(app)
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_keep_alive=60)
    _Server(config, parent).run(sockets=[line])
