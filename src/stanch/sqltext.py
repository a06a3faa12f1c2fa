"""Reads SQL text as PostgreSQL's scanner does, far enough to say whether it only reads.

No grammar: the words that stand outside quotes and comments decide (PostgreSQL manual, *Lexical Structure*).
"""

from __future__ import annotations

import re
from enum import Enum
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REMEMBERED: Final = 512
"""Texts whose judgement is kept; an app has some hundred statements, and a generated one is judged anew."""


class Kind(Enum):
    """What a token is; comments and white space are none."""

    WORD = "word"
    """A keyword or an identifier without quotes."""
    NAME = "name"
    """A quoted identifier; its text is what was written, quotes and all."""
    STRING = "string"
    """A string constant of any form; its text is what was written, quotes and all."""
    SIGN = "sign"
    """Digits, a parameter, or one character of an operator or of punctuation."""


class Token(NamedTuple):
    """One token of a statement."""

    kind: Kind
    text: str

    @property
    def keyword(self) -> str:
        """In capitals if it can be a keyword, else empty."""
        return self.text.upper() if self.kind is Kind.WORD else ""

    @property
    def function(self) -> str:
        """In small letters if it can be the name of a function, else empty."""
        return self.text.strip('"').lower() if self.kind in (Kind.WORD, Kind.NAME) else ""


class Unreadable(ValueError):
    """The text cannot be told apart into tokens with certainty; the message says why."""


# All characters above ASCII may stand in an identifier, also those that look like white space.
_LETTER: Final = r"A-Za-z_\x80-\U0010ffff"
_BREAK: Final = r"(?:[ \t\f\v]|--[^\n\r]*+)*+[\n\r](?:[ \t\n\r\f\v]|--[^\n\r]*+[\n\r])*+"
"""What may stand between two parts of one string constant: the second is read by the rules of the first.

All repetitions here and below are possessive: a long text is read once, not in every way it could be cut.
"""
_ESCAPED: Final = r"'(?:[^'\\]|\\.|'')*+'"

_TOKEN: Final = rf"""
      (?P<space>   [ \t\n\r\f\v]+ | --[^\n\r]* )
    | (?P<comment> /\* )
    | (?P<string>  [eE]{_ESCAPED}(?:{_BREAK}{_ESCAPED})*+ | (?:[uU]&|[bBxXnN])?'(?:[^']|'')*+' )
    | (?P<dollar>  (?P<tag>\$(?:[{_LETTER}][{_LETTER}0-9]*)?\$).*?(?P=tag) )
    | (?P<escaped> [uU]&" )
    | (?P<name>    "(?:[^"]|"")*+" )
    | (?P<open>    [eE]?' | " | \$(?:[{_LETTER}][{_LETTER}0-9]*)?\$ )
    | (?P<word>    [{_LETTER}][{_LETTER}0-9$]* )
    | (?P<sign>    \$?[0-9]+ | . )
    """
_KINDS: Final = {
    "word": Kind.WORD,
    "name": Kind.NAME,
    "string": Kind.STRING,
    "dollar": Kind.STRING,
    "sign": Kind.SIGN,
}
_UNREADABLE: Final = {"escaped": 'an identifier in U&"…"', "open": "a quote that does not end"}


@cache
def _scanner() -> re.Pattern[str]:
    # Not at import: the tables of this pattern are a fifth of what importing stanch costs.
    return re.compile(_TOKEN, re.DOTALL | re.VERBOSE)


_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")
_MINGLED: Final = re.compile(r"\$%\(|\$:\w|\)[sbt]\$|:\w+\$")
"""A bind parameter next to a dollar sign. The driver writes $1 there, and may so begin or end a $-quoted string."""


def tokens(sql: str) -> Iterator[Token]:
    r"""The tokens of *sql*, in their order.

    Quotes of every form, the doubled and the escaped quote, the string that goes on in the next line and nested
    comments are read as PostgreSQL reads them with ``standard_conforming_strings`` on, its default. Raises
    ``Unreadable`` where a quote or a comment does not end, and for what means one thing here and another elsewhere.

    >>> [token.text for token in tokens("SELECT 'it''s' /* not /* this */ */ FROM \"the table\"")]
    ['SELECT', "'it''s'", 'FROM', '"the table"']
    """
    return _tokens_of(_parts(sql))


def _parts(sql: str) -> Iterator[tuple[str, str]]:
    """All of *sql* in its order, each part with the name of the alternative of ``_TOKEN`` that it is."""
    if "\0" in sql:
        raise Unreadable("a NUL character")
    if "$" in sql and _MINGLED.search(sql):
        raise Unreadable("a parameter next to a dollar sign")
    yield from _scanned(sql)


def _scanned(sql: str) -> Iterator[tuple[str, str]]:
    match_at = _scanner().match
    position, end = 0, len(sql)
    while position < end:
        match = match_at(sql, position)
        assert match is not None, "the last alternative takes any character"
        position, group = match.end(), match.lastgroup or ""
        if group == "comment":
            position = _end_of_comment(sql, position)
        elif (why := _UNREADABLE.get(group)) is not None:
            raise Unreadable(why)
        yield group, match.group()


def _tokens_of(parts: Iterator[tuple[str, str]]) -> Iterator[Token]:
    for group, text in parts:
        if (kind := _KINDS.get(group)) is not None:
            yield Token(kind, text)


def _end_of_comment(sql: str, position: int) -> int:
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, position):
        depth += 1 if edge.group() == "/*" else -1
        if not depth:
            return edge.end()
    raise Unreadable("a comment that does not end")


# What a reader may say ------------------------------------------------------------------------------------

_READING: Final = frozenset({"SELECT", "WITH", "VALUES", "TABLE", "SHOW"})
_WRITING: Final = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "INTO", "SET", "LOCK", "CREATE"})
_COMMANDS: Final = (
    "ALTER|ANALYZE|BEGIN|CALL|CHECKPOINT|CLOSE|CLUSTER|COMMENT|COMMIT|COPY|CREATE|DEALLOCATE|DECLARE|"
    "DELETE|DISCARD|DO|DROP|END|EXECUTE|EXPLAIN|FETCH|GRANT|IMPORT|INSERT|LISTEN|LOAD|LOCK|MERGE|MOVE|"
    "NOTIFY|PRAGMA|PREPARE|REFRESH|REINDEX|RELEASE|RESET|REVOKE|ROLLBACK|SAVEPOINT|SECURITY|SET|START|"
    "TRUNCATE|UNLISTEN|UPDATE|VACUUM"
)
"""What an error may name; another first word might be anything."""
_NO_STATEMENT: Final = "an empty statement"

_WRITING_FUNCTIONS: Final = r"""
      nextval | setval | set_config | setseed | pg_notify | pg_nextoid
    | pg_(try_)?advisory_\w+
    | lo_\w+ | loread | lowrite
    | pg_(cancel|terminate)_backend | pg_(reload_conf|rotate_logfile\w*|promote|export_snapshot)
    | pg_(switch_wal|create_restore_point|backup_(start|stop)|(start|stop)_backup|wal_replay_(pause|resume))
    | pg_\w+_slots? | pg_(logical|replication|sync_replication)_\w+ | pg_stat_(?!get_)(\w+_)?reset\w*
    | pg_(set|restore|clear)_(relation|attribute)_stats | pg_import_system_collations | pg_log_\w+
    | pg_extension_config_dump | pg_stop_making_pinned_objects | pg_truncate_visibility_map | heap_force_\w+
    | pg_file_\w+ | pg_logdir_\w+ | brin_\w*summarize_\w+ | gin_clean_pending_list | binary_upgrade_\w+
    | query_to_xml\w* | cursor_to_xml\w* | ts_stat | ts_rewrite | xpath_table | crosstab\w* | connectby | dblink\w*
    """
"""Functions of PostgreSQL and its contributed modules that change something, or run SQL that they are given as text."""


@cache
def _writing_function() -> re.Pattern[str]:
    return re.compile(_WRITING_FUNCTIONS, re.VERBOSE)


@lru_cache(maxsize=REMEMBERED)
def objection_to_reading(sql: str) -> str | None:
    r"""Why *sql* is not certainly a statement that only reads, in a few words; None if it is.

    It is if it is one statement, begins with SELECT, WITH, VALUES, TABLE or SHOW, and holds, outside quotes and
    comments, no word that writes, locks or creates, and no function known to do so; a column of such a name must be
    quoted. What a function or a view of the user's own does is not seen here. Nothing of a quoted text is repeated.

    >>> objection_to_reading("SELECT 'insert into'  -- delete") is None
    True
    >>> objection_to_reading("WITH gone AS (DELETE FROM orders RETURNING *) SELECT * FROM gone")
    'DELETE'
    >>> objection_to_reading("SELECT * FROM orders FOR NO KEY UPDATE")
    'FOR NO KEY UPDATE'
    >>> objection_to_reading("select pg_catalog.\"nextval\"('s')")
    'nextval()'
    """
    try:
        return next(_objections_to(_statement(sql)), None)
    except Unreadable as error:
        return str(error)


def _statement(sql: str) -> list[Token]:
    statement = list(tokens(sql))
    if statement and statement[-1] == _SEMICOLON:
        statement.pop()
    return statement


_SEMICOLON: Final = Token(Kind.SIGN, ";")


def _objections_to(statement: Sequence[Token]) -> Iterator[str]:
    keyword = next((token.keyword for token in statement if token.text != "("), None)
    if keyword is None:
        yield _NO_STATEMENT
    elif keyword not in _READING:
        yield keyword if re.fullmatch(_COMMANDS, keyword) else "no statement that is known"
    before: tuple[str, ...] = ()
    called = ""
    for token in statement:
        if token == _SEMICOLON:
            yield "a second statement after ;"
        if (writing := _writing_word(token.keyword, before)) is not None:
            yield writing
        if token.text == "(" and _writing_function().fullmatch(called):
            yield f"{called}()"
        before = (*before[-2:], token.keyword)
        called = token.function


def _writing_word(keyword: str, before: tuple[str, ...]) -> str | None:
    """The words by which a token writes or locks, given the three before it."""
    if keyword in ("UPDATE", "SHARE"):
        for length in (1, 2, 3):
            lock = before[-length:]
            if lock in _LOCKING:
                return " ".join((*lock, keyword))
    return keyword if keyword in _WRITING else None


_LOCKING: Final = (("FOR",), ("FOR", "KEY"), ("FOR", "NO", "KEY"))


def is_plain_reading(sql: str) -> bool:
    """Whether *sql* certainly leaves nothing behind: no uncommitted change, no lock, no state of the session.

    As far as its words say; a function that it calls is told by ``suspicion()``.
    """
    return objection_to_reading(sql) is None


_WRITES_NOTHING: Final = frozenset(
    """
    all and any array as between by case cube distinct else except exists filter from group grouping having
    ilike in intersect is join lateral like limit materialized not offset on or over recursive rollup row
    select sets similar some table then to union using values when where with within bit char character
    decimal float interval numeric time timestamp varchar varying abs age array_agg avg btrim cardinality cast
    ceil coalesce concat count current_timestamp date_part date_trunc dense_rank extract floor format
    generate_series greatest jsonb_agg jsonb_build_object json_agg json_build_object lag last_value lead least
    left length lower lpad ltrim max md5 min mod now nullif position random rank replace right round
    row_number row_to_json rpad rtrim split_part string_agg strpos substring sum to_char to_date to_json
    to_jsonb to_timestamp trim unnest upper pg_current_xact_id_if_assigned
    """.split()  # noqa: SIM905  # as a list of strings it would fill a page
)
"""Keywords, types and functions that certainly write nothing. Whatever is not listed costs one question, once."""


# What may have written ------------------------------------------------------------------------------------

_CERTAINLY_WRITING: Final = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE"})
_HARMLESS: Final = frozenset(
    {"SET", "RESET", "SHOW", "PRAGMA", "SAVEPOINT", "RELEASE", "ROLLBACK", "BEGIN", "START", "COMMIT", "END"}
)
"""First keywords that change no row, whatever follows."""
_UNKNOWN: Final = "?"


class Suspicion(Value):
    """*what* in a statement may have written: a function or its first keyword; *certain*: it is meant to write."""

    what: str
    certain: bool = False


def first_keyword(sql: str) -> str:
    """The first word of *sql* in capitals, behind comments and brackets; ``?`` if it is none of SQL's.

    >>> first_keyword("/* not /* a */ SELECT */ (insert"), first_keyword("hunter2 is my password")
    ('INSERT', '?')
    """
    try:
        keyword = next((token.keyword for token in _tokens_of(_scanned(sql)) if token.text != "("), "")
    except Unreadable:
        return _UNKNOWN
    known = keyword in _READING or keyword in _CERTAINLY_WRITING or re.fullmatch(_COMMANDS, keyword)
    return keyword if known else _UNKNOWN


def only_locks(sql: str) -> bool:
    """Whether all that speaks against *sql* as a read is that it locks rows: with the transaction only that is lost.

    >>> only_locks("SELECT * FROM orders FOR UPDATE"), only_locks("SELECT 1")
    (True, False)
    """
    try:
        objections = list(_objections_to(_statement(sql)))
    except Unreadable:
        return False
    return bool(objections) and all(objection.startswith("FOR ") for objection in objections)


@lru_cache(maxsize=REMEMBERED)
def suspicion_by_words(sql: str) -> Suspicion | None:
    """What in the words of *sql* may write rows or tables; None for what only reads, locks, or sets something.

    >>> suspicion_by_words("INSERT INTO orders DEFAULT VALUES")
    Suspicion(what='INSERT', certain=True)
    >>> suspicion_by_words("WITH gone AS (DELETE FROM orders RETURNING *) SELECT * FROM gone")
    Suspicion(what='WITH', certain=False)
    """
    if is_plain_reading(sql) or only_locks(sql):
        return None
    keyword = first_keyword(sql)
    return None if keyword in _HARMLESS else Suspicion(keyword, keyword in _CERTAINLY_WRITING)


@lru_cache(maxsize=REMEMBERED)
def suspicion(sql: str) -> Suspicion | None:
    r"""The same, and for what only reads by its words: the first function of which only the server knows.

    >>> suspicion("SELECT count(*) FROM orders WHERE id IN (1, 2)") is None
    True
    >>> suspicion("SELECT place_order(7)").what, suspicion("SELECT shop.count(7)").what
    ('place_order()', 'count()')
    """
    if (found := suspicion_by_words(sql)) is not None:
        return found
    function = _function_of_doubt(sql) if is_plain_reading(sql) or only_locks(sql) else None
    return None if function is None else Suspicion(function)


def _function_of_doubt(sql: str) -> str | None:
    before = called = Token(Kind.SIGN, "")
    for token in tokens(sql):
        if token.text == "(" and called.function:
            known = called.kind is Kind.WORD and before.text != "." and called.function in _WRITES_NOTHING
            if not known:
                return f"{called.function}()"
        before, called = called, token
    return None


_LONGEST: Final = 10_000
"""Characters of a statement that are read for its shape; what is longer was generated, and costs milliseconds."""
_SHOWN: Final = 1_000
"""Characters of a shape: several hundred of them are kept where somebody measures."""

_VALUE: Final = r"[-+]?\?(?: ?:: ?[\w ]+(?:\(\?\))?(?:\[\])*)?"
"""What is left of a literal or a parameter, perhaps with a cast."""
_SHORTER: Final = (
    (
        r"%\([^()]*\)s|__\[POSTCOMPILE_[^\]]*\]|(?<!:):[A-Za-z_]\w*|\$\?",
        "?",
    ),  # parameters by name, lists of SQLAlchemy's
    (r"\?\.\?", "?"),
    (rf"\( ?{_VALUE}(?: ?, ?{_VALUE})* ?\)", "(?)"),
    (rf"\( ?{_VALUE}(?: ?, ?{_VALUE})* ?\)", "(?)"),  # once more: around the casts with a length
    (r"\(\?\)(?: ?, ?\(\?\))+", "(?)"),  # rows
    (r"\b(sa_savepoint_)\d+\b", r"\1?"),
    (
        r"^(SET (?:(?:LOCAL|SESSION) )?(?:ROLE|(?!TRANSACTION |CHARACTERISTICS )[\w.\"]+ ?(?:=|\bTO\b))) ?.*",
        r"\1 ?",
    ),
)
"""What makes two texts of one statement alike; the last are values that need no quotes."""


@lru_cache(maxsize=REMEMBERED)
def shape_of(sql: str) -> str:
    r"""*sql* without its literals and comments, with single spaces; a list of literals or of parameters is one.

    For people and for counting: never a value, whatever was written into the text, but for ``NULL`` and the truth
    values; what stands in double quotes is a name. Of what cannot be read with certainty, or is longer than any
    person writes, only the first word is told.

    >>> shape_of("SELECT *  FROM orders -- all\nWHERE item = 'book' AND id IN ($1, $2, $3) LIMIT 0.5")
    'SELECT * FROM orders WHERE item = ? AND id IN (?) LIMIT ?'
    """
    words: list[str] = []
    try:
        if len(sql) > _LONGEST:
            raise Unreadable("a very long text")
        for group, text in _parts(sql):
            if group in ("space", "comment"):
                words.append(" ")
            elif group in ("string", "dollar") or (group == "sign" and text.lstrip("$").isdigit()):
                words.append("?")
            elif group == "word" and words[-1:] == ["?"]:
                continue  # the rest of a number: 1e5, 0xFF
            elif text == "\\":
                raise Unreadable("a backslash, which may have stood in a string by older rules")
            else:
                words.append(text)
    except Unreadable:
        first = re.match(r"\W*([A-Za-z]{1,20})\b", sql)
        return f"{first[1].upper()} (not readable)" if first else "(not readable)"
    shape = " ".join("".join(words).split())
    for pattern, shorter in _SHORTER:
        shape = re.sub(pattern, shorter, shape, flags=re.IGNORECASE)
    return shape if len(shape) <= _SHOWN else shape[:_SHOWN] + "…"
