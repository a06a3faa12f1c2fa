"""The command; see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.cases import CASES
from bench.goals import GOALS
from bench.report.page import Suite, publish
from bench.results import Results
from bench.subjects import BASELINE, SUBJECTS

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "bench" / "results" / "latest.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the page; 2 if the results cannot be read."""
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS.json", default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--charts", type=Path, default=ROOT / "docs" / "assets" / "benchmarks")
    asked = parser.parse_args(arguments)
    file: Path = asked.results
    try:
        results = Results.read(file)
    except OSError as error:
        parser.error(f"{file}: {error.strerror}; `make bench` makes results")
    except (ValueError, TypeError, KeyError) as error:
        parser.error(f"{file} is no results file of today: {error}")
    if not results.figures:
        parser.error(f"{file} has no figures")
    subjects = {name: subject.title for name, subject in SUBJECTS.items()}
    publish(results, Suite(CASES, subjects, BASELINE, GOALS), asked.page, asked.charts)
    print(f"{asked.page}, from {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
