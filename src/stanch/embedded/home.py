"""The data directory of a server: found or made, lent to whoever runs it, and cleared away if it is temporary."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stanch.embedded.errors import EmbeddedError
from stanch.embedded.processes import Account, command_for, environment, temporary_folder

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from stanch.embedded.binaries import Binaries

USER: Final = "postgres"
"""The superuser's name."""

INIT_TIMEOUT: Final = 60.0
"""Seconds until a new data directory must be there; half a second is usual."""

_PREFIX: Final = "stanch-pgdata-"
_SWEEP_AGE: Final = 60.0
"""Seconds; a younger directory may not have got its lock yet."""
_LOG: Final = "server.log"
_PASSWORD: Final = "stanch.secret"  # noqa: S105  # the name of a file
_STATUS_LINE: Final = 7
"""Where ``postmaster.pid`` says whether the server is ready; ``pg_ctl -w`` looks there too."""


class Home:
    """A data directory, for as long as one server object uses it."""

    def __init__(self, data_dir: Path | None) -> None:
        self.account = Account.for_data(data_dir)
        self._base: Path | None = None
        self._lock: io.FileIO | None = None
        if data_dir is None:
            sweep()
            self._base = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._base.chmod(0o711)  # the server's user has to pass
            self._lock = io.FileIO(self._base / "lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            data_dir = self._base / "data"
        self.data_dir = data_dir.resolve()

    @property
    def is_temporary(self) -> bool:
        """Whether it vanishes at the end."""
        return self._base is not None

    @property
    def log_path(self) -> Path:
        """Where the server writes its log."""
        return self.data_dir / _LOG

    @property
    def major(self) -> int | None:
        """Which PostgreSQL made this directory, None if it is still empty."""
        try:
            return int((self.data_dir / "PG_VERSION").read_text(encoding="ascii"))
        except FileNotFoundError:
            return None

    @property
    def name_for_server(self) -> Path:
        """How the server calls its directory.

        All of its processes stand in it all the time. So a directory below one that the server's user may not
        enter (root's own, pytest's ``tmp_path``) works by this other name, and nothing is opened to others.
        """
        if self.account is None or self.account.enters(self.data_dir):
            return self.data_dir
        return Path("/proc/self/cwd")

    def furnish(self, binaries: Binaries, *, durable: bool) -> str:
        """Make the directory a database cluster if it is not one yet, and return the superuser's password."""
        kept = self.data_dir / _PASSWORD
        if self.major is None:
            password = secrets.token_urlsafe(24)
            self._initdb(binaries, password, durable=durable)
            self._write_secret(kept, password)
            return password
        try:
            return kept.read_text(encoding="ascii")
        except FileNotFoundError:
            raise self._refusal("is the data directory of another PostgreSQL server") from None

    def _initdb(self, binaries: Binaries, password: str, *, durable: bool) -> None:
        if self.data_dir.exists() and any(self.data_dir.iterdir()):
            raise self._refusal("is not empty")
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lend(self.data_dir)
        command: list[str | Path] = [binaries.tool("initdb"), "-D", self.name_for_server, "-U", USER]
        command += ["-A", "scram-sha-256", "--encoding=UTF8", "--locale=C"]
        command += [] if durable else ["--no-sync"]
        # 144 random bits need no stretching, and each connect then costs the client 4095 rounds less
        command += ["-c", "scram_iterations=1"] if binaries.major >= 16 else []
        with tempfile.TemporaryDirectory(prefix="stanch-", dir=temporary_folder(self.account)) as folder:
            Path(folder).chmod(0o711)
            told = Path(folder, "secret")  # by file, because command lines can be read by all
            self._write_secret(told, password)
            try:
                subprocess.run(
                    command_for([*command, f"--pwfile={told}"], self.account, self.data_dir),
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    check=True,
                    timeout=INIT_TIMEOUT,
                )
            except subprocess.CalledProcessError as error:
                raise EmbeddedError(
                    f"initdb failed with status {error.returncode}:\n{error.stderr}"
                ) from None
            except subprocess.TimeoutExpired:
                raise EmbeddedError(f"initdb did not end within {INIT_TIMEOUT:.0f} s") from None

    def _refusal(self, why: str) -> EmbeddedError:
        return EmbeddedError(
            f"{self.data_dir} {why}; nothing in it was touched",
            remedies=["Name a directory that is new, empty, or was made here: data_dir=Path(...)."],
        )

    def _write_secret(self, path: Path, password: str) -> None:
        path.touch(mode=0o600)
        path.write_text(password, encoding="ascii")
        self._lend(path)

    def _lend(self, path: Path) -> None:
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid)

    def open_log(self) -> io.FileIO:
        """The log, for the server to append to."""
        log = io.FileIO(self.log_path, "a", opener=_for_the_owner_only)
        self._lend(self.log_path)
        return log

    def is_ready(self, pid: int) -> bool:
        """Whether the server with this *pid*, no other, says that it accepts connections."""
        said = self._server_says()
        status = said[_STATUS_LINE].strip() if len(said) > _STATUS_LINE else ""
        return said[:1] == [str(pid)] and status in ("ready", "standby")

    def forget_server(self, pid: int) -> None:
        """After a kill of *pid*: some other process may be given its number, and would then pass for it."""
        if self._server_says()[:1] == [str(pid)]:
            self._pid_file.unlink()

    @property
    def _pid_file(self) -> Path:
        return self.data_dir / "postmaster.pid"

    def _server_says(self) -> list[str]:
        try:
            return self._pid_file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []

    def leave(self) -> None:
        """Done with it: a temporary directory goes, another one stays as it is."""
        if self._base is not None:
            shutil.rmtree(self._base, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()


def _for_the_owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def sweep() -> None:
    """Remove what killed processes have left behind: temporary directories whose lock nobody holds any more."""
    for base in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or in use, or somebody else sweeps it
            about = base.lstat()
            if about.st_uid == os.geteuid() and time.time() - about.st_mtime > _SWEEP_AGE:
                with io.FileIO(base / "lock", "r") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(base, ignore_errors=True)
