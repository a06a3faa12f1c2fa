"""What the bench measures with: servers that end with their parent, clients that see all, and a wire that is late."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench import shop
from bench.cases import rates
from bench.cases.case import Ground, Scale
from bench.cases.rates import CASE, Pace, Scene
from bench.children import Child, ChildFailed
from bench.load import Client, Crowd, Load, requests_of
from bench.served import serving_subject
from bench.shop import Kind
from bench.subjects import SUBJECTS, Setting
from bench.wire import OWN, SOON, Wire

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
    from typing import Any

    from fastapi import FastAPI

    from stanch.embedded import EmbeddedPostgres

ROOT = Path(__file__).parent.parent
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.01)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.asynccontextmanager
async def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
) -> AsyncGenerator[int]:
    """A server whose connections have ended when it is left."""
    handling: set[asyncio.Task[None] | None] = set()

    async def watched(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.add(asyncio.current_task())
        try:
            await handle(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(watched, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        async with asyncio.timeout(20):
            await asyncio.gather(*(task for task in handling if task is not None))


# The wire ---------------------------------------------------------------------------------------------------


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while said := await reader.read(65_536):
        writer.write(said)


@pytest.fixture
async def echo(anyio_backend: str) -> AsyncIterator[int]:
    async with listening(_echo) as port:
        yield port


@pytest.mark.anyio
async def test_no_round_trip_is_shorter_than_the_wire_and_every_message_is_counted(echo: int) -> None:
    delay = 0.002
    took: list[float] = []

    async def ping(port: int, times: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(times):
            word = f"{number:8}".encode()
            began = time.perf_counter()
            writer.write(word)
            assert await reader.readexactly(len(word)) == word
            took.append(time.perf_counter() - began)
        writer.close()

    with Wire(echo) as wire:
        wire.delay(delay)
        before = wire.spent()
        async with asyncio.timeout(30), asyncio.TaskGroup() as clients:
            for _ in range(32):
                clients.create_task(ping(wire.port, 5))
        spent = wire.spent()
    assert len(took) == 32 * 5
    assert min(took) >= delay - OWN - SOON
    assert spent.messages - before.messages == 2 * len(took)
    assert spent.cpu > before.cpu


@pytest.mark.anyio
async def test_a_shorter_wire_overtakes_nothing_and_an_end_is_handed_on(echo: int) -> None:
    with Wire(echo) as wire:
        wire.delay(600.0)
        reader, writer = await asyncio.open_connection("127.0.0.1", wire.port)
        writer.write(b"late")
        await until(lambda: wire.spent().messages == 2)  # its answer is on its way
        async with asyncio.timeout(20):
            wire.delay(0.0)
            writer.write(b"soon")
            assert await reader.readexactly(8) == b"latesoon"
            # more than the buffers of two sockets hold, and nobody reads meanwhile
            flood = b"x" * 8_000_000
            writer.write(flood)
            assert await reader.readexactly(len(flood)) == flood
            writer.write_eof()
            assert await reader.read() == b""
        writer.close()


# Children ---------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
async def test_a_child_ends_with_its_parent() -> None:
    program = """
        from bench.wire import Wire
        if __name__ == "__main__":
            with Wire(9) as wire:
                print(wire._child.pid, flush=True)
                input()
    """
    parent = subprocess.Popen(  # noqa: ASYNC220  # nothing else is done meanwhile
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_there(child)
    parent.kill()
    parent.communicate()
    await until(lambda: not is_there(child))


def _with_more(app: FastAPI) -> None:
    @app.get("/pid")
    async def pid() -> int:
        return os.getpid()


@pytest.mark.anyio
@pytest.mark.slow
async def test_workers_share_a_socket_are_prepared_and_tell_what_they_cost() -> None:
    with serving_subject(SUBJECTS["bare"], Setting("unused"), workers=2, prepared=_with_more) as served:
        assert len(set(served.pids)) == 2
        before = served.cpu()
        async with Crowd(served.port, 8) as crowd:
            load = await crowd.closed_loop(requests_of("/pid"), seconds=0.1)
        assert len(load.good) == len(load.answers) > 0
        assert served.cpu() > before
    await until(lambda: not any(map(is_there, served.pids)))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", served.port))


def test_a_child_that_does_not_get_ready_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    child = Child("the wire to nowhere", math.sqrt)
    with pytest.raises(ChildFailed, match="the wire to nowhere has ended with 1"):
        child.ready()
    with pytest.raises(ChildFailed, match="the wire to nowhere has ended"):
        child.ask("anything")
    child.end()
    assert "TypeError" in capfd.readouterr().err


# Clients ----------------------------------------------------------------------------------------------------


async def load_of(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
    *,
    seconds: float = 0.1,
    patience: float = 30.0,
) -> tuple[Load, set[bytes]]:
    """Three clients in a closed loop; and the first lines of all requests."""
    asked: set[bytes] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing() and (head := await _head(reader)):
            asked.add(head.split(b"\r\n")[0])
            await serve(reader, writer)

    async with listening(handle) as port, asyncio.timeout(20), Crowd(port, 3) as crowd:
        load = await crowd.closed_loop(requests_of(Kind.READ.ask), seconds=seconds, patience=patience)
    return load, asked


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, OSError):
        return b""


@pytest.mark.anyio
async def test_clients_ask_for_row_after_row_and_read_replies_that_come_in_pieces() -> None:
    async def in_pieces(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in (REPLY[:12], REPLY[12:-1], REPLY[-1:]):
            writer.write(piece)
            await asyncio.sleep(0)

    load, asked = await load_of(in_pieces)
    assert {answer.status for answer in load.answers} == {200}
    assert len(load.answers) >= 3
    assert b"GET /items/1 HTTP/1.1" in asked
    assert len(asked) == min(shop.ROWS, len(load.answers))
    assert load.seconds >= max(load.good)


@pytest.mark.anyio
async def test_a_lost_connection_is_a_failure_and_its_client_comes_again() -> None:
    served = 0

    async def every_third_is_lost(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        if served % 3:
            writer.write(REPLY)
        else:
            writer.close()

    load, _ = await load_of(every_third_is_lost)
    statuses = [answer.status for answer in load.answers]
    assert statuses.count(0) == served // 3 > 0
    assert statuses.count(200) == served - served // 3 == len(load.good)


@pytest.mark.anyio
async def test_who_is_never_answered_leaves_when_its_patience_is_over() -> None:
    async def silent(_: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        return

    load, _ = await load_of(silent, seconds=0.05, patience=0.1)
    assert [answer.status for answer in load.answers] == [0, 0, 0]
    assert all(answer.took >= 0.1 for answer in load.answers)


@pytest.mark.anyio
async def test_clients_that_are_stopped_while_they_wait_just_leave() -> None:
    asked = asyncio.Event()

    async def silent(_: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        asked.set()

    load = asyncio.create_task(load_of(silent, seconds=60.0))
    await asked.wait()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load


@pytest.mark.anyio
async def test_a_single_client_sees_a_refusal_and_an_end() -> None:
    refusal = REPLY.replace(b"200 OK\r\n", b"503 Busy\r\nx-told-after: 0.25\r\n")

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _head(reader)
        writer.write(refusal)
        await _head(reader)

    async with listening(once) as port:
        client = Client(port)
        refused = await client.get("/", timeout=20)
        assert (refused.status, refused.told_after) == (503, 0.25)
        assert (await client.get("/", timeout=20)).status == 0
        client.close()


# The case ---------------------------------------------------------------------------------------------------


def _short(_scene: Scene, _scale: Scale) -> Pace:
    return Pace(2, 0.05)


@pytest.mark.slow
def test_the_rates_of_a_subject_beyond_the_wire(
    postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(Kind.BARE, 0.5, 2, 1)
    monkeypatch.setattr(rates, "QUICK", (scene,))
    monkeypatch.setattr(rates, "WARMING", 0.02)
    monkeypatch.setattr(Scene, "pace", _short)
    ground = Ground(postgres, [SUBJECTS["bare"]], Scale.QUICK, lambda _: None)
    figures = {figure.quantity: figure for figure in CASE.run(ground)}
    assert figures.keys() >= {"requests", "cpu", "p50", "failed"}
    assert figures["failed"].rounds == (0.0, 0.0)
    assert all(figure.where == scene.where and figure.case == CASE.name for figure in figures.values())
    assert min(*figures["requests"].rounds, *figures["cpu"].rounds) > 0
    assert CASE.seconds(ground) > 0
