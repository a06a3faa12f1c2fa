"""What a user may choose about a database, judged as a whole before anything opens.

Nothing here reads the environment, imports a driver or opens a connection. `Settings.judge` is the one judge of
settings, `judge_url` the one judge of URLs; both raise `stanch.errors.ConfigError` with everything that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from sqlalchemy.pool import NullPool, StaticPool
from typing_extensions import override

from stanch.settings.kinds import (
    MONTH,
    Choice,
    Complaint,
    Function,
    Instance,
    Kind,
    Label,
    PoolClass,
    Seconds,
    Switch,
    Whole,
    complain,
    in_words,
    judged,
    meant,
    named,
    shown,
)
from stanch.settings.url import judge_url
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.pool import Pool

__all__ = ["ENGINE_OPTIONS", "KINDS", "IsolationLevel", "Settings", "judge_url"]

IsolationLevel = Literal[
    "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"
]


class Settings(Value, kw_only=True):
    """What was chosen, and a default with a reason for all the rest. An instance is always in order.

    Every length of time is in seconds; every limit is finite. Names are those of SQLAlchemy
    (``create_async_engine``, ``AsyncSession``) and of PostgreSQL (*Client Connection Defaults*), except
    for those that only stanch has. Construction raises `ConfigError` for everything wrong at once.

    The pool:

    - ``pool_size`` = 5: connections kept for reuse; as SQLAlchemy, and small enough for four workers on a
      server with its default of 100 connections.
    - ``max_overflow`` = 10: further connections at a peak, closed afterwards; as SQLAlchemy. 0 with
      ``NullPool``, which has nothing to flow over from: there ``pool_size`` is the bound.
    - ``reader_pool_size`` = None: readers share the pool. A number gives them that many connections of their
      own, beside ``pool_size + max_overflow``, on which the server refuses writes as well: they are started with
      ``default_transaction_read_only=on``. Functions that write are refused by nobody else. Not through
      PgBouncer, which drops that parameter, and not for SQLite, where every connection can be told so.
    - ``pool_timeout`` = 5 s: how long a caller waits for a connection. SQLAlchemy's 30 s is longer than
      most clients, proxies and people wait, so the answer would reach nobody, and meanwhile queues.
    - ``queue_target`` = 0.08 s, ``queue_interval`` = 0.1 s: when callers have waited longer than the first for all
      of the second, and ever more come, newcomers are refused at once (``PoolOverloaded``, 503 with
      ``Retry-After``), until nobody had to be for ten intervals; as many as can be served within the target go on
      waiting. Without that, load beyond capacity makes everybody wait until clients have given up, and the work is
      done for nobody. 0.08 s, because with work of 0.1 s even the slowest replies then come within a quarter of a
      second, at twice and at four times the capacity; 0.1 s, because that is longer than a hiccup of the event loop.
      A burst that is being served, a crowd of constant size, and a queue of twenty or of thrice the connections
      make nobody be refused. None refuses nobody.
    - ``max_waiting`` = None: how many may wait at most; one more is refused at once, unless it is a unit of work that
      has had a connection already. None because the right number follows from the time a wait may take, which is
      bounded already; a number also bounds a burst.
    - ``pool_use_lifo`` = False: the connection that was idle for longest is taken next, so that all stay in use; as
      SQLAlchemy. True takes the one that came back last, so that a firewall or the server may end the others.
    - ``pool_recycle`` = 1800 s: a connection of that age is replaced when it is next taken, each at a moment of its own
      within the last tenth of it, so that they do not all go at once. Half an hour is within the idle time of common
      firewalls and moves the pool after a change of address or password, and costs one connect per connection and half
      hour. -1 is never.
    - ``pool_pre_ping`` = False: the pool asks the driver's socket at each checkout, which sees a closed
      connection without a round trip; a ping sees no more unless something between is silent.
    - ``ping_after`` = 30 s: a connection that was idle for longer is pinged once when it is next taken, within
      ``connect_timeout``; if it stays silent, another is opened in its place. Under load nothing idles that
      long, so it costs nothing there; and no firewall that forgets connections in silence does it sooner. -1
      is never.
    - ``poolclass`` = None: the pool is stanch's own. ``NullPool`` keeps nothing idle and stays bounded;
      ``StaticPool`` is for SQLite ``:memory:`` only.
    - ``reset`` = "flag": a connection in which a unit has left session state (SET, LISTEN, a temporary table) is
      closed when it is returned, and told as an event. "strict" cleans it instead, in one round trip.
      A connection without such state costs nothing in either.

    Who holds connections, and what they do with them:

    - ``track_holders`` = True: each checkout knows the line that took it, and how much of its time ran SQL; so
      errors, ``holdings()`` and what follows can say who. Some microseconds for each checkout and statement. False:
      they know the unit of work or the task only, and the three limits of statements and idleness below are off.
    - ``leak_after`` = 30 s: a connection that is out for longer is told as ``ConnectionLeaked``. Longer than any
      statement may take by default, and half of what the server gives an idle transaction, so that it is told while
      there still is something to see. None: nobody watches.
    - ``held_idle_after`` = 1 s: a connection that came back and had not run SQL for that long in all is told as
      ``HeldIdle``, once for each line. Python needs milliseconds between two statements; a second means that the
      holder has waited for something else. None: never.
    - ``slow_statement`` = 1 s: one that takes longer is told as ``SlowStatement``. What a person notices; there
      cannot be more of them in a second than connections. None: never.
    - ``repeated_statement`` = 10: a unit that sends one statement so many times in one transaction is told as
      ``RepeatedStatement``, once for each line. None: nobody counts.

    The session:

    - ``echo`` = False: SQL is not logged; ``"debug"`` logs rows as well.
    - ``isolation_level`` = None: what the server's own default is.
    - ``autoflush`` = True: as SQLAlchemy, a query sees what the session has pending.
    - ``expire_on_commit`` = False: an attribute read after the commit would need a query, which async code
      cannot do implicitly and the reply of a request should not wait for.

    Limits that stanch keeps:

    - ``connect_timeout`` = 5 s: one connect, all of it: name, TCP, TLS, password. asyncpg waits 60 s and
      psycopg 130 s by themselves; a loopback or a data centre needs milliseconds.
    - ``close_timeout`` = 5 s: a polite return (rollback, close); then the connection is severed.
    - ``commit_timeout`` = 30 s: the client's own bound of COMMIT. No server setting ends a
      COMMIT that waits for a synchronous standby. Long, because what it ends is *unknown*, not failed.
    - ``drain_timeout`` = 10 s: how long closing the database waits for open units; within the 30 s that
      process managers commonly give between SIGTERM and SIGKILL.
    - ``hook_timeout`` = 10 s: one callback of ``on_commit`` or ``after_rollback``. The reply waits for it, so
      what takes longer belongs to a background task or a queue.

    What is done about a COMMIT that was lost:

    - ``verify_commits`` = False: it is ``CommitUnknown``. True asks the server what became of it, on a new
      connection and for up to twice ``connect_timeout``: then it is a success, ``CommitLost``, or still unknown
      (after a crash or failover). It costs a round trip before every COMMIT of a transaction that wrote, so it
      is for those who want it. Not through PgBouncer.

    Limits that the server keeps, sent when a connection starts, in whole milliseconds. They overrule
    what ``ALTER ROLE`` says; ``None`` sends nothing and leaves the server's own setting:

    - ``application_name`` = None: what ``pg_stat_activity`` shows; nothing is sent.
    - ``statement_timeout`` = 30 s: by then the client of a web request has gone.
    - ``lock_timeout`` = 10 s: who waits longer for a lock queues behind a migration and holds others up.
      None if ``statement_timeout`` is chosen and not longer than this.
    - ``idle_in_transaction_session_timeout`` = 60 s: a forgotten transaction keeps its locks and keeps
      vacuum from its work; nothing of stanch's own idles that long.

    SQLite has no server: there stanch interrupts a statement at ``statement_timeout``, ``lock_timeout`` is
    the busy timeout (5 s if None), and the other two and ``verify_commits`` have nothing to act on.

    ``pooler="pgbouncer"`` (None): transaction pooling. Named prepared statements are not used, and none of
    the three server limits is sent: PgBouncer passes unknown start-up parameters to nobody.

    ``engine_options`` (empty): what else goes to ``create_async_engine``, ``connect_args`` among it.

    >>> Settings.judge(pool_size=20, statement_timeout=10).lock_timeout is None
    True
    >>> Settings.judge(pool_sise=20)
    Traceback (most recent call last):
    stanch.errors.ConfigError: pool_sise is not a setting (did you mean pool_size?)
      1. Remove it, or write the name of a setting as the reference has it.
      stanch explain config
    """

    pool_size: int = 5
    max_overflow: int = 10
    reader_pool_size: int | None = None
    pool_timeout: float = 5.0
    max_waiting: int | None = None
    queue_target: float | None = 0.08
    queue_interval: float = 0.1
    pool_use_lifo: bool = False
    pool_recycle: float = 1800.0
    pool_pre_ping: bool = False
    ping_after: float = 30.0
    poolclass: type[Pool] | None = None
    reset: Literal["flag", "strict"] = "flag"

    track_holders: bool = True
    leak_after: float | None = 30.0
    held_idle_after: float | None = 1.0
    slow_statement: float | None = 1.0
    repeated_statement: int | None = 10

    echo: bool | Literal["debug"] = False
    isolation_level: IsolationLevel | None = None
    autoflush: bool = True
    expire_on_commit: bool = False

    connect_timeout: float = 5.0
    close_timeout: float = 5.0
    commit_timeout: float = 30.0
    drain_timeout: float = 10.0
    hook_timeout: float = 10.0
    verify_commits: bool = False

    application_name: str | None = None
    statement_timeout: float | None = 30.0
    lock_timeout: float | None = 10.0
    idle_in_transaction_session_timeout: float | None = 60.0

    pooler: Literal["pgbouncer"] | None = None
    engine_options: Mapping[str, object] = MappingProxyType({})
    given: frozenset[str] = frozenset()
    """The names that somebody chose; the rest is default and gives way to the URL, the pooler, SQLite."""

    _unshown = frozenset({"engine_options", "given"})

    @override
    def __post_init__(self) -> None:
        chosen = {name for name in KINDS if getattr(self, name) != self._defaults[name]} | self.given
        complaints: list[Complaint] = []
        for name, kind in KINDS.items():
            self._put(name, judged(name, kind, getattr(self, name), complaints))
        options = _judged_options(self.engine_options, complaints)
        complain(complaints)  # contradictions are looked for only between values that are in order
        self._put("engine_options", MappingProxyType(options))
        self._put("given", frozenset(chosen))
        self._yield_defaults()
        complain(self._contradictions())

    @property
    def keeps_idle(self) -> bool:
        """Whether a returned connection waits for its next use, or is closed at once (``NullPool``)."""
        return self.poolclass is not NullPool

    @property
    def server_timeouts(self) -> dict[str, str]:
        """The server's limits as PostgreSQL reads them: whole milliseconds, without a unit."""
        return {name: str(round(value * 1000)) for name in _SERVER_TIMEOUTS if (value := getattr(self, name))}

    def for_readers(self) -> Settings:
        """These for the ``reader_pool_size`` connections of readers, which the server keeps from writing."""
        connect_args = dict(cast("Mapping[str, Any]", self.engine_options.get("connect_args", {})))
        connect_args["server_settings"] = {**connect_args.get("server_settings", {}), **_READ_ONLY}
        return self.replaced(
            pool_size=self.reader_pool_size or self.pool_size,
            max_overflow=0,
            reader_pool_size=None,
            verify_commits=False,
            engine_options={**self.engine_options, "connect_args": connect_args},
        )

    @classmethod
    def judge(cls, **given: object) -> Settings:
        """The settings *given*, judged one by one and together.

        Names of ``create_async_engine`` that stanch does not use itself (``hide_parameters``,
        ``connect_args``, ``json_serializer``, …) may be given here or in ``engine_options``.
        Raises `ConfigError`: which setting, what it got, what is allowed, an example; all at once.
        """
        complaints: list[Complaint] = []
        settings = {name: value for name, value in given.items() if name in KINDS}
        options = given.get("engine_options", {})
        extra = {
            name: value for name, value in given.items() if name not in KINDS and name != "engine_options"
        }
        for name in extra:
            if name not in ENGINE_OPTIONS:
                complaints.append(_stranger(name, [*KINDS, *ENGINE_OPTIONS]))
            elif isinstance(options, Mapping) and name in options:
                complaints.append(
                    Complaint(f"{name} is given twice, once in engine_options", f"Give {name} once.")
                )
        for name, value in settings.items():
            judged(name, KINDS[name], value, complaints)
        known = {name: value for name, value in extra.items() if name in ENGINE_OPTIONS}
        merged = (
            {**cast("Mapping[str, object]", options), **known} if isinstance(options, Mapping) else options
        )
        if complaints:
            _judged_options(merged, complaints)
            complain(complaints)
        return cls(**cast("Any", settings), engine_options=cast("Any", merged), given=frozenset(settings))

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> tuple[str, dict[str, object]]:
        """``DATABASE_URL`` and the settings that ``STANCH_*`` stands for, ready for `judge`.

        ``STANCH_POOL_SIZE=20`` is ``pool_size=20``, and so on for every setting but ``engine_options``. A
        switch is one of true, false, 1, 0, yes, no, on, off; ``none`` is None where None is allowed.
        Raises `ConfigError` for a missing ``DATABASE_URL``, an unknown ``STANCH_`` name and a text that
        cannot be read. Reads nothing but *environ*.

        >>> Settings.from_environ({"DATABASE_URL": "sqlite://", "STANCH_POOL_PRE_PING": "off"})
        ('sqlite://', {'pool_pre_ping': False})
        """
        complaints: list[Complaint] = []
        if not environ.get("DATABASE_URL"):
            complaints.append(
                Complaint(
                    "DATABASE_URL is empty" if "DATABASE_URL" in environ else "DATABASE_URL is not set",
                    "Set DATABASE_URL=postgresql+asyncpg://user@host:5432/database.",
                )
            )
        variables = {_PREFIX + name.upper(): name for name in KINDS}
        given: dict[str, object] = {}
        for variable, text in environ.items():
            if not variable.startswith(_PREFIX) or variable in _NOT_SETTINGS:
                continue
            if variable not in variables:
                known = meant(variable, variables)
                complaints.append(
                    Complaint(f"{named(variable)} is not a setting{known}", f"Unset {named(variable)}.")
                )
                continue
            name = variables[variable]
            try:
                given[name] = KINDS[name].read(text)
            except ValueError as error:
                hint = f" ({error})" if error.args else ""
                said = f"{variable} must be {in_words(KINDS[name])}, got {shown(text)}{hint}"
                complaints.append(Complaint(said, f"Set {variable}={KINDS[name].example.strip(chr(34))}."))
        complain(complaints)
        return environ["DATABASE_URL"], given

    @override
    def _facts(self) -> tuple[Any, ...]:
        # Whoever writes a default out has chosen the same as who leaves it out.
        return tuple(getattr(self, name) for name in self._fields if name != "given")

    def _put(self, name: str, value: object) -> None:
        self.__dict__[name] = value

    def _yield_defaults(self) -> None:
        """Take back the defaults that what was chosen leaves no room for; what was chosen stays."""
        if self.poolclass is NullPool and "max_overflow" not in self.given:
            self._put("max_overflow", 0)
        if self.poolclass is StaticPool:
            self._put("pool_size", self.pool_size if "pool_size" in self.given else 1)
            self._put("max_overflow", self.max_overflow if "max_overflow" in self.given else 0)
        if self.pooler is not None:
            for name in _SERVER_TIMEOUTS:
                self._put(name, getattr(self, name) if name in self.given else None)
        if not self.track_holders:
            for name in _TRACKED:
                self._put(name, getattr(self, name) if name in self.given else None)
        lock, statement = self.lock_timeout, self.statement_timeout
        if "lock_timeout" not in self.given and lock and statement and lock >= statement:
            self._put("lock_timeout", None)

    def _contradictions(self) -> Iterable[Complaint]:
        if self.poolclass is NullPool and self.max_overflow:
            yield Complaint(
                f"max_overflow={self.max_overflow} has no pool to flow over from: poolclass is NullPool",
                "With NullPool the bound is pool_size: raise that, and leave max_overflow out.",
            )
        if self.poolclass is StaticPool and (self.pool_size, self.max_overflow) != (1, 0):
            yield Complaint(
                "poolclass=StaticPool is one connection for all, so it has no pool_size and no max_overflow",
                "Leave pool_size and max_overflow out, or leave StaticPool out.",
            )
        if self.lock_timeout and self.statement_timeout and self.lock_timeout >= self.statement_timeout:
            yield Complaint(
                f"lock_timeout={self.lock_timeout:g} never ends a wait: "
                f"statement_timeout={self.statement_timeout:g} ends it first",
                "Make lock_timeout shorter than statement_timeout, or leave it out.",
            )
        for name in _TRACKED:
            if not self.track_holders and getattr(self, name) is not None:
                yield Complaint(
                    f"{name} needs to know what holders do, and track_holders is False",
                    f"Leave track_holders out, or {name}.",
                )
        if self.pooler is not None and self.verify_commits:
            yield Complaint(
                "verify_commits=True cannot be kept through PgBouncer in transaction mode: "
                "every transaction may run in another server process",
                "Leave verify_commits out, or connect past the pooler.",
            )
        if self.pooler is not None and self.reader_pool_size is not None:
            yield Complaint(
                "reader_pool_size promises that the server refuses writes, which no parameter sent through PgBouncer "
                "can make it do",
                "Leave reader_pool_size out, or connect past the pooler.",
            )
        for name in _SERVER_TIMEOUTS:
            if self.pooler is not None and getattr(self, name) is not None:
                yield Complaint(
                    f"{name} cannot be sent through PgBouncer in transaction mode",
                    f"Say it on the server: ALTER ROLE app SET {name} = '{getattr(self, name):g}s'.",
                )


_PREFIX: Final = "STANCH_"
_NOT_SETTINGS: Final = frozenset(
    {"STANCH_REQUIRE"}
)  # read by the test suite; it must not stop a user's from_env
_TRACKED: Final = ("held_idle_after", "slow_statement", "repeated_statement")
_READ_ONLY: Final = {"default_transaction_read_only": "on"}
_SERVER_TIMEOUTS: Final = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")

KINDS: Final[Mapping[str, Kind]] = {
    "pool_size": Whole(1, 1000, "20"),
    "max_overflow": Whole(0, 1000, "10"),
    "reader_pool_size": Whole(1, 1000, "10", optional=True),
    "pool_timeout": Seconds("5.0"),
    "max_waiting": Whole(1, 1_000_000, "100", optional=True),
    "queue_target": Seconds("0.08", optional=True),
    "queue_interval": Seconds("0.1"),
    "pool_use_lifo": Switch(),
    "pool_recycle": Seconds("1800", most=MONTH, never=True),
    "pool_pre_ping": Switch(),
    "ping_after": Seconds("30", most=MONTH, never=True),
    "poolclass": PoolClass("NullPool"),
    "reset": Choice(("flag", "strict"), '"strict"'),
    "track_holders": Switch("False"),
    "leak_after": Seconds("30.0", optional=True),
    "held_idle_after": Seconds("1.0", optional=True),
    "slow_statement": Seconds("1.0", optional=True),
    "repeated_statement": Whole(2, 1_000_000, "10", optional=True),
    "echo": Choice(("debug",), "True", switch=True),
    "isolation_level": Choice(
        ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"),
        '"REPEATABLE READ"',
        optional=True,
    ),
    "autoflush": Switch(),
    "expire_on_commit": Switch("False"),
    "connect_timeout": Seconds("5.0"),
    "close_timeout": Seconds("5.0"),
    "commit_timeout": Seconds("30.0"),
    "drain_timeout": Seconds("10.0"),
    "hook_timeout": Seconds("10.0"),
    "verify_commits": Switch("True"),
    "application_name": Label('"shop"'),
    "statement_timeout": Seconds("30.0", optional=True),
    "lock_timeout": Seconds("10.0", optional=True),
    "idle_in_transaction_session_timeout": Seconds("60.0", optional=True),
    "pooler": Choice(("pgbouncer",), '"pgbouncer"', optional=True),
}
"""What each setting may be."""

ENGINE_OPTIONS: Final[Mapping[str, Kind]] = {
    "connect_args": Instance((dict,), "a dict", '{"sslmode": "require"}'),
    "enable_from_linting": Switch(),
    "execution_options": Instance((Mapping,), "a dict", '{"stream_results": True}'),
    "hide_parameters": Switch(),
    "insertmanyvalues_page_size": Whole(1, 100_000, "1000"),
    "json_deserializer": Function("json.loads"),
    "json_serializer": Function("json.dumps"),
    "label_length": Whole(6, 1000, "30", optional=True),
    "logging_name": Label('"shop"'),
    "max_identifier_length": Whole(8, 1000, "63", optional=True),
    "native_inet_types": Switch("False"),
    "plugins": Instance((list, tuple), "a list of str", '["myplugin"]'),
    "query_cache_size": Whole(0, 1_000_000, "500"),
    "skip_autocommit_rollback": Switch(),
    "use_insertmanyvalues": Switch(),
    "use_native_hstore": Switch("False"),
}
"""What may be passed on to ``create_async_engine``; which driver knows which, SQLAlchemy decides."""

_OWN_POOL: Final = (
    "the pool is stanch's own",
    "Leave it out: pool_size, max_overflow and poolclass describe it.",
)
_REFUSED: Final[Mapping[str, tuple[str, str]]] = {
    "autocommit": (
        "SQLAlchemy 2 has no autocommit flag",
        'For statements that stand alone: isolation_level="AUTOCOMMIT"; else db.transaction(), which commits.',
    ),
    "pool": _OWN_POOL,
    "creator": _OWN_POOL,
    "async_creator": (
        "stanch opens connections itself, bounded and watched",
        'Write connect_args={"async_creator_fn": function}: stanch calls it for each connection.',
    ),
    "pool_reset_on_return": ("a connection is always rolled back when it comes back", "Leave it out."),
    "echo_pool": ("the pool is stanch's own", "Watch it with db.observe(print)."),
    "pool_logging_name": ("the pool is stanch's own", "Watch it with db.observe(print)."),
    "pool_events": ("the pool is stanch's own", "Watch it with db.observe(print)."),
    "module": ("the driver follows from the URL", "Write postgresql+asyncpg:// or postgresql+psycopg://."),
    "paramstyle": ("the parameter style follows from the driver", "Leave it out."),
    "strategy": ("strategies are gone since SQLAlchemy 1.4", "Leave it out."),
    "future": ("SQLAlchemy 2 has only the one style", "Leave it out."),
    "timeout": (
        "it means the connect on asyncpg, the lock wait on SQLite and nothing on psycopg",
        "Say which is meant: connect_timeout, statement_timeout, lock_timeout or pool_timeout.",
    ),
    "command_timeout": ("it is asyncpg's name", "Write statement_timeout, which every driver has."),
    "min_size": ("it is a name of other pools", "Write pool_size: how many connections are kept."),
    "max_size": ("it is a name of other pools", "Write pool_size and max_overflow; their sum is the bound."),
    "max_idle": ("it is a name of other pools", "Write pool_recycle: the age at which one is replaced."),
    "max_lifetime": ("it is a name of other pools", "Write pool_recycle, in seconds."),
}


def _stranger(name: str, known: Iterable[str]) -> Complaint:
    if name in _REFUSED:
        why, instead = _REFUSED[name]
        return Complaint(f"{name} is not a setting: {why}", instead)
    return Complaint(
        f"{named(name)} is not a setting{meant(name, known)}",
        "Remove it, or write the name of a setting as the reference has it.",
    )


def _judged_options(options: object, complaints: list[Complaint]) -> dict[str, object]:
    """*options* for ``create_async_engine``, with what is wrong about them added to *complaints*."""
    if not isinstance(options, Mapping):
        complaints.append(
            Complaint(
                f"engine_options must be a dict, got {shown(options)}",
                'Write engine_options={"hide_parameters": True}.',
            )
        )
        return {}
    checked: dict[str, object] = {}
    for name, value in cast("Mapping[object, object]", options).items():
        if not isinstance(name, str) or name not in ENGINE_OPTIONS:
            if isinstance(name, str) and name in KINDS:
                said = f"{name} is a setting of its own, not one of engine_options"
                complaints.append(Complaint(said, f"Write {name}=… beside engine_options, not inside."))
            else:
                complaints.append(_stranger(name if isinstance(name, str) else "", ENGINE_OPTIONS))
            continue
        checked[name] = judged(name, ENGINE_OPTIONS[name], value, complaints)
    execution = checked.get("execution_options")
    if isinstance(execution, Mapping) and "isolation_level" in execution:
        complaints.append(
            Complaint(
                "execution_options holds an isolation_level",
                'Write isolation_level="SERIALIZABLE" as a setting of its own.',
            )
        )
    return checked
