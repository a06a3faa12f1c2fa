"""Every error has a page that says what to do, and the command prints it."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import stanch
from stanch import cli
from stanch.cli import explain
from stanch.errors import StanchError

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTIONS = ("## What happened", "## How to see it", "## How to mend it")


def error_classes() -> list[type[StanchError]]:
    """Every public error class in any module that can be imported here."""
    for module in pkgutil.walk_packages(stanch.__path__, "stanch."):
        if not module.name.endswith("__main__") and "pytest_plugin" not in module.name:
            importlib.import_module(module.name)

    def below(kind: type[StanchError]) -> Iterator[type[StanchError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    classes = {kind for kind in below(StanchError) if kind.__module__.startswith("stanch.")}
    return sorted(classes, key=lambda kind: kind.__name__)


def public(classes: list[type[StanchError]]) -> list[type[StanchError]]:
    return [kind for kind in classes if not kind.__name__.startswith("_")]


def test_every_error_has_a_page_and_every_page_an_error() -> None:
    """A class with a code has its page to itself; a class without one shares the page of its base."""
    classes = public(error_classes())
    assert sorted({kind.error_code for kind in classes}) == explain.codes()
    own = [kind.error_code for kind in classes if "error_code" in vars(kind)]
    assert sorted(own) == explain.codes()


@pytest.mark.parametrize("code", explain.codes())
def test_a_page_is_short_and_tells_what_happened_and_how_to_see_and_mend_it(code: str) -> None:
    """The page of a code fits one screen of a terminal."""
    page = explain.page(code)
    lines = page.splitlines()
    assert lines[0].startswith(f"# {code}: ")
    headings = [line for line in lines if line.startswith("## ")]
    assert [heading for heading in headings if heading != "## Why"] == list(SECTIONS)
    assert "\n1. " in page.partition("## How to mend it")[2]
    assert 15 <= len(lines) <= 30
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("code", explain.codes())
def test_explain_prints_the_page_of_a_code(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """To stdout, whole."""
    assert cli.main(["explain", code]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (explain.page(code), "")


def test_explain_without_a_code_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    """One line each: the code, then what it means."""
    assert cli.main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == explain.codes()
    assert all(line.endswith(explain.title(line.split()[0])) for line in lines)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("pool-exausted", "pool-exhausted"),
        ("PoolExhausted", "pool-exhausted"),
        ("commit_unknown", "commit-unknown"),
    ],
)
def test_explain_suggests_what_a_mistyped_code_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, with an exit status that scripts can see."""
    assert cli.main(["explain", typed]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"did you mean {meant}" in printed.err


def test_explain_of_something_else_says_where_the_codes_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing near: no guess."""
    assert cli.main(["explain", "weather"]) == 2
    assert "stanch explain lists all codes" in capsys.readouterr().err


def test_the_last_line_of_an_error_can_be_pasted_into_a_shell() -> None:
    """What the error text promises, a fresh interpreter keeps."""
    command, verb, code = str(StanchError("x")).splitlines()[-1].split()
    assert command == "stanch"
    done = subprocess.run(
        [sys.executable, "-m", "stanch.cli", verb, code],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, explain.page(code), "")
