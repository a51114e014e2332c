"""The words of messages."""

import ast
import re
from pathlib import Path

import lightning_norm

PACKAGE = Path(lightning_norm.__file__).parent
NEVER_ONE = {
    "{len(layer.added)} tensors",
    "{len(swaps)} NormSwaps",
    "{len(places[m])} places",
    "{len(workers)} processes",
    "{len(shape)} dimensions",
}
"""What is said only where there are several."""


def counts_of(tree):
    """Yield '{expression} noun' for each number in an f-string that stands before a plural."""
    for node in ast.walk(tree):
        for value, text in zip(node.values, node.values[1:], strict=False) if isinstance(node, ast.JoinedStr) else ():
            if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                noun = re.match(r" (?:[\w.'-]+ ){0,2}?(\w{3,}[^\Wsiu]s)\b", text.value)
                counted = ast.unparse(value.value)
                if counted.startswith("len(") and noun:
                    yield f"{{{counted}}} {noun[1]}"


def test_a_count_has_its_plural_from_counted():
    found = {c for file in PACKAGE.rglob("*.py") for c in counts_of(ast.parse(file.read_text(encoding="utf-8")))}
    assert found <= NEVER_ONE, found - NEVER_ONE
    assert list(counts_of(ast.parse("f'{len(x)} other layers'"))) == ["{len(x)} layers"]
