"""The command ``stanch``: what a person at a terminal asks of the library."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from stanch.cli import explain

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with *arguments* (default: those of the process) and return its exit status.

    0: done. 2: the command was asked for something that does not exist.
    """
    wishes = _parser().parse_args(arguments)
    return _explain(wishes.code) if wishes.code else _list_codes()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stanch", description="Tools around the stanch database layer.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    explaining = commands.add_parser(
        "explain", help="what an error means, how to see it and how to mend it; without CODE: all codes"
    )
    explaining.add_argument(
        "code",
        nargs="?",
        metavar="CODE",
        help="the last line of the error names it; the type of a problem report or an SQLSTATE will do",
    )
    return parser


def _list_codes() -> int:
    titles = {code: explain.title(code) for code in explain.codes()}
    width = max(map(len, titles))
    for code, title in titles.items():
        print(f"{code:{width}}  {title}")
    return 0


def _explain(code: str) -> int:
    meant = explain.meant_by(code)
    if meant is None:
        near = explain.near(code)
        hint = f"did you mean {' or '.join(near)}?" if near else "stanch explain lists all codes"
        print(f"no error has the code {code!r}; {hint}", file=sys.stderr)
        return 2
    print(explain.page(meant), end="")
    return 0
