"""The ``>>>`` examples in the docstrings are true. Both drivers and SQLModel are installed with the tests."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import stanch

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(stanch.__path__, "stanch.")
    if not module.name.endswith("__main__")
)


def examples_of(module_name: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(importlib.import_module(module_name)) if test.examples]


@pytest.mark.parametrize("module_name", ["stanch", *MODULES])
def test_the_examples_in_the_docstrings_of_a_module_are_true(module_name: str) -> None:
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples_of(module_name):
        runner.run(test, out=told.append)

    assert runner.failures == 0, "".join(told)


def test_there_are_examples_at_all() -> None:
    """A finder that finds nothing would be green for ever."""
    found = {test.name for name in MODULES for test in examples_of(name)}
    assert {"stanch.errors.StanchError", "stanch.database.Database"} <= found
    assert any(name.startswith("stanch.embedded") for name in found)
    assert len(found) >= 20


def test_a_wrong_example_fails() -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    runner.run(wrong, out=lambda _: None)

    assert runner.failures == 1
