"""Users' files type-check strictly: what they get is what it says it is, and what is wrong is found before it runs.

`make check` reads the same files; here each mistake in them must be found as well, by both checkers. Where a checker
is not installed (the tests need less than the checks), its test is left out, and pytest's summary says so.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = Path(__file__).parent / "typing"
ROOT = FILES.parent.parent

pytestmark = pytest.mark.timeout(300)


def needs_checker(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"left out: {name} is not installed (make check installs it)")


def run(*arguments: str, cwd: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, timeout=280, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@needs_checker("mypy")
def test_files_of_users_pass_strict_mypy() -> None:
    """``warn_unused_ignores`` is part of strict: a mistake that is not found fails too."""
    status, told = run("mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), str(FILES), cwd=ROOT)
    assert status == 0, told


@pytest.mark.slow
@needs_checker("pyright")
def test_files_of_users_pass_strict_pyright(tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path / "users", ignore=shutil.ignore_patterns("__pycache__"))
    config = tmp_path / "pyrightconfig.json"  # it takes no absolute paths
    config.write_text(
        json.dumps(
            {
                "include": ["users"],
                "extraPaths": [str(ROOT / "src")],
                "typeCheckingMode": "strict",
                "pythonVersion": "3.11",
                "enableTypeIgnoreComments": False,
                "reportUnnecessaryTypeIgnoreComment": "error",
            }
        )
    )
    status, told = run("pyright", "--outputjson", "--pythonpath", sys.executable, cwd=tmp_path)
    report = json.loads(told)
    found = [
        f"{each['file']}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in report["generalDiagnostics"]
    ]
    assert found == []
    assert status == 0
    assert report["summary"]["filesAnalyzed"] == len([*FILES.glob("*.py")])


def test_there_is_something_to_check() -> None:
    files = sorted(FILES.glob("*.py"))
    assert len(files) >= 3
    assert sum(file.read_text().count("assert_type(") for file in files) >= 30
    assert sum(file.read_text().count("type: ignore[") for file in files) >= 5, "the mistakes"
