"""Hooks of the site's build: pages that lie above docs/, and long names in tables that may break."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
CELL = re.compile(r"<td\b.*?</td>", re.S)
CODE = re.compile(r"(<code>)(.*?)(</code>)", re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; their links into docs/ lose that folder."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let code in the cells of a table break behind dots, underscores and brackets, so that no column starves."""
    return CELL.sub(lambda cell: CODE.sub(breakable, cell[0]), html)


def breakable(code: re.Match[str]) -> str:
    """Return code with places for a break."""
    return code[1] + re.sub(r"(?<=\w)([._(=])(?=\w)|(?<=\w)(?=[A-Z][a-z])", r"\1<wbr>", code[2]) + code[3]
