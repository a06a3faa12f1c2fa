"""The pages behind ``stanch explain``: one Markdown file per ``error_code``, shipped inside the package.

A page opens with ``# code: what happened in a few words``.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_SUFFIX: Final = ".md"


def codes() -> list[str]:
    """Every code that has a page, sorted.

    >>> "pool-exhausted" in codes()
    True
    """
    return sorted(_pages())


def page(code: str) -> str:
    """The page of *code*, as Markdown. Raises ``KeyError`` if there is none."""
    return _pages()[code].read_text(encoding="utf-8")


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


def _pages() -> dict[str, Traversable]:
    folder = files("stanch").joinpath("explain")
    return {file.name.removesuffix(_SUFFIX): file for file in folder.iterdir() if file.name.endswith(_SUFFIX)}
