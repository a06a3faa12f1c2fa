"""Severs the connection in hand when its deadline passes.

Cutting the socket, not cancelling the task, is what ends a wait here: the code that waits then gets an
ordinary disconnect error that it can name, and no driver can swallow it. The operation itself is never
abandoned halfway.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.util import await_only, greenlet_spawn

from stanch.completion import is_out_of_reach, run_to_completion
from stanch.errors import DeadlinePassed

if TYPE_CHECKING:
    from collections.abc import Callable

    from stanch.drivers import Driver

T = TypeVar("T")


def undisturbed(call: Callable[..., T], *arguments: Any) -> T:
    """``call(*arguments)`` to its end; a cancellation that came meanwhile is raised afterwards.

    For code that runs under SQLAlchemy's greenlet; *call* runs under it as well, and must end by itself.
    """
    if is_out_of_reach():
        return call(*arguments)
    result: T = await_only(run_to_completion(greenlet_spawn(call, *arguments)))
    return result


class Watch:
    """Runs one blocking-style driver call within a timeout, out of reach of any cancellation.

    For code that runs under SQLAlchemy's greenlet.
    """

    __slots__ = ("_driver",)

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def run(self, call: Callable[..., T], *arguments: Any, connection: Any, timeout: float, what: str) -> T:
        """``call(*arguments)``, during which the driver's *connection* is severed after *timeout* seconds.

        Raises ``DeadlinePassed``, naming *what* took too long, if the call failed because of that; what it raised
        itself is the ``__cause__``. If it still succeeded, the result counts. A cancellation that came meanwhile is
        raised once the call is over.
        """
        result: T = undisturbed(_Severing(self._driver, connection).run, timeout, what, call, *arguments)
        return result

    def run_undisturbed(
        self, call: Callable[..., T], *arguments: Any, connection: Any, timeout: float, what: str
    ) -> T:
        """As ``run()``, for what is ``undisturbed`` already."""
        return _Severing(self._driver, connection).run(timeout, what, call, *arguments)


class _Severing:
    """The end of one call's *connection*, if it takes too long."""

    __slots__ = ("_connection", "_driver", "_is_done")

    def __init__(self, driver: Driver, connection: Any) -> None:
        self._driver = driver
        self._connection = connection
        self._is_done = False

    def run(self, timeout: float, what: str, call: Callable[..., T], *arguments: Any) -> T:
        alarm = asyncio.get_running_loop().call_later(timeout, self._sever)
        try:
            return call(*arguments)
        except Exception as error:
            if self._is_done:
                raise DeadlinePassed(
                    f"{what} took longer than {timeout:.2f} s; its connection was severed",
                    remedies=[
                        "See what the server is doing: select * from pg_stat_activity where state <> 'idle'.",
                        "Check the network between the app and the server; a silent peer looks just like this.",
                    ],
                ) from error
            raise
        finally:
            alarm.cancel()

    def _sever(self) -> None:
        self._is_done = True
        self._driver.sever(self._connection)
