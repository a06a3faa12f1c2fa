"""The hook of the documentation build: puts the pages of ``stanch explain`` under errors/, and orders all.

The pages live in the package, where the command finds them; a copy under docs/ would rot.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from mkdocs.structure.files import File

from stanch.cli import explain

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

SECTIONS: Final = ("", "tutorial", "how-to", "reference", "explanation", "errors")
"""In the order in which a newcomer meets them; a folder nobody has thought of yet comes last."""


def on_files(files: Files, /, *, config: MkDocsConfig) -> Files:
    """Add the error pages and their index, then derive the table of contents from the folders."""
    for code in explain.codes():
        files.append(File.generated(config, f"errors/{code}.md", content=explain.page(code)))
    files.append(File.generated(config, "errors/index.md", content=_index()))
    config.nav = _contents([file.src_uri for file in files.documentation_pages()])
    return files


def _index() -> str:
    lines = [f"- [`{code}`]({code}.md): {explain.title(code)}" for code in explain.codes()]
    introduction = (
        "# Errors\n\nEvery error ends in a line such as `stanch explain pool-exhausted`. The command prints"
        " the page of that code; these are the same pages. The `type` of a problem report and an SQLSTATE"
        " lead there too: `stanch explain busy`, `stanch explain 40001`.\n\n"
    )
    return introduction + "\n".join(lines) + "\n"


def _contents(pages: list[str]) -> list[str | dict[str, list[str]]]:
    contents: list[str | dict[str, list[str]]] = []
    for section, members in groupby(sorted(pages, key=_rank), key=_section):
        if section:
            contents.append({section.capitalize(): list(members)})
        else:
            contents.extend(members)
    return contents


def _section(page: str) -> str:
    folder, *rest = PurePosixPath(page).parts
    return folder if rest else ""


def _rank(page: str) -> tuple[int, str, bool, str]:
    section = _section(page)
    place = SECTIONS.index(section) if section in SECTIONS else len(SECTIONS)
    return (place, section, PurePosixPath(page).name != "index.md", page)
