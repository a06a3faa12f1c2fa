"""Runs SQL through the ``psql`` program: outside of every driver, outside of this process."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from stanch.embedded.errors import GET_CLIENT, GET_WHEEL, EmbeddedError, EmbeddedUnavailable
from stanch.embedded.loopback import HOST
from stanch.embedded.processes import environment

if TYPE_CHECKING:
    from stanch.embedded.binaries import Binaries

SQL_TIMEOUT: Final = 60.0
"""Seconds one call may take."""

_SHAPE: Final = ("-X", "-w", "-q", "-t", "--csv", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=sqlstate")


def run(
    statement: str, *, binaries: Binaries, port: int, user: str, password: str, database: str
) -> list[tuple[str, ...]]:
    """The rows of *statement*, as text. See :meth:`EmbeddedPostgres.sql`."""
    psql = shutil.which("psql", path=f"{binaries.bin_dir}{os.pathsep}{os.environ.get('PATH', '')}")
    if psql is None:
        raise EmbeddedUnavailable(
            f"there is no psql beside this PostgreSQL {binaries.version}, nor on the PATH",
            remedies=[GET_WHEEL, GET_CLIENT],
        )
    # both go in where no list of processes shows them
    secret = {"PGPASSWORD": password, "PGCLIENTENCODING": "UTF8", "PGCONNECT_TIMEOUT": "10"}
    try:
        done = subprocess.run(
            [psql, *_SHAPE, "-h", HOST, "-p", str(port), "-U", user, "-d", database],
            input=statement,
            capture_output=True,
            encoding="utf-8",
            env=environment() | secret,
            timeout=SQL_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EmbeddedError(f"psql did not end within {SQL_TIMEOUT:.0f} s") from None
    if done.returncode:
        state = re.search(r"(?:ERROR|FATAL|PANIC):  ([0-9A-Z]{5})\s*$", done.stderr, re.MULTILINE)
        why = f"SQLSTATE {state.group(1)}" if state is not None else "no connection"
        raise EmbeddedError(f"psql failed with status {done.returncode}, {why}")
    rows = csv.reader(io.StringIO(done.stdout, newline=""))
    return [tuple(row) or ("",) for row in rows]  # one column with nothing in it is an empty line


def quoted(name: str) -> str:
    """*name* as an identifier."""
    return '"' + name.replace('"', '""') + '"'
