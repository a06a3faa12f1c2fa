"""A client on one real socket: as little HTTP/1.1 as it takes, so that the client is never what is slow.

It says whether a reply came whole, and it can hang up in the middle.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

REPLY_TIMEOUT: Final = 45.0
"""Seconds until a reply must be there; every deadline of the app is shorter."""

_RESET: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Reply:
    """What came back. *status* 0: nothing that could be called a reply."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool = True

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 400 and self.whole

    def json(self) -> Any:
        return json.loads(self.body)


NOTHING: Final = Reply(0, {}, b"", whole=False)


class Wire:
    """A keep-alive connection, opened again when the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()

    async def request(self, method: str, path: str, body: bytes = b"") -> Reply:
        """Send one request and read its reply; a connection that breaks gives what had come until then."""
        await self.send(method, path, body)
        try:
            async with asyncio.timeout(REPLY_TIMEOUT):
                reply = await self._read()
        except (OSError, asyncio.IncompleteReadError) as error:
            self.hang_up()
            if isinstance(error, TimeoutError):
                raise AssertionError(f"{method} {path}: no reply within {REPLY_TIMEOUT} s") from None
            return NOTHING
        if not reply.whole or reply.headers.get("connection", "").lower() == "close":
            self.hang_up()
        return reply

    async def send(self, method: str, path: str, body: bytes = b"") -> None:
        """Send one request and wait for nothing."""
        head = f"{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        try:
            await self._write(head + body)
        except OSError:
            self.hang_up()
            await self._write(head + body)  # a server that was restarted has closed the old one

    def hang_up(self, *, rudely: bool = False) -> None:
        """Close the connection with FIN, or *rudely* with RST."""
        writer, self._reader, self._writer = self._writer, None, None
        if writer is None:
            return
        line: socket.socket | None = writer.get_extra_info("socket")
        if rudely and line is not None:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.close()

    async def _write(self, data: bytes) -> None:
        if self._writer is None or self._reader is None or self._reader.at_eof():
            self.hang_up()
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(data)
        await self._writer.drain()

    async def _read(self) -> Reply:
        assert self._reader is not None
        reader = self._reader
        head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
        if not head:
            return NOTHING
        first, *rest = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        status = int(first.split(" ", 2)[1])
        if headers.get("transfer-encoding") == "chunked":
            body, whole = await self._chunks(reader)
            return Reply(status, headers, body, whole)
        length = int(headers.get("content-length", "0"))
        try:
            return Reply(status, headers, await reader.readexactly(length))
        except asyncio.IncompleteReadError as broken:
            return Reply(status, headers, broken.partial, whole=False)

    @staticmethod
    async def _chunks(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
        body = b""
        try:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        except asyncio.IncompleteReadError as broken:
            return body + broken.partial, False
        return body, True
