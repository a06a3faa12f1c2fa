"""The pages behind ``stanch explain``: one Markdown file per ``error_code``, shipped inside the package.

A page opens with ``# code: what happened in a few words``. A problem report to an HTTP client that comes from no error
of stanch's own (a conflict, a deadlock) has a page too, under the last word of its ``type``.
"""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from stanch.problems import problem_of
from stanch.sqlstate import IN_FAILED_TRANSACTION

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_SUFFIX: Final = ".md"
_PROBLEM: Final = "urn:stanch:problem:"
_OTHER_NAMES: Final = {
    "busy": "pool-exhausted",
    "commit-outcome-unknown": "commit-unknown",
    IN_FAILED_TRANSACTION.lower(): "transaction-aborted",
}
"""What is called otherwise in a problem report, or by the server."""


def codes() -> list[str]:
    """Every code that has a page, sorted.

    >>> "pool-exhausted" in codes()
    True
    """
    return sorted(_pages())


def page(code: str) -> str:
    """The page of *code*, as Markdown. Raises ``KeyError`` if there is none."""
    return _pages()[code].read_text(encoding="utf-8")


def meant_by(word: str) -> str | None:
    """The code of the page about *word*: a code, the ``type`` of a problem report or its last part, or an SQLSTATE.

    >>> meant_by("urn:stanch:problem:busy"), meant_by("40P01"), meant_by("42P01")
    ('pool-exhausted', 'contention', None)
    """
    known, word = codes(), word.lower().removeprefix(_PROBLEM)
    for name in (word, _OTHER_NAMES.get(word), _problem_behind(word)):
        if name in known:
            return name
    return None


def title(code: str) -> str:
    """What *code* means in a few words. Raises ``KeyError`` if it has no page.

    >>> title("unavailable")
    'no connection to the server could be made'
    """
    heading = page(code).partition("\n")[0]
    return heading.removeprefix(f"# {code}: ")


def near(wrong: str) -> list[str]:
    """The codes that look most like *wrong*, the nearest first; the name of an error class will do.

    >>> near("PoolExausted")
    ['pool-exhausted']
    >>> near("weather")
    []
    """
    return difflib.get_close_matches(wrong.lower().replace("_", "-"), codes(), n=2, cutoff=0.7)


class _Refusal(Exception):
    """What any driver's error looks like to those who ask for its SQLSTATE."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


def _problem_behind(word: str) -> str | None:
    if not re.fullmatch(r"[0-9][0-9a-z]{4}", word):
        return None
    problem = problem_of(_Refusal(word.upper()))
    return None if problem is None else problem.slug


def _pages() -> dict[str, Traversable]:
    folder = files("stanch").joinpath("explain")
    return {file.name.removesuffix(_SUFFIX): file for file in folder.iterdir() if file.name.endswith(_SUFFIX)}
