"""The command ``stanch``: what a person at a terminal asks of the library."""

from __future__ import annotations

import argparse
import sys
from argparse import RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Any, Final

from stanch.cli import explain

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with *arguments* (default: those of the process) and return its exit status.

    0: done. 2: the command was asked for something that does not exist. The help of each command says what else.
    """
    wishes = vars(_parser().parse_args(arguments))
    if wishes.pop("command") == "top":
        return _top(wishes)
    code: str | None = wishes["code"]
    return _explain(code) if code else _list_codes()


_TOP: Final = """\
What the page of an app shows (install(app, db, dashboard="/_stanch")), in this terminal. URL is that of the page.
Keys: q quits, d goes to the next database, s sorts by something else, v shows one table alone, p pauses."""

_TOP_MORE: Final = """\
STANCH_TOP_HEADERS holds headers as well, one a line, for what should not stand in the list of processes.
Exit status: 0 done, 1 not reachable, 2 asked wrongly, 3 not let in, 4 no such page, 128 and the number of a signal."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stanch", description="Tools around the stanch database layer.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    explaining = commands.add_parser(
        "explain", help="what an error means, how to see it and how to mend it; without CODE: all codes"
    )
    explaining.add_argument(
        "code",
        nargs="?",
        metavar="CODE",
        help="the last line of the error names it; the type of a problem report or an SQLSTATE will do",
    )
    watching = commands.add_parser(
        "top",
        help="who holds which connection in a running app, live",
        description=_TOP,
        epilog=_TOP_MORE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    watching.add_argument("url", metavar="URL", help="such as http://localhost:8000/_stanch")
    watching.add_argument(
        "--header", action="append", default=[], metavar="HEADER", help='such as "Authorization: Bearer ..."'
    )
    once = watching.add_mutually_exclusive_group()
    once.add_argument("--once", action="store_true", help="print one snapshot as text and end")
    once.add_argument("--json", action="store_true", help="print one snapshot as JSON and end")
    return parser


def _top(wishes: dict[str, Any]) -> int:
    try:
        from stanch.cli import top  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as missing:
        if missing.name not in {"httpx", "rich"}:
            raise
        print(f"stanch top needs {missing.name}: pip install 'stanch[top]'", file=sys.stderr)
        return 2
    return top.main(top.Wishes(**wishes))


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
