"""What a value may be: each kind says it in words, lets a value through or refuses it, and reads it from a text.

No complaint ever repeats a text it was given: it might be a password.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool, StaticPool
from typing_extensions import override

from stanch.errors import ConfigError
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DAY: Final = 86_400.0
MONTH: Final = 30 * DAY

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that forge log lines, end C strings, or mean that a file was read without ``.strip()``."""


class Kind:
    """What a value may be. ``str()`` says it; *example* is one, as Python writes it."""

    example: str

    def judge(self, value: object) -> Any:
        """*value* as it is to be used. Raises `ValueError` if it is not allowed, perhaps with a hint."""
        raise NotImplementedError

    def read(self, text: str) -> Any:  # noqa: ARG002  # here, no text stands for any
        """What a text from the environment or a URL stands for, not judged yet. Raises `ValueError` if for nothing."""
        raise ValueError


class Switch(Kind, Value):
    """On or off, and nothing that merely counts as true: ``"false"`` is a true value in Python."""

    example: str = "True"

    @override
    def __str__(self) -> str:
        return "True or False"

    @override
    def judge(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    @override
    def read(self, text: str) -> bool:
        return _SWITCH_WORDS[_known(text.lower(), _SWITCH_WORDS)]


class Whole(Kind, Value):
    """A whole number within bounds. A bool is not a number."""

    least: int
    most: int
    example: str
    optional: bool = False

    @override
    def __str__(self) -> str:
        return f"an int from {self.least} to {self.most}" + (" or None" if self.optional else "")

    @override
    def judge(self, value: object) -> int | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not self.least <= value <= self.most:
            raise ValueError
        return value

    @override
    def read(self, text: str) -> int | None:
        if self.optional and text.lower() == "none":
            return None
        if not re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII):
            raise ValueError
        return int(text)


class Seconds(Kind, Value):
    """A length of time: finite, at least a millisecond, so that no unit rounds it down to "no limit"."""

    example: str
    most: float = DAY
    optional: bool = False
    never: bool = False

    @override
    def __str__(self) -> str:
        either = f"seconds, as an int or float from 0.001 to {self.most:.0f}"
        return either + (", or -1 for never" if self.never else "") + (", or None" if self.optional else "")

    @override
    def judge(self, value: object) -> float | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError
        if self.never and value == -1:
            return -1.0
        if not 0.001 <= value <= self.most:  # also what refuses nan
            raise ValueError
        return float(value)

    @override
    def read(self, text: str) -> float | None:
        if self.optional and text.lower() == "none":
            return None
        if not re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", text, re.ASCII):
            raise ValueError
        return float(text)


class Choice(Kind, Value):
    """One of a few words, in any case, with blanks or underscores; some choices also know on and off."""

    words: tuple[str, ...]
    example: str
    switch: bool = False
    optional: bool = False

    @override
    def __str__(self) -> str:
        said = [repr(word) for word in self.words]
        said += ["True", "False"] if self.switch else []
        said += ["None"] if self.optional else []
        return said[0] if len(said) == 1 else ", ".join(said[:-1]) + " or " + said[-1]

    @override
    def judge(self, value: object) -> str | bool | None:
        if (value is None and self.optional) or (isinstance(value, bool) and self.switch):
            return value
        if not isinstance(value, str):
            raise ValueError
        return self._word(value)

    @override
    def read(self, text: str) -> str | bool | None:
        if self.switch and text.lower() in _SWITCH_WORDS:
            return _SWITCH_WORDS[text.lower()]
        if self.optional and text.lower() == "none":
            return None
        return self._word(text)

    def _word(self, text: str) -> str:
        plain = {_plain(word): word for word in self.words}
        if _plain(text) not in plain:
            raise ValueError(*(f"did you mean {plain[match]!r}?" for match in _closest(_plain(text), plain)))
        return plain[_plain(text)]


class Label(Kind, Value):
    """A short name that PostgreSQL shows as it is: it cuts at 63 bytes and replaces what is not ASCII.

    PostgreSQL manual, *application_name*. A control character would be worse than ugly: asyncpg ends the
    parameter at a NUL, and what follows it sets other parameters.
    """

    example: str

    @override
    def __str__(self) -> str:
        return "None or a str of 1 to 63 printable ASCII characters"

    @override
    def judge(self, value: object) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str):
            raise ValueError
        if CONTROL.search(value):
            raise ValueError("it contains a control character")
        if not re.fullmatch(r"[ -~]{1,63}", value):
            raise ValueError
        return value

    @override
    def read(self, text: str) -> str | None:
        return self.judge(text)


class PoolClass(Kind, Value):
    """A SQLAlchemy pool class that says how stanch's own pool shall behave."""

    example: str

    @override
    def __str__(self) -> str:
        return "None, QueuePool, AsyncAdaptedQueuePool, NullPool or StaticPool: the pool is stanch's own"

    @override
    def judge(self, value: object) -> object:
        if value is not None and not any(value is known for known in POOL_CLASSES.values()):
            raise ValueError
        return value

    @override
    def read(self, text: str) -> object:
        return POOL_CLASSES[_known(text, POOL_CLASSES)]


class Instance(Kind, Value):
    """Anything of a given type."""

    types: tuple[type, ...]
    said: str
    example: str

    @override
    def __str__(self) -> str:
        return self.said

    @override
    def judge(self, value: object) -> object:
        if not isinstance(value, self.types):
            raise ValueError
        return value


class Function(Kind, Value):
    """Something that can be called."""

    example: str = "json.dumps"

    @override
    def __str__(self) -> str:
        return "a function"

    @override
    def judge(self, value: object) -> object:
        if not callable(value):
            raise ValueError
        return value


class Complaint(NamedTuple):
    """One thing that is wrong, and what to do about it."""

    what: str
    remedy: str


def in_words(kind: Kind) -> str:
    """What *kind* lets through, for somebody who can only write text.

    >>> in_words(Switch())
    'one of true, false, 1, 0, yes, no, on, off'
    """
    match kind:
        case Switch():
            return "one of " + ", ".join(_SWITCH_WORDS).replace(
                "true, 1, yes, on, false, 0, no, off", "true, false, 1, 0, yes, no, on, off"
            )
        case PoolClass():
            return "one of " + ", ".join(POOL_CLASSES)
        case _:
            return str(kind)


def complain(complaints: Iterable[Complaint]) -> None:
    """Raise one `ConfigError` that holds all of *complaints*, or return if there are none."""
    told = list(complaints)
    if told:
        whats = [complaint.what for complaint in told]
        what = whats[0] if len(told) == 1 else f"{len(told)} settings are wrong: " + "; ".join(whats)
        raise ConfigError(what, remedies=list(dict.fromkeys(complaint.remedy for complaint in told)))


def judged(name: str, kind: Kind, value: object, complaints: list[Complaint]) -> Any:
    """*value* as *kind* wants it; or `None`, and one more of *complaints*."""
    try:
        return kind.judge(value)
    except ValueError as error:
        hint = f" ({error})" if error.args else ""
        complaints.append(
            Complaint(f"{name} must be {kind}, got {shown(value)}{hint}", f"Write {name}={kind.example}.")
        )
        return None


def read(kind: Kind, text: str) -> Any:
    """The judged value that *text* stands for. Raises `ValueError`."""
    return kind.judge(kind.read(text))


def shown(value: object) -> str:
    """*value* as an error may show it: small figures as they are, anything else by its type only.

    >>> shown(-1), shown(float("nan")), shown("hunter2")
    ('-1', 'nan', 'a str of 7 characters')
    """
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**18):
        return repr(value)
    if isinstance(value, str):
        return f"a str of {len(value)} characters" if value else "an empty str"
    kind = f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
    return kind if isinstance(value, type) else f"a value {kind}"


def meant(name: str, known: Iterable[str]) -> str:
    """`` (did you mean x?)`` for the closest of *known*, or nothing.

    >>> meant("pool_sise", ["pool_size", "echo"])
    ' (did you mean pool_size?)'
    """
    return "".join(f" (did you mean {match}?)" for match in _closest(name, known))


def named(name: object) -> str:
    """A name as an error may show it: only if it looks like one, for it may be half a password."""
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]{0,62}", name) else "a name"


def _closest(name: str, known: Iterable[str]) -> list[str]:
    """The one of *known* that *name* is most like, or none."""
    from difflib import get_close_matches  # noqa: PLC0415  # only a mistake has need of it

    return get_close_matches(name, list(known), 1)


def _known(text: str, words: Mapping[str, object]) -> str:
    if text not in words:
        raise ValueError
    return text


def _plain(text: str) -> str:
    return text.replace("_", " ").upper()


_ON: Final = ("true", "1", "yes", "on")
_OFF: Final = ("false", "0", "no", "off")
_SWITCH_WORDS: Final[Mapping[str, bool]] = {**dict.fromkeys(_ON, True), **dict.fromkeys(_OFF, False)}
POOL_CLASSES: Final[Mapping[str, type[Pool]]] = {
    "QueuePool": QueuePool,
    "AsyncAdaptedQueuePool": AsyncAdaptedQueuePool,
    "NullPool": NullPool,
    "StaticPool": StaticPool,
}
