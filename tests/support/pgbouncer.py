"""A real PgBouncer in front of a server of our own, in transaction mode if not told otherwise."""

from __future__ import annotations

import io
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from stanch.embedded.loopback import HOST, accepts, free_port
from stanch.embedded.processes import (
    POLL_INTERVAL,
    STOP_TIMEOUT,
    Account,
    Child,
    command_for,
    temporary_folder,
)
from tests.support.optional import path_of

if TYPE_CHECKING:
    from stanch.embedded import EmbeddedPostgres

START_TIMEOUT = 10.0
"""Seconds until it must accept connections."""


class PgBouncer:
    """``with PgBouncer(server) as pooler``: one process on a free loopback port, which dies with this one.

    Client and server side both ask for the server's real password (SCRAM). *settings* are those of the section
    ``[pgbouncer]``; ``pool_mode`` is ``transaction`` and ``default_pool_size`` 20 if not set.
    """

    def __init__(self, server: EmbeddedPostgres, **settings: str | int) -> None:
        self._server = server
        self._settings = settings
        self._process: Child | None = None
        self.port = 0

    def url(self, driver: str | None = "asyncpg", database: str = "postgres") -> str:
        """SQLAlchemy's URL with *driver*, libpq's with None."""
        direct = self._server.url(driver, database)
        return direct.replace(f"@{HOST}:{self._server.port}/", f"@{HOST}:{self.port}/")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        account = Account.for_data(None)
        self._folder = tempfile.TemporaryDirectory(prefix="stanch-pgbouncer-", dir=temporary_folder(account))
        folder = Path(self._folder.name)
        folder.chmod(0o711)
        self.port = free_port()
        password = urlsplit(self._server.url(None)).password
        config, users, log = (folder / name for name in ("pgbouncer.ini", "userlist.txt", "pgbouncer.log"))
        config.write_text(self._configuration(users), encoding="utf-8")
        users.write_text(f'"{self._server.user}" "{password}"\n', encoding="utf-8")
        for file in (config, users):
            file.chmod(0o600)
            if account is not None:
                os.chown(file, account.uid, account.gid)
        with io.FileIO(log, "a") as output:
            command = command_for([path_of("pgbouncer"), config], account, folder)
            self._process = Child(command, output)
        deadline = time.monotonic() + START_TIMEOUT
        while not accepts(self.port, self._server.user):
            if self._process.is_gone(POLL_INTERVAL) or time.monotonic() > deadline:
                said = log.read_text(encoding="utf-8", errors="replace")
                self.__exit__()
                raise RuntimeError(f"pgbouncer did not start:\n{said}")
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._process is not None
        self._process.send(signal.SIGTERM)  # at once; SIGINT would wait for the clients
        if not self._process.is_gone(STOP_TIMEOUT):
            self._process.send(signal.SIGKILL)
            self._process.is_gone(STOP_TIMEOUT)
        self._folder.cleanup()

    def _configuration(self, users: Path) -> str:
        settings: dict[str, str | int] = {
            "listen_addr": HOST,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": str(users),
            "pool_mode": "transaction",
            "default_pool_size": 20,
            "max_client_conn": 500,
            "ignore_startup_parameters": "extra_float_digits",
        }
        lines = [f"{name} = {value}" for name, value in (settings | self._settings).items()]
        target = f"* = host={HOST} port={self._server.port}"
        return "\n".join(["[databases]", target, "[pgbouncer]", *lines, ""])
