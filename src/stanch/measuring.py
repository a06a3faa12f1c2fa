"""Measures a database in this process: how long is waited and held, which routes and statements cost what.

One ``Measuring`` serves whoever shows numbers (the metrics endpoint, the page, the terminal): they read its
``snapshot()`` and count nothing themselves. What is in use, idle and waiting *now* is the ledger's to say. Loaded only
when somebody asks for numbers. Times are in seconds; no value of a parameter and no literal of a statement is kept.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, Any, Final, get_args

from stanch.events import ConnectionLeaked, Event, LeakReturned, SessionDropped
from stanch.ledger import Stats
from stanch.meters import Meter, WaitEnd
from stanch.sqltext import shape_of
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from stanch.accounts import Account
    from stanch.callers import Place
    from stanch.ledger import Checkout
    from stanch.meters import UnitEnd

BOUNDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds of the histograms' buckets; what is longer is counted in one bucket more, without a bound."""

_ROUTES: Final = 500
_SHAPES: Final = 500
OTHERS: Final = "(others)"
"""On whose account the rest goes where more routes or statements came than are told apart."""

DROPPED: Final = "dropped unclosed"
"""The kind of a leak that nobody could have returned any more."""

NO_ROUTE: Final = "(no unit)"
"""The route of what was asked of the pool outside any unit of work."""


class Distribution(Value):
    """How often something took how long: a histogram over ``BOUNDS``.

    >>> distribution = Distribution(count=3, total=0.6, buckets=(0,) * 7 + (2, 1) + (0,) * 8)
    >>> distribution.quantile(0.5)
    0.1
    """

    count: int
    total: float
    buckets: tuple[int, ...]
    """How many fell into each bucket, the last for what is longer than every bound; not cumulated."""

    def quantile(self, share: float) -> float | None:
        """The upper bound of the bucket in which the *share* (0 to 1) of all lies; None where nothing was counted.

        What is beyond the last bound is told as that bound.
        """
        if not self.count:
            return None
        rank, seen = share * self.count, 0
        for bound, hits in zip(BOUNDS, self.buckets, strict=False):
            seen += hits
            if seen >= rank:
                return bound
        return BOUNDS[-1]

    def since(self, earlier: Distribution) -> Distribution:
        """What has come to this distribution since it was *earlier*.

        >>> hour = Distribution(count=9, total=9.0, buckets=(1,) * 8 + (0,) * 8 + (1,))
        >>> hour.since(hour).count
        0
        """
        return Distribution(
            self.count - earlier.count,
            self.total - earlier.total,
            tuple(now - then for now, then in zip(self.buckets, earlier.buckets, strict=True)),
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON, with the quantiles that people ask for."""
        quantiles = {f"p{share}": self.quantile(share / 100) for share in (50, 90, 99)}
        return {"count": self.count, "total": self.total, **quantiles, "buckets": list(self.buckets)}


class Holding(Value):
    """A connection that is out at the moment of a snapshot."""

    holder: str
    """The route, or who else."""
    place: str
    """The line of user code that took it."""
    now_at: str
    """Where the holder's task stands now, in words."""
    held: float
    sql_time: float
    statements: int
    state: str
    """``running SQL``, ``in use, no SQL running`` or ``its task is gone``."""
    task: str = ""
    """The name of its task, where somebody has given it one."""


class RouteTotals(Value):
    """What one route has cost since the start."""

    route: str
    units: int
    statements: int
    sql_time: float
    waited: float
    held: float
    rolled_back: int
    repeated: int
    """Units in which one statement came suspiciously often; see ``repeated_statement``."""


class StatementTotals(Value):
    """What one shape of statement has cost since the start."""

    shape: str
    count: int
    total: float
    longest: float
    errors: int
    place: str
    """The line of user code of the slowest one."""


class Leak(Value):
    """A connection that was out for longer than ``leak_after``."""

    at: float
    """When it was reported; wall clock, seconds since the epoch, for people to read."""
    holder: str
    place: str
    now_at: str
    kind: str
    """As ``ConnectionLeaked`` tells it, or ``dropped unclosed`` if it did not come back but was reclaimed."""
    held: float
    returned: bool
    """Whether its place in the pool is free again."""


class Snapshot(Value):
    """All numbers of one database in this process, at one moment."""

    database: str
    pid: int
    at: float
    """Wall clock, seconds since the epoch, for people to read."""
    started: float
    """When measuring began; wall clock."""
    stats: Stats
    holders: tuple[Holding, ...]
    """Longest held first."""
    waits: Distribution
    uses: Distribution
    """From checkout to checkin."""
    creates: Distribution
    """How long opening a connection took."""
    wait_ends: Mapping[str, int]
    """How many waits ended how: see ``stanch.meters.WaitEnd``."""
    routes: tuple[RouteTotals, ...]
    """Those that held connections for longest first."""
    statements: tuple[StatementTotals, ...]
    """Those that ran for longest, all together, first."""
    leaks: tuple[Leak, ...]
    """The latest first."""
    unit_ends: Mapping[str, int]
    """How many transactions were committed, rolled back, only read, or ended unknown."""
    event_counts: Mapping[str, int]
    """How often each kind of event was told, by the name of its class; 0 for what has not happened yet."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON; quantiles of the distributions included."""
        return {name: _plain(getattr(self, name)) for name in self.fields()}


class _Histogram:
    __slots__ = ("buckets", "count", "total")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.count = 0
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.count += 1
        self.total += seconds

    def read(self) -> Distribution:
        return Distribution(self.count, self.total, tuple(self.buckets))


class _Route:
    __slots__ = ("held", "repeated", "rolled_back", "sql_time", "statements", "units", "waited")

    def __init__(self) -> None:
        self.units = self.statements = self.rolled_back = self.repeated = 0
        self.sql_time = self.waited = self.held = 0.0


class _Statement:
    __slots__ = ("count", "errors", "longest", "place", "total")

    def __init__(self) -> None:
        self.count = self.errors = 0
        self.total = self.longest = 0.0
        self.place = "?"


class Measuring(Meter):
    """The meter that keeps numbers. *stats* and *holders* ask the books for what is so now."""

    __slots__ = (
        "_creates",
        "_database",
        "_event_counts",
        "_holders",
        "_leaks",
        "_routes",
        "_started",
        "_statements",
        "_stats",
        "_unit_ends",
        "_uses",
        "_wait_ends",
        "_waits",
        "events",
    )  # fmt: skip

    def __init__(
        self,
        database: str,
        *,
        stats: Callable[[], Stats],
        holders: Callable[[], Iterable[Holding]],
    ) -> None:
        self._database = database
        self._stats = stats
        self._holders = holders
        self._started = time.time()
        self._waits, self._uses, self._creates = _Histogram(), _Histogram(), _Histogram()
        self._wait_ends: dict[str, int] = dict.fromkeys(get_args(WaitEnd), 0)
        self._unit_ends: dict[str, int] = {"committed": 0, "rolled back": 0, "read": 0, "unknown": 0}
        self._event_counts: dict[str, int] = {}
        self._routes: dict[str, _Route] = {}
        self._statements: dict[str, _Statement] = {}
        self._leaks: deque[Leak] = deque(maxlen=50)
        self.events: deque[tuple[int, float, Event]] = deque(maxlen=500)
        """The latest events, each with a running number and its wall-clock time; ``note`` writes them."""

    # On the hot path ------------------------------------------------------------------------------------

    def opened(self, seconds: float) -> None:
        self._creates.add(seconds)

    def waited(self, seconds: float, end: WaitEnd, account: Account | None) -> None:
        self._waits.add(seconds)
        self._wait_ends[end] += 1
        if account is None:
            self._outside().waited += seconds

    def returned(self, checkout: Checkout, held: float) -> None:
        self._uses.add(held)
        if checkout.account is None:
            route = self._outside()
            route.held += held
            route.sql_time += checkout.sql_time
            route.statements += checkout.statements

    def _outside(self) -> _Route:
        """Where everything goes that no unit pays for."""
        route = self._routes.get(NO_ROUTE)
        if route is None:
            route = self._routes[NO_ROUTE] = _Route()
        return route

    def executed(
        self,
        statement: str,
        seconds: float,
        checkout: Checkout | None,
        place: Callable[[], Place],
        error: BaseException | None,
    ) -> None:
        shape = shape_of(statement)
        totals = self._statements.get(shape)
        if totals is None:
            totals = _of(self._statements, shape, _SHAPES, _Statement)
        totals.count += 1
        totals.total += seconds
        if error is not None:
            totals.errors += 1
        if seconds > totals.longest:
            totals.longest = seconds
            totals.place = str(place())

    def ended(self, account: Account, outcome: UnitEnd) -> None:
        self._unit_ends[outcome] += 1

    def closed(self, account: Account) -> None:
        route = _of(self._routes, account.holder, _ROUTES, _Route)
        route.units += 1
        route.statements += account.statements
        route.sql_time += account.sql_time
        route.waited += account.waited
        route.held += account.held
        route.rolled_back += account.rolled_back
        route.repeated += account.repeated

    # Events ---------------------------------------------------------------------------------------------

    def note(self, event: Event) -> None:
        """Keep *event*; an observer."""
        number, at = self.events[-1][0] + 1 if self.events else 1, time.time()
        self.events.append((number, at, event))
        name = type(event).__name__
        self._event_counts[name] = self._event_counts.get(name, 0) + 1
        if isinstance(event, ConnectionLeaked):
            self._add_leak(event, at, now_at=event.now_at, kind=event.kind)
        elif isinstance(event, LeakReturned):
            self._mark_returned(event)
        elif isinstance(event, SessionDropped) and not self._mark_returned(event):
            self._add_leak(event, at, now_at="", kind=DROPPED, returned=True)

    def _add_leak(
        self,
        event: ConnectionLeaked | SessionDropped,
        at: float,
        *,
        now_at: str,
        kind: str,
        returned: bool = False,
    ) -> None:
        self._leaks.append(
            Leak(
                at=at,
                holder=event.holder,
                place=event.place,
                now_at=now_at,
                kind=kind,
                held=event.held,
                returned=returned,
            )
        )

    def _mark_returned(self, event: LeakReturned | SessionDropped) -> bool:
        """Mark the oldest leak of that holder and place that is still open. Whether there was one."""
        for index, leak in enumerate(self._leaks):
            if not leak.returned and (leak.holder, leak.place) == (event.holder, event.place):
                kind = DROPPED if isinstance(event, SessionDropped) else leak.kind
                self._leaks[index] = leak.replaced(held=event.held, returned=True, kind=kind)
                return True
        return False

    # Reading --------------------------------------------------------------------------------------------

    def totals(self) -> tuple[Distribution, Distribution, int]:
        """How long was waited and how long used since the start, and how many were not served who wanted to be.

        Cheap enough to be asked every second.
        """
        ends = self._wait_ends
        failed = ends["timeout"] + ends["refused"] + ends["unavailable"]
        return self._waits.read(), self._uses.read(), failed

    def snapshot(self) -> Snapshot:
        """All numbers of this moment; for people and scrapers, not for the hot path. Any thread may ask."""
        # Each table is copied in one step: on another thread a loop over it would meet entries that are just coming.
        return Snapshot(
            database=self._database,
            pid=os.getpid(),
            at=time.time(),
            started=self._started,
            stats=self._stats(),
            holders=tuple(self._holders()),
            waits=self._waits.read(),
            uses=self._uses.read(),
            creates=self._creates.read(),
            wait_ends=dict(self._wait_ends),
            routes=tuple(
                sorted(
                    (_totals(RouteTotals, name, each) for name, each in list(self._routes.items())),
                    key=lambda row: -row.held,
                )
            ),
            statements=tuple(
                sorted(
                    (_totals(StatementTotals, shape, each) for shape, each in list(self._statements.items())),
                    key=lambda row: -row.total,
                )
            ),
            leaks=tuple(reversed(tuple(self._leaks))),
            unit_ends=dict(self._unit_ends),
            event_counts={**dict.fromkeys(_kinds_of_events(), 0), **self._event_counts},
        )


def holding_of(checkout: Checkout, now: float) -> Holding:
    """*checkout* as it is *now*, a moment of the monotonic clock."""
    if checkout.running_since is not None:
        state = "running SQL"
    elif checkout.is_orphan:
        state = "its task is gone"
    else:
        state = "in use, no SQL running"
    return Holding(
        holder=checkout.holder,
        place=str(checkout.place),
        now_at=checkout.now_at,
        held=now - checkout.since,
        sql_time=checkout.sql_time_at(now),
        statements=checkout.statements,
        state=state,
        task=checkout.task_name,
    )


def _of(table: dict[str, Any], key: str, most: int, new: Callable[[], Any]) -> Any:
    """The entry of *key*; past *most* of them the one that stands for all others."""
    if key not in table and len(table) >= most:
        key = OTHERS
    entry = table.get(key)
    if entry is None:
        entry = table[key] = new()
    return entry


def _kinds_of_events() -> list[str]:
    """Also those that have not been told yet: a counter that begins at 1 has never been seen to rise."""
    return [kind.__name__ for kind in Event.__subclasses__() if kind.__module__ == Event.__module__]


def _totals(kind: Callable[..., Any], name: str, entry: Any) -> Any:
    return kind(name, **{field: getattr(entry, field) for field in entry.__slots__})


def _plain(value: object) -> Any:
    match value:
        case Distribution():
            return value.as_dict()
        case Stats():
            counts = {
                name: getattr(value, name)
                for name in ("in_use", "idle", "waiting", "pool_size", "max_overflow")
            }
            readers = None if value.readers is None else _plain(value.readers)
            return {
                **counts,
                "bound": value.bound,
                "size": value.size,
                "adopted": value.adopted,
                "readers": readers,
            }
        case Value():
            return {name: _plain(getattr(value, name)) for name in value.fields()}
        case tuple():
            return [_plain(each) for each in value]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  # of whatever
        case _:
            return value
