"""What a test needs and a machine may lack: nothing skips silently.

``@needs("pgbouncer")`` (or the bare mark ``@pytest.mark.pgbouncer``) leaves a test out where the program is
missing, and the end of the run lists it by name. ``STANCH_REQUIRE=all``, or names with commas between them,
turns missing into a failure at collection.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field

import pytest

from stanch.embedded.binaries import installed

PROGRAMS = {
    "chromium": "apt install chromium",
    "pgbouncer": "apt install pgbouncer",
    "valgrind": "apt install valgrind",
    "postgresql": "apt install postgresql",
    "root": "run as root",
}
"""What can be asked for, and how one gets it. *postgresql* is an installed server, beside the wheel's."""

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])


def needs(program: str) -> pytest.MarkDecorator:
    """A mark for a test, a class or (as ``pytestmark``) a module that needs *program*."""
    if program not in PROGRAMS:
        raise ValueError(f"{program!r} is not in tests.support.optional.PROGRAMS")
    return pytest.mark.needs(program)


def find(program: str) -> str | None:
    """Where *program* is installed; system folders that an ordinary user's PATH lacks are searched too."""
    match program:
        case "root":
            return "/" if os.geteuid() == 0 else None
        case "postgresql":
            return next((str(folder) for folder in installed() if (folder / "initdb").exists()), None)
        case _:
            return shutil.which(program, path=SEARCH_PATH)


def path_of(program: str) -> str:
    """As :func:`find`, for code that runs only where it is installed."""
    found = find(program)
    if found is None:
        raise LookupError(f"{program} is not installed: {PROGRAMS.get(program, '')}")
    return found


@dataclass
class LeftOut:
    """The tests of this run that were left out, by the program they lack."""

    by_program: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "needs(program): left out, and listed, where program is missing")

    @pytest.hookimpl(trylast=True)  # only what -k and -m have left
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept: list[pytest.Item] = []
        left: list[pytest.Item] = []
        for item in items:
            missing = [program for program in sorted(_needed(item)) if find(program) is None]
            for program in missing:
                self.by_program.setdefault(program, []).append(item.nodeid)
            (left if missing else kept).append(item)
        if refused := sorted(_required() & self.by_program.keys()):
            hints = ", ".join(f"{program} ({PROGRAMS[program]})" for program in refused)
            raise pytest.UsageError(f"STANCH_REQUIRE: missing: {hints}")
        if left:
            items[:] = kept
            config.hook.pytest_deselected(items=left)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for program, tests in sorted(self.by_program.items()):
            why = f"{program} is not installed" if program != "root" else "they need root"
            terminalreporter.write_line(
                f"left out: {len(tests)} tests, because {why}: {', '.join(sorted(tests))}", yellow=True
            )

    # pytest-xdist: the workers collect, the controller reports

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["left_out"] = self.by_program

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        self.by_program |= getattr(node, "workeroutput", {}).get("left_out", {})


def _needed(item: pytest.Item) -> set[str]:
    named = {str(program) for mark in item.iter_markers("needs") for program in mark.args}
    if unknown := named - PROGRAMS.keys():
        raise pytest.UsageError(
            f"{item.nodeid} needs {sorted(unknown)}, which tests.support.optional does not know"
        )
    return named | {program for program in PROGRAMS if item.get_closest_marker(program) is not None}


def _required() -> set[str]:
    asked = {name.strip() for name in os.environ.get("STANCH_REQUIRE", "").split(",")} - {""}
    return set(PROGRAMS) if "all" in asked else asked
