"""Docstrings for the site: what is written for Sphinx's readers becomes Markdown, for mkdocstrings.

Formulas become ``$...$``, references to public names become links, doctests become code. mkdocs.yml names this file
among the extensions of griffe, which reads the package without importing it.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

import lightning_norm

PUBLIC = vars(lightning_norm)["__all__"]  # the stub that type checkers read has no such name
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([^`]+)`")
DIRECTIVE = re.compile(r"^([ \t]*)\.\. (math|code-block)::[ \t]*([^\n]*)\n((?:\n|\1[ \t]+[^\n]*(?:\n|$))*)", re.M)
DOCTEST = re.compile(r"^([ \t]*)>>> .*(?:\n(?!\s*$).*)*", re.M)
CODE = re.compile(r"(```.*?```|``.*?``|`[^`\n]*`|\$\$.*?\$\$|\$[^$]*\$)", re.S)


def markdown(text: str) -> str:
    r"""Return a docstring in Markdown.

    >>> print(markdown("Return :math:`\\mu`, see :func:`lightning_norm.swap` and :func:`_hidden`; x is (N, *)."))
    Return $\mu$, see [`swap`][lightning_norm.swap] and `_hidden`; x is (N, \*).
    """
    text = DIRECTIVE.sub(_block, text)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = ROLE.sub(_link, text)
    text = DOCTEST.sub(_doctest, text)
    parts = CODE.split(text)
    return "".join(part if i % 2 else re.sub(r"(?<=[(, ])\*(?=[),])", r"\*", part) for i, part in enumerate(parts))


class DocstringsInMarkdown(griffe.Extension):
    """Rewrite each docstring, and each annotation with a range, as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Show ``Annotated[float, Scheduled(0, 1)]`` as float: the range is in the text."""
        for parameter in func.parameters:
            hint = parameter.annotation
            if isinstance(hint, griffe.ExprSubscript) and hint.canonical_name == "Annotated":
                parameter.annotation = next(iter(hint.slice))


def _block(match: re.Match[str]) -> str:
    indent, kind, argument, body = match.groups()
    body = textwrap.dedent(body).strip("\n")
    lines = ["$$", *filter(None, (argument, body)), "$$"] if kind == "math" else [f"```{argument}", body, "```"]
    return textwrap.indent("\n".join(["", *lines, "", ""]), indent, lambda line: line.strip() != "")


def _link(match: re.Match[str]) -> str:
    name = match[2].removesuffix("()")
    owner, _, last = name.rpartition(".")
    if owner in ("", "lightning_norm") and last in PUBLIC:
        return f"[`{last}`][lightning_norm.{last}]"
    return f"`{last if match[1] else name}`"


def _doctest(match: re.Match[str]) -> str:
    indent = match[1]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"
