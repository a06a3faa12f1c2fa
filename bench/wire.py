"""A longer wire to the server: a proxy, in a process of its own, that makes every round trip take so much longer.

    with Wire(server.port) as wire:
        wire.delay(0.002)
        engine = create_async_engine(wire.through(url))

What the client says is handed on at once, and what the server says as much later as a round trip shall take: the client
cannot tell that from half of it each way. Connections are accepted without delay; what is said on them is not.
"""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from sqlalchemy import make_url

from bench.children import Child

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from types import TracebackType

CHUNK: Final = 65_536
BACKLOG: Final = 1024
SOON: Final = 20e-6
"""Seconds: what is due within them is sent now. To sleep and to wake up takes longer."""
OWN: Final = 60e-6
"""Seconds that it takes a message and its answer to be handed on without any delay, and a sleeper to wake up: they are
part of the delay. On a loopback with little else to do, half of all messages are then within 30 of what was asked."""


class Spent(NamedTuple):
    """What the wire has cost since it was made."""

    messages: int
    """What was said, in both directions: two of them are a round trip."""
    cpu: float
    """Seconds of processor time."""


class Wire:
    """In front of *port* on this machine."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._child: Child | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self._child = Child("the wire", _run, self._upstream)
        try:
            self.port = int(self._child.ready())
        except BaseException:
            self._child.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child is not None
        self._child.end()

    def delay(self, seconds: float) -> None:
        """From now on a round trip takes that much longer."""
        self._ask(seconds)

    def spent(self) -> Spent:
        """What it has cost."""
        return Spent(*self._ask(None))

    def through(self, url: str) -> str:
        """*url* with this wire in the place of its host and port."""
        there = make_url(url).set(host="127.0.0.1", port=self.port)
        return there.render_as_string(hide_password=False)

    def _ask(self, question: float | None) -> Any:
        assert self._child is not None, "use it as `with Wire(...) as wire`"
        return self._child.ask(question)


# In its process ---------------------------------------------------------------------------------------------


class _End:
    """One end of one connection."""

    __slots__ = ("line", "other", "unsent")

    other: _End

    def __init__(self, line: socket.socket) -> None:
        line.setblocking(False)  # noqa: FBT003  # socket's own signature
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.line = line
        self.unsent = bytearray()


class _ServerEnd(_End):
    """That of the server: what comes from here comes late."""


class _Late(NamedTuple):
    """Something that the server has said, and when it arrives."""

    due: float
    to: _End
    said: bytes


class _Relay:
    """All connections on one selector.

    asyncio's timers, and those of epoll, are rounded up to a whole millisecond. ``select`` sleeps in microseconds, so
    it does the waiting: for the selector, whose own file is readable when one of its files is.
    """

    def __init__(self, upstream: int, parent: Connection) -> None:
        self._upstream = ("127.0.0.1", upstream)
        self._parent = parent
        self._selector = selectors.DefaultSelector()
        self._late: deque[_Late] = (
            deque()
        )  # in the order in which they are due: the delay is the same for all
        self._delay = 0.0
        self._messages = 0
        self._door = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self._selector.register(self._door, selectors.EVENT_READ, self._door)
        self._selector.register(parent, selectors.EVENT_READ, parent)

    def run(self) -> None:
        """Until the parent is no more."""
        self._parent.send(self._door.getsockname()[1])
        files = [self._selector.fileno()]
        while True:
            if self._late:
                left = self._late[0].due - time.perf_counter()
                if left > SOON:
                    select.select(files, (), (), left)
                self._deliver()
                ready = self._selector.select(0)
            else:
                ready = self._selector.select()
            for key, events in ready:
                if key.data is self._door:
                    self._accept()
                elif key.data is self._parent:
                    if not self._answer():
                        return
                elif events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                else:
                    self._read(key.data)

    def _answer(self) -> bool:
        try:
            asked = self._parent.recv()
            if asked is None:
                self._parent.send((self._messages, time.process_time()))
            else:
                while self._late:  # a shorter delay must not overtake a longer one
                    self._hand_on(*self._late.popleft()[1:])
                self._delay = max(asked - OWN, 0.0)
                self._parent.send(None)
        except (EOFError, OSError):
            return False
        return True

    def _accept(self) -> None:
        client, _ = self._door.accept()
        try:
            server = socket.create_connection(self._upstream)
        except OSError:
            client.close()
            return
        here, there = _End(client), _ServerEnd(server)
        here.other, there.other = there, here
        self._selector.register(client, selectors.EVENT_READ, here)
        self._selector.register(server, selectors.EVENT_READ, there)

    def _read(self, end: _End) -> None:
        try:
            said = end.line.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if said:
            self._messages += 1
        else:
            self._forget(end)  # it would stay readable; what it said before may still be on its way
        if self._delay and isinstance(end, _ServerEnd):
            self._late.append(_Late(time.perf_counter() + self._delay, end.other, said))
        else:
            self._hand_on(end.other, said)

    def _deliver(self) -> None:
        while self._late and self._late[0].due - time.perf_counter() <= SOON:
            _, to, said = self._late.popleft()
            self._hand_on(to, said)

    def _hand_on(self, to: _End, said: bytes) -> None:
        """Nothing said is the end of the connection: nobody who speaks to PostgreSQL hangs up one direction alone."""
        if not said:
            self._close(to)
            return
        to.unsent += said
        if len(to.unsent) == len(said):
            self._flush(to)

    def _flush(self, end: _End) -> None:
        try:
            del end.unsent[: end.line.send(end.unsent)]
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if end.unsent else 0)
            if self._selector.get_key(end.line).events != events:
                self._selector.modify(end.line, events, end)
        except BlockingIOError:
            self._selector.modify(end.line, selectors.EVENT_READ | selectors.EVENT_WRITE, end)
        except (OSError, KeyError, ValueError):
            self._close(end)

    def _close(self, end: _End) -> None:
        for each in (end, end.other):
            self._forget(each)
            each.line.close()

    def _forget(self, end: _End) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(end.line)


def _run(upstream: int, parent: Connection) -> None:
    with contextlib.suppress(
        OSError
    ):  # Linux: else a sleep may be 50 microseconds longer than it was asked to be
        Path("/proc/self/timerslack_ns").write_text("1")
    _Relay(upstream, parent).run()
