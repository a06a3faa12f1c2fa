"""Holds a reply back until it is whole and stores it in the transaction of its own work, and gives it once more."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NoReturn

from starlette.exceptions import HTTPException

from stanch.errors import ReplyNotRecordable

Message = MutableMapping[str, Any]

_ERROR: Final = 400
"""The lowest status that is not recorded: nothing of its work is stored, so the client may try again."""

_KEPT: Final = frozenset({b"content-type", b"content-encoding", b"content-language", b"location"})
"""Headers that belong to the reply itself. Cookies, dates and tracing belong to one delivery of it."""

_WITHOUT_BODY: Final = frozenset({204, 304})
_FILES: Final = frozenset({"http.response.pathsend", "http.response.zerocopysend"})


class Replayed(HTTPException):
    """Raised instead of running an endpoint whose reply is recorded. Whatever answers it, the record leaves."""


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A reply as it is kept: status, the headers that belong to it, body. Its repr shows nothing of them.

    >>> StoredReply(201, ((b"location", b"/orders/1"),), b"{}").headers_as_text()
    '[["location", "/orders/1"]]'
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @classmethod
    def from_row(cls, status: int, headers: str, body: bytes) -> StoredReply:
        """As it was stored."""
        pairs = tuple(
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in json.loads(headers)
        )
        return cls(status, pairs, bytes(body))

    @classmethod
    def from_messages(cls, start: Message, body: bytes) -> StoredReply:
        """As the app has made it."""
        kept = tuple(
            (bytes(name).lower(), bytes(value))
            for name, value in start.get("headers", ())
            if bytes(name).lower() in _KEPT
        )
        return cls(start["status"], kept, body)

    def headers_as_text(self) -> str:
        """The headers in JSON; bytes are told as Latin-1, which loses none."""
        return json.dumps([[name.decode("latin-1"), value.decode("latin-1")] for name, value in self.headers])

    def messages(self) -> Sequence[Message]:
        """The reply once more, marked as a replay."""
        headers = [*self.headers, (b"idempotent-replayed", b"true")]
        if self.status not in _WITHOUT_BODY:
            headers.append((b"content-length", str(len(self.body)).encode()))
        return (
            {"type": "http.response.start", "status": self.status, "headers": headers},
            {"type": "http.response.body", "body": self.body, "more_body": False},
        )

    def __repr__(self) -> str:
        return f"<StoredReply {self.status}, {len(self.body)} bytes>"


class Replay:
    """A recorder that puts a recorded reply in the place of whatever the app answers."""

    __slots__ = ("_left", "_reply")

    def __init__(self, reply: StoredReply) -> None:
        self._reply = reply
        self._left = False

    def released(self, message: Message) -> Sequence[Message]:
        """The recorded reply where another one starts; nothing else."""
        if self._left or "status" not in message:
            return ()
        self._left = True
        return self._reply.messages()

    async def before_settling(self, *, success: bool) -> None:
        """Nothing: the work was done when the reply was recorded."""


class _State(Enum):
    WAITING = "for the start of the reply"
    HOLDING = "the start, until the last of the body has come"
    DONE = "everything passes"


class Recording:
    """A recorder that holds a reply below 400 back until its last message, and has it stored before the COMMIT.

    ``max_body`` is in bytes. A body that is larger, that is streamed without a declared length, or that the
    server is told to read from a file raises ``ReplyNotRecordable``: then nothing of the work is stored.
    """

    __slots__ = ("_body", "_held", "_max_body", "_route", "_save", "_sized", "_start", "_state", "_unbar")

    def __init__(
        self,
        *,
        route: str,
        max_body: int,
        save: Callable[[StoredReply], Awaitable[None]],
        unbar: Callable[[], None],
    ) -> None:
        self._route = route
        self._max_body = max_body
        self._save = save
        self._unbar = unbar
        """Called when the time for commits has come."""
        self._state = _State.WAITING
        self._start: Message = {}
        self._sized = False
        self._held: list[Message] = []
        self._body = bytearray()

    def released(self, message: Message) -> Sequence[Message]:
        """Nothing before the last message of a reply below 400, then all of it."""
        match self._state:
            case _State.WAITING if "status" in message:
                return self._hold_start(message)
            case _State.HOLDING:
                return self._hold(message)
            case _:
                return (message,)

    async def before_settling(self, *, success: bool) -> None:
        """Store the reply if it is whole and a success; once."""
        self._unbar()
        start, self._start = self._start, {}
        if success and start:
            await self._save(StoredReply.from_messages(start, bytes(self._body)))
        self._body.clear()

    def _hold_start(self, start: Message) -> Sequence[Message]:
        if start["status"] >= _ERROR:
            self._state = _State.DONE
            return (start,)
        declared = dict(start.get("headers", ())).get(b"content-length")
        self._sized = declared is not None
        if declared is not None and int(declared) > self._max_body:
            self._refuse(f"has {int(declared):,} bytes, more than the {self._max_body:,} that are recorded")
        self._state, self._start = _State.HOLDING, start
        return ()

    def _hold(self, message: Message) -> Sequence[Message]:
        if message["type"] in _FILES:
            self._refuse("is a file that the server reads by itself")
        if message["type"] != "http.response.body":
            self._held.append(message)
            return ()
        self._body += message.get("body", b"")
        if len(self._body) > self._max_body:
            self._refuse(f"has more than the {self._max_body:,} bytes that are recorded")
        if message.get("more_body", False):
            if not self._sized:
                self._refuse("is streamed without a declared length")
            return ()
        self._state = _State.DONE
        held, self._held = self._held, []
        last: Message = {"type": "http.response.body", "body": bytes(self._body), "more_body": False}
        return (self._start, *held, last)

    def _refuse(self, why: str) -> NoReturn:
        self._state, self._start = _State.DONE, {}
        self._held.clear()
        self._body.clear()
        raise ReplyNotRecordable(
            f"{self._route}: the reply {why}, so no record of it can be kept under its Idempotency-Key",
            remedies=[
                "Answer with the id or the location of what was made, and let the client fetch the rest.",
                "Raise max_body of IdempotencyKey for a reply that is whole but large.",
                "Take IdempotencyKey off a route that streams.",
            ],
        )
