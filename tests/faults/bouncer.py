"""A PgBouncer of the test's own, in front of the test's database; it dies with this process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from tests.support.optional import path_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.support.judge import FreshDatabase

START_TIMEOUT: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1

CONFIG: Final = """
[databases]
{database} = host=127.0.0.1 port={upstream} dbname={database} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users.txt
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
ignore_startup_parameters = extra_float_digits
server_reset_query =
"""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as line:
        return int(line.getsockname()[1])


@contextlib.asynccontextmanager
async def pgbouncer(judged: FreshDatabase, *, pool_size: int) -> AsyncGenerator[int]:
    """PgBouncer in transaction mode with *pool_size* server connections; gives its port."""
    folder = Path(tempfile.mkdtemp(prefix="bouncer-"))
    port = _free_port()
    process = _start(judged, folder, port, pool_size)
    try:
        await _listens(port, process)
        yield port
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, START_TIMEOUT)
        shutil.rmtree(folder)


def _start(judged: FreshDatabase, folder: Path, port: int, pool_size: int) -> subprocess.Popen[bytes]:
    parts = urlsplit(judged.url(None))
    as_root = os.geteuid() == 0  # which PgBouncer refuses to run as
    config = folder / "pgbouncer.ini"
    config.write_text(
        CONFIG.format(
            database=judged.name,
            upstream=parts.port,
            user=parts.username,
            password=parts.password,
            port=port,
            folder=folder,
            pool_size=pool_size,
        )
    )
    users = folder / "users.txt"
    users.write_text(f'"{parts.username}" "{parts.password}"\n')
    if as_root:
        for path in (folder, config, users):
            shutil.chown(path, "nobody")
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [path_of("pgbouncer"), "-q", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            user="nobody" if as_root else None,
            extra_groups=[] if as_root else None,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  # one system call; no lock of Python's is taken
        )


async def _listens(port: int, process: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(START_TIMEOUT):
        while process.poll() is None:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.02)
    raise AssertionError(f"PgBouncer ended with status {process.returncode}")
