"""A real PostgreSQL in one call: it comes up, obeys, keeps what it promised, and never outlives its parent."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from stanch.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedUnavailable, binaries, home, server
from stanch.embedded.loopback import free_port
from stanch.embedded.processes import children_of, look_at, title_of
from stanch.errors import StanchError
from tests.support.judge import raw_connect
from tests.support.optional import needs, path_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stanch.embedded.processes import Account

PATIENCE = 10.0
"""Seconds until something that takes a moment must have happened."""


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.01)


def lives(pid: int) -> bool:
    process = look_at(pid)
    return process is not None and process.is_alive


def servers_of_ours() -> set[int]:
    return {process.pid for process in children_of(os.getpid()) if "postgres" in title_of(process.pid)}


def secret_of(postgres: EmbeddedPostgres) -> str:
    return postgres.url(None).partition(f"//{postgres.user}:")[2].partition("@")[0]


@pytest.fixture(scope="module")
def durable() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(durable=True, settings={"max_connections": 30}) as postgres:
        yield postgres


@pytest.fixture
def own(durable: EmbeddedPostgres) -> EmbeddedPostgres:
    """A server that a test may torment; it runs when the test begins, and ``marks`` is an empty table."""
    if not durable.is_running:
        durable.start()
    durable.wait_until_ready()
    durable.sql("DROP TABLE IF EXISTS marks; CREATE TABLE marks (n int PRIMARY KEY)")
    return durable


# Start and stop -------------------------------------------------------------------------------------------


def test_it_starts_answers_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    before = servers_of_ours()
    begun = time.perf_counter()
    with EmbeddedPostgres() as postgres:
        took = time.perf_counter() - begun
        assert postgres.sql("SELECT 1, NULL, 'a,b' || chr(10) || '\"'; SELECT ''") == [
            ("1", "", 'a,b\n"'),
            ("",),
        ]
        (major,) = postgres.sql("SELECT current_setting('server_version_num')::int / 10000")[0]
        assert postgres.version.split(".")[0] == major
        assert servers_of_ours() - before == {postgres.pid}
        place, family = postgres.data_dir, [postgres.pid, *(child.pid for child in children_of(postgres.pid))]
    assert not place.exists()
    assert not place.parent.exists()
    assert not [pid for pid in family if lives(pid)]
    assert not postgres.is_running
    with capsys.disabled():
        print(f"\n  [first start {took * 1000:.0f} ms]", end="")


def test_a_second_start_on_the_same_directory_is_fast_and_finds_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others cannot enter the tmp_path of pytest: root's server works in it all the same."""
    place = tmp_path / "deep" / "data"
    with EmbeddedPostgres(data_dir=place) as postgres:
        postgres.sql("CREATE TABLE t AS SELECT 42 AS n")
    begun = time.perf_counter()
    with EmbeddedPostgres(data_dir=place) as postgres:
        took = time.perf_counter() - begun
        assert postgres.sql("TABLE t") == [("42",)]
    assert place.exists()
    assert took < 10, "a bound for the busiest machine; under a second is usual"
    with capsys.disabled():
        print(f"\n  [second start {took * 1000:.0f} ms]", end="")


def test_it_listens_on_loopback_only_and_has_no_unix_socket(postgres: EmbeddedPostgres) -> None:
    assert postgres.sql("SELECT current_setting('unix_socket_directories')") == [("",)]
    lines = [
        line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()
    ]
    listening = {f[1] for f in lines if f[3] == "0A" and f[1].endswith(f":{postgres.port:04X}")}
    assert listening == {f"0100007F:{postgres.port:04X}"}


def test_it_asks_for_the_password(postgres: EmbeddedPostgres) -> None:
    secret = secret_of(postgres)
    assert len(secret) >= 24
    with psycopg.connect(postgres.url(None)) as connection:
        assert connection.execute(
            "SELECT rolpassword ~ '^SCRAM-SHA-256' FROM pg_authid WHERE rolname = current_user"
        ).fetchone() == (True,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(postgres.url(None).replace(secret, "wrong"))


def test_the_password_is_in_no_repr_and_on_no_command_line(postgres: EmbeddedPostgres) -> None:
    secret = secret_of(postgres)
    assert secret not in repr(postgres)
    assert repr(postgres) == f"<EmbeddedPostgres {postgres.version} on 127.0.0.1:{postgres.port}, running>"
    lines = [entry / "cmdline" for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    shown = [path.read_bytes() for path in lines if path.exists()]
    assert not [line for line in shown if secret.encode() in line]


def test_a_failing_statement_tells_its_sqlstate_and_no_value(postgres: EmbeddedPostgres) -> None:
    with pytest.raises(EmbeddedError, match="SQLSTATE 22P02") as caught:
        postgres.sql("SELECT 'hush-hush'::int")
    assert "hush" not in str(caught.value)


def test_every_option_of_the_server_can_be_set_but_its_address(postgres: EmbeddedPostgres) -> None:
    assert postgres.sql("SHOW max_connections") == [("200",)]
    assert postgres.sql("SHOW fsync") == [("off",)]
    for name in ("port", "listen_addresses", "Unix_Socket_Directories", "no good", "x\0"):
        with pytest.raises(EmbeddedError, match=re.escape(repr(name))):
            EmbeddedPostgres(settings={name: "1"})
    with pytest.raises(EmbeddedError, match="65535"):
        EmbeddedPostgres(port=0)


def test_what_needs_a_started_server_says_so() -> None:
    idle = EmbeddedPostgres()
    assert repr(idle) == "<EmbeddedPostgres, not running>"
    idle.stop()
    for ask in (lambda: idle.port, idle.url, lambda: idle.pid, lambda: idle.version, idle.crash, idle.freeze):
        with pytest.raises(EmbeddedError, match=r"not running|not been started"):
            ask()


def test_a_database_is_created_from_a_template_and_dropped_with_its_guests(
    postgres: EmbeddedPostgres,
) -> None:
    postgres.create_database('the "first"')
    postgres.sql("CREATE TABLE t AS SELECT 7 AS n", database='the "first"')
    postgres.create_database("second", template='the "first"')
    assert postgres.sql("TABLE t", database="second") == [("7",)]
    guest = psycopg.connect(postgres.url(None, 'the "first"'))
    for name in ('the "first"', "second", "never there"):
        postgres.drop_database(name)
    with pytest.raises(psycopg.OperationalError):
        guest.execute("SELECT 1")
    guest.close()
    names = {name for (name,) in postgres.sql("SELECT datname FROM pg_database")}
    assert not names & {'the "first"', "second"}


@pytest.mark.anyio
async def test_it_is_an_async_context_manager_too() -> None:
    async with EmbeddedPostgres() as postgres:
        connection = await raw_connect(postgres.url(None))
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
        pid = postgres.pid
    assert not lives(pid)


@pytest.mark.anyio
async def test_a_cancelled_start_leaves_no_server() -> None:
    before = servers_of_ours()
    postgres = EmbeddedPostgres()
    starting = asyncio.create_task(postgres.__aenter__())
    while not (servers_of_ours() - before):  # noqa: ASYNC110  # initdb, a process, is what is waited for
        await asyncio.sleep(0.005)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    stopping = [thread for thread in threading.enumerate() if thread.name == "stanch-embedded-stop"]
    for thread in stopping:
        await asyncio.to_thread(thread.join, PATIENCE)
    assert stopping
    assert not postgres.is_running
    assert servers_of_ours() == before


# Where the programs come from -----------------------------------------------------------------------------


@needs("postgresql")
def test_without_the_wheel_an_installed_server_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "WHEEL", "no_such_wheel")
    with EmbeddedPostgres() as postgres:
        assert postgres.bin_dir in set(binaries.installed())
        assert postgres.sql("SELECT 1") == [("1",)]


def test_with_no_server_at_all_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "candidates", lambda: iter(()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    postgres = EmbeddedPostgres()
    with pytest.raises(EmbeddedUnavailable, match="no PostgreSQL was found") as caught:
        postgres.start()
    assert isinstance(caught.value, StanchError)
    assert caught.value.error_code == "embedded"
    assert "pip install 'stanch[embedded]'" in str(caught.value)
    assert "apt install postgresql" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs("postgresql")
def test_data_of_another_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    place = tmp_path / "data"
    with EmbeddedPostgres(data_dir=place) as postgres:
        version = postgres.version
    older = Path(path_of("postgresql"))
    with pytest.raises(
        EmbeddedUnavailable, match=rf"of PostgreSQL {version.split('.')[0]}, which was not found"
    ):
        EmbeddedPostgres(data_dir=place, bin_dir=older).start()


@needs("root")
def test_root_copies_programs_that_the_server_cannot_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = binaries.find()
    if found.libs is None:
        pytest.fail("this test needs the wheel, which is in the test requirements")
    with tempfile.TemporaryDirectory() as private, tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)
        hidden = Path(private, "site", binaries.WHEEL)
        hidden.mkdir(parents=True)
        (hidden / "pginstall18").symlink_to(found.bin_dir.parent)
        install = hidden / "pginstall18"

        def enters(self: Account, path: Path) -> bool:
            return hidden not in path.parents

        def nearby(account: Account | None) -> Path:
            return Path(shared)

        monkeypatch.setattr("stanch.embedded.processes.Account.enters", enters)
        monkeypatch.setattr(binaries, "temporary_folder", nearby)
        monkeypatch.setattr(binaries, "candidates", lambda: iter([(install / "bin", found.libs)]))

        with EmbeddedPostgres() as postgres:
            copy = postgres.bin_dir
            assert Path(shared) in copy.parents
            assert postgres.sql("SELECT 1") == [("1",)]
            first = (copy / "postgres").stat()
        with EmbeddedPostgres() as postgres:
            assert (postgres.bin_dir / "postgres").stat().st_ino == first.st_ino, "copied again"
        (copy / "psql").unlink()  # as a cleaner of temporary folders would
        with EmbeddedPostgres() as postgres:
            assert postgres.sql("SELECT 1") == [("1",)]
        assert [entry.name for entry in Path(shared).iterdir()] == [copy.parents[2].name]
        copy.parents[2].chmod(0o777)
        with pytest.raises(EmbeddedError, match="belongs to somebody else"):
            EmbeddedPostgres().start()


@needs("root")
def test_roots_server_does_not_run_as_root(postgres: EmbeddedPostgres) -> None:
    family = [postgres.pid, *(child.pid for child in children_of(postgres.pid))]
    owners = {Path(f"/proc/{pid}").stat().st_uid for pid in family}
    assert owners == {postgres.data_dir.stat().st_uid}
    assert 0 not in owners


def test_its_files_can_be_read_by_nobody_else(postgres: EmbeddedPostgres) -> None:
    for path in (postgres.data_dir, postgres.data_dir / "stanch.secret", postgres.log_path):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path.name


# What it refuses ------------------------------------------------------------------------------------------


def test_a_directory_with_other_things_in_it_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear diary")
    with pytest.raises(EmbeddedError, match="is not empty; nothing in it was touched"):
        EmbeddedPostgres(data_dir=tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_the_data_of_another_server_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "PG_VERSION").write_text("18\n")
    with pytest.raises(EmbeddedError, match="is the data directory of another PostgreSQL server"):
        EmbeddedPostgres(data_dir=tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["PG_VERSION"]


def test_a_directory_in_use_is_refused_and_its_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDOVER_TIMEOUT", 0.2)
    with EmbeddedPostgres(data_dir=tmp_path / "data") as first:
        second = EmbeddedPostgres(data_dir=tmp_path / "data")
        with pytest.raises(EmbeddedError, match="Another server uses this data directory"):
            second.start()
        assert (first.data_dir / "postmaster.pid").exists()
        assert first.sql("SELECT 1") == [("1",)]
        assert not second.is_running


def test_a_taken_port_is_refused_if_it_was_named_and_avoided_if_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as squatter:
        taken = int(squatter.getsockname()[1])
        with pytest.raises(
            EmbeddedError, match=rf"(?s)on port {taken} ended.*Somebody else has the port"
        ) as caught:
            EmbeddedPostgres(port=taken).start()
        assert "could not bind" in str(caught.value)
        ports = iter([taken, taken, free_port()])
        monkeypatch.setattr(server, "free_port", lambda: next(ports))
        with EmbeddedPostgres() as postgres:
            assert postgres.port != taken
            assert postgres.sql("SELECT 1") == [("1",)]


def test_a_server_that_does_not_start_shows_the_end_of_its_log_without_the_password() -> None:
    postgres = EmbeddedPostgres(settings={"shared_buffers": "a lot"})
    with pytest.raises(EmbeddedError, match=r'FATAL:.*shared_buffers": "a lot"') as caught:
        postgres.start()
    assert "stanch explain embedded" in str(caught.value)
    assert not postgres.is_running


# Torments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_keeps_port_and_data(own: EmbeddedPostgres, mode: str) -> None:
    port, pid = own.port, own.pid
    own.sql("INSERT INTO marks VALUES (1)")
    own.restart("fast" if mode == "fast" else "immediate")
    assert own.port == port
    assert own.pid != pid
    assert own.sql("TABLE marks") == [("1",)]
    recovered = "not properly shut down" in own.log_path.read_text().rpartition("starting PostgreSQL")[2]
    assert recovered == (mode == "immediate")


def test_a_durable_server_that_crashes_has_every_acknowledged_row_when_it_is_back(
    own: EmbeddedPostgres,
) -> None:
    port, acknowledged = own.port, 0
    with psycopg.connect(own.url(None), autocommit=True) as writer:
        family = [own.pid, *(child.pid for child in children_of(own.pid))]
        for n in range(50):
            writer.execute("INSERT INTO marks VALUES (%s)", [n])
            acknowledged += 1
        own.crash()
        assert not own.is_running
        assert not [pid for pid in family if lives(pid)]
        with pytest.raises(psycopg.OperationalError):
            writer.execute("INSERT INTO marks VALUES (999)")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    own.start()
    assert own.port == port
    assert own.sql("SELECT count(*), max(n) FROM marks") == [(str(acknowledged), "49")]


def test_after_sigkill_of_the_postmaster_alone_the_next_start_waits_for_its_children(
    own: EmbeddedPostgres,
) -> None:
    busy = psycopg.connect(own.url(None), autocommit=True)
    children = [child.pid for child in children_of(own.pid)]
    assert len(children) > 3
    own.kill(signal.SIGKILL)
    assert not own.is_running
    own.start()
    assert not [pid for pid in children if lives(pid)]
    assert own.sql("SELECT 1") == [("1",)]
    busy.close()


def test_a_killed_backend_takes_all_sessions_with_it_and_the_server_comes_back(own: EmbeddedPostgres) -> None:
    with psycopg.connect(own.url(None)) as one, psycopg.connect(own.url(None)) as two:
        pids = {one.info.backend_pid, two.info.backend_pid}
        assert pids <= set(own.backend_pids())
        own.kill_backend(one.info.backend_pid)
        for connection in (one, two):
            with pytest.raises(psycopg.OperationalError):
                eventually(lambda c=connection: c.execute("SELECT 1") and False, "the session ends")  # type: ignore[misc]  # a default argument binds early
    own.wait_until_ready()
    assert own.sql("SELECT 1") == [("1",)]
    assert not pids & set(own.backend_pids())
    with pytest.raises(EmbeddedError, match="none of this server's"):
        own.kill_backend(os.getpid())


def test_a_frozen_server_accepts_connections_and_answers_after_the_thaw(own: EmbeddedPostgres) -> None:
    with psycopg.connect(own.url(None), autocommit=True) as connection:
        own.freeze()
        assert connection.info.backend_pid in own.backend_pids()
        assert {look_at(pid).state for pid in (own.pid, *own.backend_pids()) if look_at(pid)} == {"T"}  # type: ignore[union-attr]  # looked at twice
        with socket.create_connection(("127.0.0.1", own.port), timeout=PATIENCE) as line:
            line.settimeout(0.3)
            line.sendall(b"\x00\x00\x00\x08\x04\xd2\x16\x2f")  # SSLRequest
            with pytest.raises(TimeoutError):
                line.recv(1)
            own.thaw()
            line.settimeout(PATIENCE)
            assert line.recv(1) in b"NS"
        assert connection.execute("SELECT 1").fetchone() == (1,)
    own.thaw()


def test_a_frozen_server_can_be_stopped_and_crashed(own: EmbeddedPostgres) -> None:
    own.freeze()
    with pytest.raises(EmbeddedError, match="frozen already"):
        own.freeze()
    own.crash()
    own.start()
    own.freeze()
    own.restart("immediate")
    assert own.sql("SELECT 1") == [("1",)]


# It never outlives its parent -----------------------------------------------------------------------------


def parent(body: str, *arguments: str) -> subprocess.Popen[str]:
    """Another Python process that runs *body*, whose output can be read line by line."""
    code = "import os, sys, threading\nfrom stanch.embedded import EmbeddedPostgres\n" + textwrap.dedent(body)
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


def numbers(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_it_dies_with_its_parent_also_when_that_is_killed(tmp_path: Path, frozen: bool) -> None:
    """It was started in a thread that has ended; only the end of the process may end it."""
    killed = parent(
        """
        postgres = EmbeddedPostgres(data_dir=__import__("pathlib").Path(sys.argv[1]))
        starter = threading.Thread(target=postgres.start)
        starter.start()
        starter.join()
        assert postgres.sql("CREATE TABLE t AS SELECT 5 AS n") == []
        children = [process.pid for process in postgres._running().children()]
        if sys.argv[2] == "True":
            postgres.freeze()
        print(postgres.pid, *children, flush=True)
        sys.stdin.read()
        """,
        str(tmp_path / "data"),
        str(frozen),
    )
    with killed:
        # The backend that served the statement may have ended since it was counted.
        family = [pid for pid in numbers(killed) if lives(pid)]
        assert len(family) > 3
        killed.kill()
    eventually(lambda: not [pid for pid in family if lives(pid)], "the server is gone")
    with EmbeddedPostgres(data_dir=tmp_path / "data") as postgres:
        assert postgres.sql("TABLE t") == [("5",)]


def test_it_ends_with_an_interpreter_that_forgot_to_stop_it() -> None:
    with parent(
        "postgres = EmbeddedPostgres().start(); print(postgres.pid); print(postgres.data_dir)"
    ) as forgetful:
        (pid,) = numbers(forgetful)
        assert forgetful.stdout is not None
        place = Path(forgetful.stdout.readline().strip())
        assert forgetful.wait(PATIENCE) == 0
    assert not lives(pid)
    assert not place.exists()


def test_a_forked_child_leaves_the_server_to_its_parent() -> None:
    body = """
    postgres = EmbeddedPostgres().start()
    if os.fork() == 0:
        postgres.stop()
        sys.exit()
    os.wait()
    print(postgres.sql("SELECT 42")[0][0], flush=True)
    """
    with parent(body) as forking:
        assert numbers(forking) == [42]
        assert forking.stdin is not None
        forking.stdin.close()
        assert forking.wait(PATIENCE) == 0


def test_what_a_killed_parent_left_behind_is_swept_up_later() -> None:
    with parent(
        "postgres = EmbeddedPostgres().start(); print(postgres.data_dir, flush=True); input()"
    ) as killed:
        assert killed.stdout is not None
        base = Path(killed.stdout.readline().strip()).parent
        home.sweep()
        assert base.exists(), "it is in use"
        killed.kill()
    eventually(lambda: not (base / "data" / "postmaster.pid").exists(), "its server is gone")
    home.sweep()
    assert base.exists(), "too young: another process may just be making it"
    old = time.time() - 3600
    os.utime(base, (old, old))
    home.sweep()
    assert not base.exists()
