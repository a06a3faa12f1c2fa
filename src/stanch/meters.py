"""Who is told of each measurable step, on the hot path: by default nobody, and that costs one call of an empty method.

Events (``events.py``) are rare and worth a sentence; steps are frequent and worth a number. A meter is called where the
step ends, must not block, await or raise, and never learns a value of a parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from stanch.accounts import Account
    from stanch.callers import Place
    from stanch.ledger import Checkout

WaitEnd = Literal["served", "timeout", "refused", "unavailable", "cancelled"]
"""How a wait for a connection ended.

*refused* came early, by ``max_waiting`` or the queue's own time; *unavailable*: the server could not be reached.
"""

UnitEnd = Literal["committed", "rolled back", "read", "unknown"]
"""How a transaction ended; *read* were statements that stood alone."""


class Meter:
    """Measures nothing: the null object, and the base of all that do. Times are in seconds."""

    __slots__ = ()

    def opened(self, seconds: float) -> None:
        """A connection was opened and ready for use after *seconds*."""

    def waited(self, seconds: float, end: WaitEnd, account: Account | None) -> None:
        """A caller has waited *seconds* for a connection. Who did not have to wait is told as 0.0 and ``served``."""

    def taken(self, checkout: Checkout) -> None:
        """A connection has gone out."""

    def returned(self, checkout: Checkout, held: float) -> None:
        """It has come back, or was reclaimed, after *held* seconds."""

    def executing(self, checkout: Checkout | None) -> None:
        """A statement is about to be sent."""

    def executed(
        self,
        statement: str,
        seconds: float,
        checkout: Checkout | None,
        place: Callable[[], Place],
        error: BaseException | None,
    ) -> None:
        """*statement* (its text, with its literals) has ended. *place* finds the line, if asked."""

    def began(self, account: Account) -> None:
        """A unit of work was opened."""

    def ended(self, account: Account, outcome: UnitEnd) -> None:
        """A transaction of a unit has ended, or the reads of one."""

    def closed(self, account: Account) -> None:
        """A unit of work is over: what *account* says is final."""


class Meters(Meter):
    """Several meters as one: each is told in turn."""

    __slots__ = ("_meters",)

    def __init__(self, *meters: Meter) -> None:
        self._meters = meters

    def opened(self, seconds: float) -> None:
        for meter in self._meters:
            meter.opened(seconds)

    def waited(self, seconds: float, end: WaitEnd, account: Account | None) -> None:
        for meter in self._meters:
            meter.waited(seconds, end, account)

    def taken(self, checkout: Checkout) -> None:
        for meter in self._meters:
            meter.taken(checkout)

    def returned(self, checkout: Checkout, held: float) -> None:
        for meter in self._meters:
            meter.returned(checkout, held)

    def executing(self, checkout: Checkout | None) -> None:
        for meter in self._meters:
            meter.executing(checkout)

    def executed(
        self,
        statement: str,
        seconds: float,
        checkout: Checkout | None,
        place: Callable[[], Place],
        error: BaseException | None,
    ) -> None:
        for meter in self._meters:
            meter.executed(statement, seconds, checkout, place, error)

    def began(self, account: Account) -> None:
        for meter in self._meters:
            meter.began(account)

    def ended(self, account: Account, outcome: UnitEnd) -> None:
        for meter in self._meters:
            meter.ended(account, outcome)

    def closed(self, account: Account) -> None:
        for meter in self._meters:
            meter.closed(account)


NOBODY: Final = Meter()
"""Measures nothing."""


class Instruments:
    """The meter in force for one database: what the pool, the statements and the sessions tell their steps.

    >>> instruments = Instruments()
    >>> instruments.meter is NOBODY
    True
    >>> take_off = instruments.add(mine := Meter())
    >>> instruments.meter is mine
    True
    >>> take_off()
    >>> instruments.meter is NOBODY
    True
    """

    __slots__ = ("_meters", "_preparing", "meter")

    def __init__(self) -> None:
        self._meters: list[Meter] = []
        self._preparing: list[Callable[[], None]] = []
        self.meter: Meter = NOBODY

    def prepare(self, prepare: Callable[[], None]) -> None:
        """Call *prepare* before the first meter is told of anything: what nobody measures need not be timed."""
        if self._meters:
            prepare()
        else:
            self._preparing.append(prepare)

    def add(self, meter: Meter) -> Callable[[], None]:
        """Tell *meter* as well from now on, until the function is called that this gives."""
        while self._preparing:
            self._preparing.pop()()
        self._tell([*self._meters, meter])
        return lambda: self._tell([other for other in self._meters if other is not meter])

    def _tell(self, meters: list[Meter]) -> None:
        self._meters = meters
        match meters:
            case []:
                self.meter = NOBODY
            case [meter]:
                self.meter = meter
            case _:
                self.meter = Meters(*meters)
