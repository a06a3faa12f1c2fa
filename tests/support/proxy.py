"""A TCP proxy in front of PostgreSQL that loses what it is told to lose, and counts round trips.

    async with FaultProxy(server.port) as proxy:
        engine = create_async_engine(proxy.through(url))
        proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)   # the server commits, nobody gets to know
        ...
        assert proxy.verdicts[Verdict.CUT_ANSWER] == 1            # the fault did happen

It understands as much of the protocol as that takes: PostgreSQL manual, *Frontend/Backend Protocol*. A link
that becomes encrypted is handed on without being understood: modes work, counters and hooks do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
import socket
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator
    from types import TracebackType

__all__ = ["FaultProxy", "Mode", "OnClientMessage", "Verdict", "at_commit", "at_statement", "statement_of"]

CHUNK = 65_536
"""Bytes read at a time."""

STARTUP_HEAD = struct.Struct("!II")
"""The first message of a client has a length and a code, but no type."""

CANCEL_REQUEST = 80_877_102
SSL_REQUEST = 80_877_103
GSS_REQUEST = 80_877_104

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with a time of zero: closing sends RST instead of FIN."""


class Mode(enum.Enum):
    """What happens to everything on every link."""

    PASS = "pass"
    """Handed on at once."""
    DELAY = "delay"
    """Handed on late, so that a round trip takes that much longer."""
    BLACKHOLE = "blackhole"
    """Held back in both directions, on old and new links; it arrives when the hole closes, as by TCP."""
    DEAF = "deaf"
    """New connections are accepted and never answered; old links go on."""
    RESET = "reset"
    """Old and new connections get an RST."""


class Verdict(enum.Enum):
    """What happens to one message of a client."""

    FORWARD = "forward"
    """Delivered."""
    LOSE = "lose"
    """Never delivered; the link stays open and silent."""
    LOSE_ANSWER = "lose answer"
    """Delivered and carried out; the answer is never delivered, the link stays open."""
    CUT = "cut"
    """Never delivered; both ends get an RST."""
    CUT_ANSWER = "cut answer"
    """Delivered and carried out; when the answer is complete it is dropped, and both ends get an RST."""


OnClientMessage: TypeAlias = "Callable[[str, bytes], Verdict | None]"
"""Asked for every message of a client when it reaches the proxy: its type, such as ``"Q"``, and its payload.
None is FORWARD. An exception ends the link and is raised again when the proxy is left."""


def statement_of(kind: str, payload: bytes) -> str | None:
    """The SQL in a message: of a Query (Q) or a Parse (P); None in every other."""
    match kind:
        case "Q":
            return payload.rstrip(b"\0").decode()
        case "P":
            return payload.split(b"\0", 2)[1].decode()
        case _:
            return None


def at_statement(pattern: str, verdict: Verdict, *, times: int | None = 1) -> Callable[[str, bytes], Verdict]:
    """A hook that gives *verdict* to the first *times* statements that begin with *pattern*, in any case.

    ``times=None`` is all of them. A statement that the driver has prepared earlier is not seen again.
    """
    wanted = re.compile(rf"\s*(?:{pattern})", re.IGNORECASE)
    left = float("inf") if times is None else times

    def judge(kind: str, payload: bytes) -> Verdict:
        nonlocal left
        statement = statement_of(kind, payload)
        if statement is None or left <= 0 or not wanted.match(statement):
            return Verdict.FORWARD
        left -= 1
        return verdict

    return judge


def at_commit(verdict: Verdict, *, times: int | None = 1) -> Callable[[str, bytes], Verdict]:
    """A hook that gives *verdict* to the first *times* COMMITs, on whatever link they come."""
    return at_statement(r"commit\b", verdict, times=times)


def forward_all(_kind: str, _payload: bytes) -> Verdict:
    """The hook that lets everything pass."""
    return Verdict.FORWARD


class FaultProxy:
    """A proxy on a free loopback port, in front of *upstream_port* on *upstream_host*.

    Counted since the start or the last :meth:`forget`:

    - ``connections``: how many were accepted,
    - ``cancel_requests``: how many of them only carried a CancelRequest,
    - ``queries``: the texts of simple queries, in order of arrival; both drivers send COMMIT as one,
    - ``parsed``: the texts of statements that were prepared,
    - ``round_trips``: how often a client waited for an answer once it was logged in; a pipeline is one,
    - ``verdicts``: how often each :class:`Verdict` was carried out.
    """

    def __init__(self, upstream_port: int, upstream_host: str = "127.0.0.1") -> None:
        self.upstream = (upstream_host, upstream_port)
        self.host = "127.0.0.1"
        self.on_client_message: OnClientMessage = forward_all
        self.half_delay = 0.0
        self._mode = Mode.PASS
        self._changed = asyncio.Event()
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._errors: list[BaseException] = []
        self._server: asyncio.Server | None = None
        self.forget()

    def forget(self) -> None:
        """Set all counters to zero."""
        self.connections = 0
        self.cancel_requests = 0
        self.round_trips = 0
        self.queries: list[str] = []
        self.parsed: list[str] = []
        self.verdicts: Counter[Verdict] = Counter()

    def __repr__(self) -> str:
        return (
            f"<FaultProxy {self._mode.value}, {self.open_connections} open of {self.connections} connections>"
        )

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.host, 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        if self._errors and error is None:
            raise self._errors[0]

    @property
    def port(self) -> int:
        """Where clients connect, on 127.0.0.1."""
        assert self._server is not None, "use it as `async with FaultProxy(...) as proxy`"
        return int(self._server.sockets[0].getsockname()[1])

    def through(self, url: str) -> str:
        """*url* with this proxy in the place of its host and port."""
        parts = urlsplit(url)
        credentials, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{credentials}{at}{self.host}:{self.port}").geturl()

    @property
    def open_connections(self) -> int:
        """Links that neither side has ended, as far as the proxy could notice."""
        return len(self._links)

    # Modes ------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        return self._mode

    def pass_through(self) -> None:
        """Back to normal: what was held back arrives now."""
        self._set(Mode.PASS)

    def delay(self, seconds: float) -> None:
        """Make every round trip *seconds* longer, half of it each way."""
        self._set(Mode.DELAY, seconds / 2)

    def blackhole(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self._set(Mode.BLACKHOLE)

    def deafen(self) -> None:
        """New connections get no answer; those that stand go on."""
        self._set(Mode.DEAF)

    def reset(self) -> None:
        """RST every link now, and every new connection as it comes."""
        self._set(Mode.RESET)
        self.cut()

    def cut(self) -> None:
        """RST every link now; new connections are as the mode says."""
        for link in self._links.values():
            link.cut()

    @contextlib.contextmanager
    def blackholed(self) -> Generator[None]:
        """A black hole that closes at the end of the block.

        Also when a test fails in it: its engine would else wait for ever for the answer to a ROLLBACK.
        """
        self.blackhole()
        try:
            yield
        finally:
            self.pass_through()

    def _set(self, mode: Mode, half_delay: float = 0.0) -> None:
        self._mode = mode
        self.half_delay = half_delay
        self._changed.set()
        self._changed = asyncio.Event()

    async def not_while(self, *modes: Mode) -> None:
        """Wait until the mode is none of *modes*."""
        while self._mode in modes:
            await self._changed.wait()

    # Links ------------------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = _Link(self, reader, writer)
        task = asyncio.create_task(link.run(), name="FaultProxy link")
        self._links[task] = link
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._links[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)

    def judge(self, kind: str, payload: bytes) -> Verdict:
        """Count one message of a client, and ask the hook about it."""
        if (statement := statement_of(kind, payload)) is not None:
            (self.queries if kind == "Q" else self.parsed).append(statement)
        verdict = self.on_client_message(kind, payload) or Verdict.FORWARD
        self.verdicts[verdict] += 1
        return verdict


class _Frames:
    """Cuts a stream into messages: a type, a length that counts itself, a payload."""

    def __init__(self) -> None:
        self.rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[str, bytes]]:
        self.rest += chunk
        while len(self.rest) >= 5:
            end = 1 + int.from_bytes(self.rest[1:5])
            if len(self.rest) < end:
                return
            message = bytes(self.rest[:end])
            del self.rest[:end]
            yield chr(message[0]), message


class _Flight:
    """Sees one link's messages go by and knows when the client has been answered: that is a round trip.

    A flight begins with a message of the client and lands when nothing is unanswered any more: no Query and
    no Sync without its ReadyForQuery, or, after a Flush, no message without its own answer.
    """

    UNANSWERED_UNTIL_READY = frozenset("QSF")
    ANSWERED_ONE_BY_ONE = frozenset("PBCDE")
    ANSWERS = frozenset("123TnCIs")
    COPY_BEGINS = frozenset("GW")

    def __init__(self) -> None:
        self.logged_in = False
        self.unready = 0
        self._single = 0
        self._flushed = False
        self._flying = False

    def client_says(self, kind: str) -> None:
        if not self.logged_in or kind == "X":
            return
        self._flying = True
        if kind in self.UNANSWERED_UNTIL_READY:
            self.unready += 1
            self._single, self._flushed = 0, False
        elif kind in self.ANSWERED_ONE_BY_ONE:
            self._single += 1
        elif kind == "H":
            self._flushed = True

    def server_says(self, kind: str) -> bool:
        """Whether this message lands the flight."""
        if kind == "Z":
            self.logged_in, self.unready = True, max(self.unready - 1, 0)
        elif self.unready == 0 and kind in self.ANSWERS:
            self._single = max(self._single - 1, 0)
        elif self.unready == 0 and kind == "E":
            self._single = 0  # the server skips the rest up to the next Sync
        elif kind not in self.COPY_BEGINS:
            return False
        answered = self.unready == 0 and (kind == "Z" or (self._flushed and self._single == 0))
        landed = self._flying and (answered or kind in self.COPY_BEGINS)
        self._flying = self._flying and not landed
        return landed


class _Link:
    """One client's connection, and the one to the server that belongs to it."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = reader, writer
        self._ends = [writer]
        self._flight = _Flight()
        self._losing: Verdict | None = None
        self._answers_before = 0

    async def run(self) -> None:
        try:
            if self._proxy.mode is Mode.RESET:
                self.cut()
                return
            await self._proxy.not_while(Mode.BLACKHOLE, Mode.DEAF)
            self._from_server, self._to_server = await asyncio.open_connection(*self._proxy.upstream)
            self._ends.append(self._to_server)
            if await self._handshake():
                await self._both(self._client_messages(), self._server_messages())
            else:
                await self._both(
                    self._bytes(self._from_client, self._to_server),
                    self._bytes(self._from_server, self._to_client),
                )
            await self._proxy.not_while(Mode.BLACKHOLE)  # an end is not seen through the hole either
        except (OSError, asyncio.IncompleteReadError):
            await self._proxy.not_while(Mode.BLACKHOLE)
            self.cut()  # one side was reset or could not be reached: the other gets to know the same way
        except BaseException:
            self.cut()
            raise
        finally:
            for end in self._ends:
                end.close()

    def cut(self) -> None:
        """RST to both ends."""
        for end in self._ends:
            line: socket.socket | None = end.get_extra_info("socket")
            with contextlib.suppress(OSError):  # closed already
                if line is not None:
                    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            end.transport.abort()

    @staticmethod
    async def _both(*pumps: Coroutine[Any, Any, None]) -> None:
        """Run both directions until one ends."""
        tasks = [asyncio.create_task(pump) for pump in pumps]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _hand_on(self, data: bytes | bytearray, to: asyncio.StreamWriter) -> None:
        if data:
            await self._proxy.not_while(Mode.BLACKHOLE)
            if self._proxy.half_delay:
                await asyncio.sleep(self._proxy.half_delay)
                await self._proxy.not_while(Mode.BLACKHOLE)
            to.write(data)
            await to.drain()

    async def _handshake(self) -> bool:
        """Up to and with the start-up message; False if what follows cannot be understood."""
        while True:
            head = await self._from_client.readexactly(STARTUP_HEAD.size)
            length, code = STARTUP_HEAD.unpack(head)
            body = await self._from_client.readexactly(length - STARTUP_HEAD.size)
            await self._hand_on(head + body, self._to_server)
            if code not in (SSL_REQUEST, GSS_REQUEST):
                self._proxy.cancel_requests += code == CANCEL_REQUEST
                return bool(code != CANCEL_REQUEST)
            answer = await self._from_server.readexactly(1)
            await self._hand_on(answer, self._to_client)
            if answer != b"N":
                return False

    async def _bytes(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK):
            await self._hand_on(chunk, to)

    async def _client_messages(self) -> None:
        frames = _Frames()
        while chunk := await self._from_client.read(CHUNK):
            delivered = bytearray()
            for kind, message in frames.feed(chunk):
                verdict = self._proxy.judge(kind, message[5:])
                if verdict is Verdict.CUT:
                    await self._hand_on(delivered, self._to_server)
                    self.cut()
                    return
                if verdict is Verdict.LOSE:
                    continue
                if verdict is not Verdict.FORWARD:
                    self._losing, self._answers_before = verdict, self._flight.unready
                self._flight.client_says(kind)
                delivered += message
            await self._hand_on(delivered, self._to_server)
        await self._hand_on(frames.rest, self._to_server)

    async def _server_messages(self) -> None:
        frames = _Frames()
        while chunk := await self._from_server.read(CHUNK):
            delivered = bytearray()
            for kind, message in frames.feed(chunk):
                landed = self._flight.server_says(kind)
                if self._losing is None or self._answers_before > 0:
                    self._answers_before -= kind == "Z"
                    self._proxy.round_trips += landed
                    delivered += message
                elif kind == "Z" and self._losing is Verdict.CUT_ANSWER:
                    await self._hand_on(delivered, self._to_client)
                    self.cut()
                    return
                elif kind == "Z":
                    self._losing = None
            await self._hand_on(delivered, self._to_client)
        await self._hand_on(frames.rest, self._to_client)
