"""Clients: a crowd in a closed loop, each of which asks again as soon as it is answered, and single ones.

They are here and not a tool's, because what is counted is when a reply came and what it was, and because of what they
cost: on a machine with few cores the clients take their time from the server. One request costs them some 25
microseconds on uvloop, a third of what it costs FastAPI to answer it with nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import re
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar, cast

from bench.shop import ROWS, Ask

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

T = TypeVar("T")

SWEEP: Final = 0.05
"""Seconds between two looks at who has lost patience."""
TOLD_AFTER: Final = b"x-told-after"
"""The header of a refusal: seconds between the pool's decision and the reply."""


class Answer(NamedTuple):
    """What came back: *status* 0 if nothing did in time."""

    status: int
    took: float
    told_after: float | None = None


def run(load: Coroutine[Any, Any, T]) -> T:
    """As ``asyncio.run``, on uvloop where it is installed: what the clients take is taken from the servers."""
    try:
        factory = importlib.import_module("uvloop").new_event_loop
    except ModuleNotFoundError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(load)


def requests_of(ask: Ask | str) -> list[bytes]:
    """What is sent: for a path the same again and again, for an ``Ask`` one for each row."""
    if isinstance(ask, str):
        return [_request("GET", ask)]
    return [_request(ask.method, ask.path_of(row)) for row in range(ROWS)]


def _request(method: str, path: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: bench", "accept: application/json"]
    if method == "POST":
        lines.append("content-length: 0")
    return "\r\n".join([*lines, "", ""]).encode()


class _Line(asyncio.Protocol):
    """One connection, and one request at a time. As little as there must be, for it runs beside the server."""

    LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

    def __init__(self) -> None:
        self.asked_at = 0.0
        self.is_open = False
        self._came = b""
        self._answered: Callable[[Answer], None] | None = None
        self._transport: asyncio.Transport | None = None

    def ask(self, request: bytes, answered: Callable[[Answer], None]) -> None:
        """Send *request*; *answered* is called once, also if the connection is lost."""
        assert self._transport is not None
        self._answered = answered
        self.asked_at = time.perf_counter()
        self._transport.write(request)

    async def answer_to(self, request: bytes) -> Answer:
        """Send *request* and wait."""
        came: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.ask(request, lambda answer: None if came.done() else came.set_result(answer))
        return await came

    def close(self) -> None:
        """Hang up; nobody waits for an answer any more."""
        self._answered = None
        self.hang_up()

    def hang_up(self) -> None:
        """Close; who waits for an answer is told that there is none."""
        if self._transport is not None:
            self._transport.abort()
        self._lost()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._lost()

    def data_received(self, data: bytes) -> None:
        if self._came:
            data = self._came + data
        head = data.find(b"\r\n\r\n")
        length = self.LENGTH.search(data, 0, head) if head >= 0 else None
        if length is None or len(data) < head + 4 + int(length[1]):
            self._came = data
            return
        self._came = b""
        told = data.find(TOLD_AFTER, 0, head)
        self._answer(
            int(data[9:12]),
            float(data[told:head].split(b"\r\n")[0].partition(b":")[2]) if told >= 0 else None,
        )

    def _lost(self) -> None:
        self.is_open = False
        self._answer(0, None)

    def _answer(self, status: int, told_after: float | None) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(Answer(status, time.perf_counter() - self.asked_at, told_after))


async def _connect(port: int) -> _Line:
    _, line = await asyncio.get_running_loop().create_connection(_Line, "127.0.0.1", port)
    return line


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._line: _Line | None = None

    async def get(self, path: str, *, timeout: float) -> Answer:
        """One request; after *timeout* seconds the client has gone."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(timeout):
                if self._line is None or not self._line.is_open:
                    self._line = await _connect(self._port)
                answer = await self._line.answer_to(requests_of(path)[0])
        except (TimeoutError, OSError):
            self.close()
            return Answer(0, time.perf_counter() - began)
        return answer._replace(took=time.perf_counter() - began)

    def close(self) -> None:
        """Hang up."""
        if self._line is not None:
            self._line.close()
        self._line = None


class Load(NamedTuple):
    """What a closed loop got."""

    answers: list[Answer]
    seconds: float
    """From the first request until the last answer."""

    @property
    def good(self) -> list[float]:
        """How long each answer with a 200 took."""
        return [answer.took for answer in self.answers if answer.status == 200]


class Crowd:
    """Clients that are connected, as by keep-alive, before anything is timed."""

    def __init__(self, port: int, clients: int) -> None:
        self._port = port
        self._clients = clients
        self._lines: set[_Line] = set()

    async def __aenter__(self) -> Self:
        self._lines = set(await asyncio.gather(*(_connect(self._port) for _ in range(self._clients))))
        return self

    async def __aexit__(self, *_: object) -> None:
        for line in self._lines:
            line.close()

    async def closed_loop(self, requests: Sequence[bytes], *, seconds: float, patience: float = 30.0) -> Load:
        """Each asks again as soon as it is answered, with the next of *requests*, for so many *seconds*.

        Who has waited for longer than its *patience* (give or take 50 ms) hangs up, connects anew, and asks again.
        """
        return await _ClosedLoop(self._port, self._lines, requests, seconds, patience).run()


class _ClosedLoop:
    """One run of a crowd; who comes anew is added to *lines*."""

    def __init__(
        self, port: int, lines: set[_Line], requests: Sequence[bytes], seconds: float, patience: float
    ) -> None:
        self._port = port
        self._lines = lines
        self._requests = itertools.cycle(requests)
        self._patience = patience
        self._answers: list[Answer] = []
        self._asking = set(lines)
        self._coming_back: set[asyncio.Task[None]] = set()
        self._somebody_left = asyncio.Event()
        self._began = self._last = time.perf_counter()
        self._over = self._began + seconds

    async def run(self) -> Load:
        for line in list(self._asking):
            self._ask(line)
        try:
            while self._asking or self._coming_back:
                self._somebody_left.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SWEEP):
                        await self._somebody_left.wait()
                now = time.perf_counter()
                for line in [line for line in self._asking if now - line.asked_at > self._patience]:
                    line.hang_up()
        finally:
            for task in self._coming_back:
                task.cancel()
        return Load(self._answers, self._last - self._began)

    def _ask(self, line: _Line) -> None:
        if time.perf_counter() < self._over:
            line.ask(next(self._requests), partial(self._answered, line))
        else:
            self._leave(line)

    def _answered(self, line: _Line, answer: Answer) -> None:
        self._last = line.asked_at + answer.took
        self._answers.append(answer)
        if line.is_open:
            self._ask(line)
            return
        self._leave(line)
        self._lines.discard(line)
        task = asyncio.create_task(self._come_back())
        self._coming_back.add(task)
        task.add_done_callback(self._came_back)

    def _leave(self, line: _Line) -> None:
        self._asking.discard(line)
        self._somebody_left.set()

    async def _come_back(self) -> None:
        with contextlib.suppress(OSError):  # nobody is there any more: a client less, which its loss has told
            async with asyncio.timeout(self._patience):
                line = await _connect(self._port)
            self._lines.add(line)
            self._asking.add(line)
            self._ask(line)

    def _came_back(self, task: asyncio.Task[None]) -> None:
        self._coming_back.discard(task)
        self._somebody_left.set()


async def closed_loop(
    port: int, ask: Ask | str, *, clients: int, seconds: float, patience: float = 30.0
) -> list[Answer]:
    """Each of so many *clients*, connected before, asks again as soon as it is answered."""
    async with Crowd(port, clients) as crowd:
        return (await crowd.closed_loop(requests_of(ask), seconds=seconds, patience=patience)).answers


def share(values: list[float], part: float) -> float:
    """The value that *part* of all *values* do not exceed.

    >>> share([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, round(len(ordered) * part) - 1)] if ordered else 0.0
