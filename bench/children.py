"""Processes beside this one: each ends with it, says when it is ready, and answers what it is asked."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from multiprocessing.connection import Connection

START_TIMEOUT: Final = 60.0
"""Seconds until a child must be ready; importing all there is takes two, on a machine with nothing else to do."""
ANSWER_TIMEOUT: Final = 30.0
"""Seconds that a child has for an answer: it may be busy with a load that has just ended."""

_spawned = multiprocessing.get_context("spawn")


class ChildFailed(RuntimeError):
    """A process did not get ready, or ended, or does not answer."""


class Child:
    """Runs ``target(*arguments, parent)`` in a new interpreter, where *parent* is the other end of a line.

    The child is deaf to Ctrl-C, which the terminal sends to all of them: who started it ends it.
    """

    def __init__(self, name: str, target: Callable[..., object], *arguments: Any) -> None:
        self.name = name
        self._line, there = _spawned.Pipe()
        self._process = _spawned.Process(target=target, args=(*arguments, there), name=name, daemon=True)
        with _deaf_to_ctrl_c():  # what is ignored stays so in a new program
            self._process.start()
        there.close()

    @property
    def pid(self) -> int:
        """The number of its process."""
        assert self._process.pid is not None
        return self._process.pid

    def ready(self) -> Any:
        """What it says first, once it can be used."""
        return self._hear(START_TIMEOUT)

    def ask(self, question: Any) -> Any:
        """Its answer to *question*."""
        return self.asked(question, ANSWER_TIMEOUT)()

    def asked(self, question: Any, timeout: float | None = None) -> Callable[[], Any]:
        """Ask *question*; its answer is waited for by what is given."""
        try:
            self._line.send(question)
        except OSError:
            raise ChildFailed(f"{self.name} has ended") from None
        return partial(self._hear, timeout)

    def end(self) -> None:
        """End it at once: a server with requests that still wait would take half a minute to end by itself."""
        self._process.kill()
        self._process.join()
        self._line.close()

    def _hear(self, timeout: float | None) -> Any:
        if not self._line.poll(timeout):
            raise ChildFailed(f"{self.name} has said nothing for {timeout:g} s")
        try:
            return self._line.recv()
        except (EOFError, OSError):
            self._process.join(1)
            raise ChildFailed(f"{self.name} has ended with {self._process.exitcode}") from None


def answer(parent: Connection, answers: Callable[[Any], Any], at_the_end: Callable[[], None]) -> None:
    """Answer the parent from a thread of its own; *at_the_end* is called when the parent is no more."""

    def talk() -> None:
        try:
            while True:
                parent.send(answers(parent.recv()))
        except (EOFError, OSError):
            pass  # the parent has ended, or has had enough
        except BaseException:  # noqa: BLE001  # it must not wait for an answer that never comes
            traceback.print_exc()
        finally:
            at_the_end()

    threading.Thread(target=talk, name="the parent", daemon=True).start()


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may choose, and only it is interrupted
        return
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard)
