"""Every error has a page that says what to do, and the command prints it."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import stanch
from stanch import cli, problems
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


PROBLEMS_ALONE = {"conflict", "invalid", "contention", "timeout", "read-only"}
"""Replies to what the server refused: no error of stanch's own stands behind them."""


def test_every_error_has_a_page_and_every_page_an_error_or_a_reply() -> None:
    """A class with a code has its page to itself; a class without one shares the page of its base."""
    pages = sorted(set(explain.codes()) - PROBLEMS_ALONE)
    classes = public(error_classes())
    assert sorted({kind.error_code for kind in classes}) == pages
    own = [kind.error_code for kind in classes if "error_code" in vars(kind)]
    assert sorted(own) == pages
    assert set(explain.codes()) > PROBLEMS_ALONE


@pytest.mark.parametrize(
    "problem",
    [*problems._PROBLEMS.values(), *problems._OWN.values()],  # pyright: ignore[reportPrivateUsage]
    ids=lambda problem: problem.slug,
)
def test_every_problem_report_can_be_explained_by_its_type(
    problem: problems.Problem, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever sees only the reply is not left alone: the whole type, or its last word."""
    printed: list[str] = []
    for word in (problem.body["type"], problem.slug):
        assert cli.main(["explain", word]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("23505", "conflict"),
        ("22001", "invalid"),
        ("40001", "contention"),
        ("40p01", "contention"),
        ("57014", "timeout"),
        ("53300", "unavailable"),
        ("08006", "unavailable"),
        ("25006", "read-only"),
        ("25P02", "transaction-aborted"),
    ],
)
def test_an_sqlstate_leads_to_the_page_of_what_it_means(
    state: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", state]) == 0
    assert capsys.readouterr().out == explain.page(code)


def test_every_sqlstate_of_a_page_leads_to_that_page() -> None:
    """What the page of a reply names is what the reply is made for."""
    for code in PROBLEMS_ALONE:
        states = re.findall(r"\b[0-9][0-9A-Z]{4}\b", explain.page(code))
        assert states
        assert {explain.meant_by(state) for state in states} == {code}


def test_an_sqlstate_that_stanch_does_not_act_on_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "42P01"]) == 2
    assert "no error has the code '42P01'" in capsys.readouterr().err


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


@pytest.mark.slow
def test_the_wheel_carries_the_pages_and_its_command_prints_them(tmp_path: Path) -> None:
    """Built from this tree, unpacked elsewhere, and asked in a process that cannot see the tree."""
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    script = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import stanch
assert stanch.__file__.startswith(sys.path[0]), stanch.__file__
from stanch.cli import explain, main
for code in explain.codes():
    assert main(["explain", code]) == 0
"""
    asked = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "installed")],
        cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == "".join(explain.page(code) for code in explain.codes())
