"""Calls an app of this process as a server would, without a socket: one request after the other.

    python -m bench.driven SUBJECT URL KIND ...       # under valgrind; says what is counted to it

The one who started it reads the dumps. One subject and one kind in each process: Python specialises a line of code for
what passes there. The processes of one subject are forks of the one that has imported everything, which takes valgrind
longer than the requests.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from bench import shop
from bench.shop import Kind
from bench.subjects import SUBJECTS, Setting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi import FastAPI

SCOPE: Final = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "scheme": "http",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"bench"), (b"accept", b"application/json")],
    "client": ("127.0.0.1", 50000),
    "server": ("127.0.0.1", 80),
}
"""The keys that uvicorn gives, but for the request itself and ``state``, which is made anew for each call."""

WARMING: Final = 60
"""Requests before any is counted: psycopg prepares a statement at the sixth time, Python specialises what it runs."""
FEW, MANY = 10, 50
"""Requests counted; the difference of the two is what they cost, without what surrounds them."""


def caller(
    app: FastAPI, kind: Kind, *, on_reply: Callable[[], object] | None = None
) -> Callable[[int], Awaitable[None]]:
    """Makes the request of a number; whatever is not answered with 200 raises. *on_reply*: its body is there."""
    ask = kind.ask

    async def call(number: int) -> None:
        path = ask.path_of(number)
        scope: dict[str, Any] = {**SCOPE, "method": ask.method, "path": path, "raw_path": path.encode()}
        answered: list[int] = []
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()  # a client that stays until it is answered
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answered.append(message["status"])
            elif on_reply is not None:
                on_reply()

        await app({**scope, "state": {}}, receive, send)
        if answered != [200]:
            raise RuntimeError(f"{ask.method} {path} was answered {answered}")

    return call


def _tell_valgrind(*words: str) -> None:
    """Wait for it by looking again and again, for valgrind listens while its program runs; in as few steps as can be.

    What is done between two words is counted: ``subprocess.run`` does more of it the longer vgdb takes, which on a
    machine under load was 1 % of what the requests cost.
    """
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    vgdb = os.posix_spawnp("vgdb", ["vgdb", f"--pid={os.getpid()}", *words], os.environ, file_actions=quiet)
    while (ended := os.waitpid(vgdb, os.WNOHANG)) == (0, 0):
        time.sleep(0.05)
    if ended[1] != 0:
        raise RuntimeError(f"vgdb {' '.join(words)} ended with {os.waitstatus_to_exitcode(ended[1])}")


async def _count(subject: str, kind: Kind, url: str) -> None:
    app = SUBJECTS[subject].build(Setting(url, pool_size=1))
    async with app.router.lifespan_context(app):
        call = caller(app, kind)

        async def calls(number: int) -> None:
            for each in range(number):
                await call(each)

        await calls(WARMING)
        _tell_valgrind("instrumentation", "on")
        await calls(10)
        gc.collect()
        gc.freeze()  # what was imported is no garbage of a request
        for number in (FEW, MANY):
            gc.collect()
            _tell_valgrind("zero")
            await calls(number)
            _tell_valgrind("dump", f"{kind.name}-{number}")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; a fork does not inherit it


def _count_apart(subject: str, kind: Kind, url: str) -> None:
    """In a process of its own, which ends where it would return."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            _die_with_parent()
            asyncio.run(_count(subject, kind, url))
            status = 0
        except BaseException:  # noqa: BLE001  # the parent's code must not run twice
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    if ended != 0:
        raise SystemExit(f"{subject} {kind.name} could not be counted")


def main(subject: str, url: str, *kinds: str) -> None:
    """Count these kinds, one after the other."""
    _die_with_parent()
    shop.ELSEWHERE = 0.0  # type: ignore[misc]  # waiting is no instruction
    SUBJECTS[subject].build(Setting(url, pool_size=1))  # imports what it needs; opens nothing
    for kind in kinds:
        _count_apart(subject, Kind[kind], url)


if __name__ == "__main__":
    main(*sys.argv[1:])
