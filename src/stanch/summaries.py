"""Names a statement in a few words, as tracing does: its operations and what they are done to, in their order.

The words and their order are those of OpenTelemetry's *Generating a summary of the query* (semantic conventions for
database client spans). Loaded only by who shows such names.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from stanch.sqltext import Kind, Unreadable, tokens

if TYPE_CHECKING:
    from stanch.sqltext import Token

_LONGEST: Final = 255
"""Characters, as the convention has it."""

_OPERATIONS: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "MERGE"})
_NO_OPERATION_AFTER: Final = frozenset({"FOR", "KEY", "DO", "ON", "THEN"})
"""``FOR UPDATE`` locks, ``DO UPDATE`` and ``THEN DELETE`` are ways in which another operation goes on."""
_BEFORE_TARGETS: Final = frozenset({"FROM", "JOIN", "INTO", "USING", "UPDATE"})
_BETWEEN: Final = frozenset({"ONLY", "LATERAL"})
_END_OF_LIST: Final = frozenset({
    "WHERE", "SET", "ON", "GROUP", "ORDER", "HAVING", "LIMIT", "OFFSET", "FETCH", "FOR", "WINDOW", "UNION",
    "EXCEPT", "INTERSECT", "RETURNING", "VALUES", "WHEN", "JOIN",
})  # fmt: skip
_FROM_IS_AN_ARGUMENT: Final = frozenset({"EXTRACT", "SUBSTRING", "TRIM", "OVERLAY"})
_QUERIES: Final = _OPERATIONS | {"WITH", "VALUES", "TABLE"}
_OF_TWO_WORDS: Final = frozenset({"CREATE", "ALTER", "DROP", "REFRESH"})
_OF_ONE_WORD: Final = frozenset({
    "ANALYZE", "BEGIN", "CALL", "CLOSE", "CLUSTER", "COMMENT", "COMMIT", "COPY", "DEALLOCATE", "DECLARE", "DISCARD",
    "DO", "END", "EXECUTE", "EXPLAIN", "FETCH", "GRANT", "LISTEN", "LOCK", "MOVE", "NOTIFY", "PRAGMA", "PREPARE",
    "REINDEX", "RELEASE", "RESET", "REVOKE", "ROLLBACK", "SAVEPOINT", "SET", "SHOW", "START", "TRUNCATE", "UNLISTEN",
    "VACUUM",
})  # fmt: skip
"""Commands by name. Another first word might be anything, and is not told."""


class Summary(NamedTuple):
    """What a statement does, in short; empty where it could not be read."""

    text: str
    operation: str | None
    """The one operation, as it was written; None where there are several."""


@lru_cache(maxsize=512)
def summary_of(sql: str) -> Summary:
    """The operations of *sql* and their targets; of other commands their name.

    >>> summary_of("INSERT INTO notes (id) SELECT o.id FROM shop.orders AS o, customers c WHERE o.id = 7")
    Summary(text='INSERT notes SELECT shop.orders customers', operation=None)
    >>> summary_of("SELECT extract(year FROM placed) FROM (SELECT * FROM orders) AS o FOR UPDATE").text
    'SELECT SELECT orders'
    >>> summary_of("create table orders (id int)")
    Summary(text='create table', operation='create table')
    """
    try:
        known = [*tokens(sql)]
    except Unreadable:
        known = []
    words = [token for token in known if token.kind is Kind.WORD]
    if not words:
        return Summary("", None)
    first = words[0].keyword
    if first not in _QUERIES:
        named = 2 if first in _OF_TWO_WORDS else int(first in _OF_ONE_WORD)
        command = _cut([word.text for word in words[:named]])
        return Summary(command, command or None)
    reading = _Reading()
    for token in known:
        reading.read(token)
    alone = len({operation.upper() for operation in reading.operations}) == 1
    return Summary(_cut(reading.parts) or words[0].text, reading.operations[0] if alone else None)


class _Reading:
    """One pass over the tokens of a query."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.operations: list[str] = []
        self._in_list = [False]
        """For each open parenthesis: whether a comma leads to another target."""
        self._from_is_an_argument = [False]
        self._expecting = False
        self._named = False
        """Whether the token before was a target, so that a dot goes on with its name."""
        self._before = ""

    def read(self, token: Token) -> None:
        word, text = token.keyword, token.text
        named, self._named = self._named, False
        if text == "(":
            self._in_list.append(False)
            self._from_is_an_argument.append(self._before in _FROM_IS_AN_ARGUMENT)
            self._expecting = False
        elif text == ")":
            if len(self._in_list) > 1:
                self._in_list.pop()
                self._from_is_an_argument.pop()
            self._expecting = False
        elif text == ",":
            self._expecting = self._in_list[-1]
        elif text == "." and named:
            self.parts[-1] += "."
            self._expecting = True
        elif word in _OPERATIONS and self._before not in _NO_OPERATION_AFTER:
            self.operations.append(text)
            self.parts.append(text)
            self._in_list[-1], self._expecting = False, word == "UPDATE"
        elif word in _BEFORE_TARGETS and self._leads_to_targets(word):
            self._in_list[-1], self._expecting = word in ("FROM", "USING"), True
        elif word in _END_OF_LIST:
            self._in_list[-1] = self._expecting = False
        elif self._expecting and word not in _BETWEEN:
            self._name(token)
        self._before = word or text

    def _leads_to_targets(self, word: str) -> bool:
        if word == "UPDATE":
            return False
        return not (word == "FROM" and (self._before == "DISTINCT" or self._from_is_an_argument[-1]))

    def _name(self, token: Token) -> None:
        self._expecting = False
        if token.kind not in (Kind.WORD, Kind.NAME):
            return
        if self.parts and self.parts[-1].endswith("."):
            self.parts[-1] += token.text
        else:
            self.parts.append(token.text)
        self._named = True


def _cut(parts: list[str]) -> str:
    """As many whole *parts* as may be told."""
    text = ""
    for part in parts:
        longer = f"{text} {part}".lstrip()
        if len(longer) > _LONGEST:
            break
        text = longer
    return text
