"""Child processes that run as somebody else if need be, and die with us, even after SIGKILL."""

from __future__ import annotations

import contextlib
import os
import signal as signals
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from stanch.embedded.errors import EmbeddedError, EmbeddedUnavailable

if sys.platform != "win32":
    import pwd

if TYPE_CHECKING:
    import io
    from collections.abc import Iterable, Sequence

POLL_INTERVAL: Final = 0.01
"""Seconds between two looks at a process that is starting or dying."""

STOP_TIMEOUT: Final = 10.0
"""Seconds a process gets to obey a signal."""

STOPPED: Final = frozenset("Tt")
DEAD: Final = frozenset("ZX")
"""States of a process, by the letters of ``/proc/<pid>/stat`` (proc manual page)."""

_LAUNCH: Final = """\
import ctypes, os, signal, sys
parent, uid, gid, folder, *command = sys.argv[1:]
libc = ctypes.CDLL(None)
os.chdir(folder)
if uid:
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
os.umask(0o077)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
if sys.platform == "linux":
    libc.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG, only now, because setuid clears it
if os.getppid() != int(parent):
    sys.exit("the parent died before its death could be watched")
os.execv(command[0], command)
"""
"""What runs between fork and the program, in an interpreter of its own: Python code in the forked child of a
process with threads can deadlock, and the other user may not be able to read any interpreter."""

_THAW: Final = """\
import os, signal, sys
sys.stdin.read()
for pid in map(int, sys.argv[1:]):
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass
"""
"""Waits for the end of its input, which is also what the death of the parent looks like."""


class Account(NamedTuple):
    """Another user, as whom root runs what must not run as root."""

    uid: int
    gid: int

    @classmethod
    def for_data(cls, data_dir: Path | None) -> Account | None:
        """None, ourselves, unless we are root: then the owner of *data_dir*, and where that is root, nobody."""
        if os.geteuid() != 0:
            return None
        owner = data_dir.stat().st_uid if data_dir is not None and data_dir.exists() else 0
        try:
            entry = pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")
        except KeyError:
            who = f"user {owner}, the owner of the data directory," if owner else "the user nobody"
            raise EmbeddedError(
                f"PostgreSQL does not run as root, and {who} has no entry in the list of users",
                remedies=[
                    "Run this as an ordinary user.",
                    "Or give the data directory to a user that exists.",
                ],
            ) from None
        return cls(entry.pw_uid, entry.pw_gid)

    def enters(self, path: Path) -> bool:
        """Whether this user can walk to *path*, read it, and enter or execute it."""
        real = path.resolve()
        way = all(self._may(folder, stat.S_IXOTH) for folder in real.parents)
        return way and self._may(real, stat.S_IROTH | stat.S_IXOTH)

    def _may(self, path: Path, wanted: int) -> bool:
        about = path.stat()
        if about.st_uid == self.uid:
            wanted <<= 6
        elif about.st_gid == self.gid:
            wanted <<= 3
        return about.st_mode & wanted == wanted


def temporary_folder(account: Account | None) -> Path:
    """Where to put temporary files that *account* has to reach; TMPDIR may be private to root."""
    usual = Path(tempfile.gettempdir())
    reachable = account is None or account.enters(usual)
    return usual if reachable else Path("/tmp")  # noqa: S108  # names in it come from mkdtemp, or the owner is checked


def environment() -> dict[str, str]:
    """For a child: no PG* variable of the caller, none of its secrets, messages in English, no zone to guess."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def command_for(command: Sequence[str | Path], account: Account | None, folder: Path) -> list[str]:
    """*command*, run by *account* in *folder*, sent SIGINT when the thread that forks it ends (Linux)."""
    uid, gid = (str(account.uid), str(account.gid)) if account is not None else ("", "")
    ours = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), uid, gid, str(folder)]
    return [*ours, *map(str, command)]


def send(pid: int, signal: int) -> None:
    """Send *signal*, if there still is somebody to get it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal)


class Process(NamedTuple):
    """One process, as it was when somebody looked."""

    pid: int
    parent: int
    state: str
    born: str
    """Together with the pid it is unique: numbers are given again."""

    @property
    def is_alive(self) -> bool:
        """Whether this very process still lives."""
        now = look_at(self.pid)
        return now is not None and now.born == self.born and now.state not in DEAD


def look_at(pid: int) -> Process | None:
    """The process *pid*, None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return Process(pid, int(fields[1]), fields[0], fields[19])


def title_of(pid: int) -> str:
    """The command line, which PostgreSQL's processes rewrite to say what they do; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def children_of(parent: int) -> list[Process]:
    """The living children of *parent*; Linux only."""
    if not Path("/proc/self/stat").exists():
        raise EmbeddedUnavailable(
            "the processes of the server are listed in /proc, which this system does not have",
            remedies=["Run this on Linux, or in a Linux container."],
        )
    found = [look_at(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [
        process for process in found if process and process.parent == parent and process.state not in DEAD
    ]


def halt(pids: Sequence[int]) -> None:
    """SIGSTOP, and wait until it has taken effect: until then a process goes on working."""
    for pid in pids:
        send(pid, signals.SIGSTOP)
    deadline = time.monotonic() + STOP_TIMEOUT
    while any((process := look_at(pid)) and process.state not in STOPPED | DEAD for pid in pids):
        if time.monotonic() > deadline:
            raise EmbeddedError(f"a process did not stop within {STOP_TIMEOUT:.0f} s of SIGSTOP")
        time.sleep(POLL_INTERVAL)


def survivors(family: Iterable[Process], timeout: float) -> list[Process]:
    """Those of *family* that have not died by themselves after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    left = [process for process in family if process.is_alive]
    while left and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL)
        left = [process for process in left if process.is_alive]
    return left


class Child:
    """One running program. A thread of its own starts it and lives exactly as long as it does.

    The kernel sends the parent-death signal when the *thread* that forked ends, not when the process does: a
    server started in a worker thread would die with the worker.
    """

    def __init__(self, command: Sequence[str], output: io.FileIO) -> None:
        born: Future[int] = Future()
        self._keeper = threading.Thread(
            target=self._keep, args=(command, output, born), name="stanch-embedded", daemon=True
        )
        self._keeper.start()
        self.pid = born.result()

    @staticmethod
    def _keep(command: Sequence[str], output: io.FileIO, born: Future[int]) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                start_new_session=True,  # Ctrl-C is for the program, which may still need its database
            )
        except BaseException as error:  # noqa: BLE001  # raised again where the future is awaited
            born.set_exception(error)
            return
        born.set_result(process.pid)
        process.wait()

    def is_gone(self, timeout: float = 0.0) -> bool:
        """Whether it has ended, or does within *timeout* seconds."""
        self._keeper.join(timeout)
        return not self._keeper.is_alive()

    def send(self, signal: int) -> None:
        """Send *signal*, if it has not ended."""
        if not self.is_gone():
            send(self.pid, signal)

    def children(self) -> list[Process]:
        """Its living children; Linux only."""
        return children_of(self.pid)


class Ice:
    """Stopped processes; they go on when this is thawed, and also when we die before that, so that they can die too."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._thawer = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _THAW, *map(str, pids)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        halt(pids)

    def thaw(self) -> None:
        """Let them go on."""
        self._thawer.communicate(timeout=STOP_TIMEOUT)
