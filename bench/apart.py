"""A subject's app in a process of its own and without a server: what it is asked to do runs in its event loop.

So no subject's garbage, caches or threads are in another's way, and a process's memory is that of one subject.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from bench.children import Child, answer
from bench.driven import caller
from bench.subjects import SUBJECTS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator
    from multiprocessing.connection import Connection
    from typing import Concatenate

    from fastapi import FastAPI

    from bench.shop import Kind
    from bench.subjects import Setting

P = ParamSpec("P")
T = TypeVar("T")


class Apart:
    """The process, as its parent sees it."""

    def __init__(self, process: Child) -> None:
        self._process = process

    def begin(
        self, work: Callable[Concatenate[FastAPI, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], T]:
        """Let it do *work*, a function of a module; the answer waits for what it gives. One at a time.

        ``RuntimeError``, with the traceback of that process, where *work* raised.
        """
        answered = self._process.asked((work, args, kwargs))

        def given() -> T:
            value, raised = answered()
            if raised is not None:
                raise RuntimeError(f"in {self._process.name}:\n{raised}")
            return value  # type: ignore[no-any-return]  # what was pickled there

        return given

    def run(
        self, work: Callable[Concatenate[FastAPI, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Let it do *work*, and wait."""
        return self.begin(work, *args, **kwargs)()


@contextmanager
def apart(subject: str, setting: Setting) -> Generator[Apart]:
    """The app of *subject*, started, in a process that ends with the context or with this one."""
    process = Child(f"the process of {subject}", _live, subject, setting)
    try:
        process.ready()
        yield Apart(process)
    finally:
        process.end()


def _live(subject: str, setting: Setting, parent: Connection) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # it may have been started by a thread, which cannot see to that
    logging.disable()  # what is said of each failure is not what is measured
    asyncio.run(_serve(subject, setting, parent))


async def _serve(subject: str, setting: Setting, parent: Connection) -> None:
    loop = asyncio.get_running_loop()
    app = SUBJECTS[subject].build(setting)

    def do(asked: tuple[Any, Any, Any]) -> tuple[Any, str | None]:
        work, args, kwargs = asked
        try:
            return asyncio.run_coroutine_threadsafe(work(app, *args, **kwargs), loop).result(), None
        except Exception:  # noqa: BLE001  # the parent raises it
            return None, traceback.format_exc()

    async with app.router.lifespan_context(app):
        parent.send("started")
        answer(parent, do, at_the_end=lambda: os._exit(0))  # the server sees to the connections
        await asyncio.Event().wait()


def attempts(app: FastAPI, kind: Kind) -> Callable[[int], Coroutine[Any, Any, bool]]:
    """Makes the request of a number, as ``caller`` does; whether it was answered with 200."""
    call = caller(app, kind)

    async def attempt(number: int) -> bool:
        try:
            await call(number)
        except Exception:  # noqa: BLE001  # whatever a subject raises: the request has failed
            return False
        return True

    return attempt
