"""The one address a server of one's own listens on: a port nobody else has, and whether it answers there."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from typing import Final

from stanch.embedded.errors import EmbeddedError

HOST: Final = "127.0.0.1"
PORT_ATTEMPTS: Final = 20

_PORTS: Final = range(20_000, 32_000)
"""Below the range from which Linux takes the ports of outgoing connections. While the server is down, a client
that dials again and again could else be given this very port, and be connected to itself."""
_ANSWER_TIMEOUT: Final = 1.0


def free_port() -> int:
    """A port that nobody listens on now; somebody may before you do."""
    for port in random.sample(_PORTS, k=PORT_ATTEMPTS):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise EmbeddedError(
        f"no free port was found on {HOST} ({PORT_ATTEMPTS} tried between {_PORTS[0]} and {_PORTS[-1]})",
        remedies=["Name one: EmbeddedPostgres(port=...)."],
    )


def accepts(port: int, user: str) -> bool:
    """Whether the PostgreSQL there lets clients in. It says so before it asks for a password.

    As ``pg_isready`` does it (PostgreSQL manual, *Message Flow: Start-up*).
    """
    words = f"user\0{user}\0database\0postgres\0\0".encode()
    hello = struct.pack("!II", 8 + len(words), 3 << 16) + words
    try:
        with socket.create_connection((HOST, port), timeout=_ANSWER_TIMEOUT) as line:
            line.sendall(hello)
            answer = line.recv(1024)  # all of it: to close on unread data is a reset, which the server logs
            return answer.startswith(b"R")
    except OSError:
        return False
