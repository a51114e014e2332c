"""Names of device code tell what they are: see "Names in device code" in docs/kernels_equations.md."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "lightning_norm" / "kernels"
REDUCTIONS = {"tl.sum", "tl.max"}
"""Their result may be a scalar, so that nothing is asked of its name."""


def prefix(node):
    """Return the prefix that a name of this expression must have; None where the expression does not tell."""
    if isinstance(node, ast.Name):
        return node.id[:2] if node.id[:2] in {"b_", "o_", "m_"} else None
    if isinstance(node, ast.Subscript | ast.UnaryOp):
        return prefix(node.value if isinstance(node, ast.Subscript) else node.operand)
    if isinstance(node, ast.Compare):
        return "m_" if first({prefix(part) for part in (node.left, *node.comparators)}) else None
    if isinstance(node, ast.BinOp):
        found = {prefix(node.left), prefix(node.right)}
        # How far two offsets are apart is a number.
        if isinstance(node.op, ast.Sub) and found == {"o_"}:
            return None
        return first(found)
    return of_call(node, ast.unparse(node.func)) if isinstance(node, ast.Call) else None


def of_call(node, name):
    if name == "tl.load":
        return "b_" if any(k.arg == "mask" for k in node.keywords) else None
    if name == "tl.zeros":
        return "b_" if ast.unparse(node.args[0]) != "()" else None
    if name in {"tl.arange", "zeros", "tl.program_id"}:
        return {"tl.arange": "o_", "zeros": "b_", "tl.program_id": "i_"}[name]
    if name.endswith(".to"):
        return "b_" if "float" in ast.unparse(node) and prefix(node.func.value) else prefix(node.func.value)
    if name.startswith("tl.") and name not in REDUCTIONS:
        return first({prefix(a) for a in node.args[name == "tl.where" :]})
    return None


def first(found):
    """Return the prefix of what is computed from tiles of these; a program's index in it makes a scalar of no kind."""
    return next((p for p in ("b_", "o_", "m_") if p in found), None)


def wrong_names(source):
    """Yield ``function: name`` for each name of device code without the prefix of what is assigned to it."""
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or "triton.jit" not in map(name_of, function.decorator_list):
            continue
        asked = {}
        for node in ast.walk(function):
            for target, value in assignments(node):
                if isinstance(target, ast.Name) and (p := prefix(value)):
                    asked.setdefault(target.id, set()).add(p)
        for name, prefixes in asked.items():
            # An offset from a pointer makes a pointer.
            if name[:2] not in prefixes | ({"p_"} if "o_" in prefixes else set()):
                yield f"{function.name}: {name}"


def name_of(decorator):
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def assignments(node):
    if isinstance(node, ast.AugAssign):
        yield node.target, ast.BinOp(node.target, node.op, node.value)
    for target in node.targets if isinstance(node, ast.Assign) else ():
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=True)
        else:
            yield target, node.value


@pytest.mark.parametrize("file", sorted(KERNELS.glob("*/*.py")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_name_tells_a_tile_its_offsets_and_its_mask(file):
    assert list(wrong_names(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("c = i * 4 + tl.arange(0, 4)", "o_c = i * 4 + tl.arange(0, 4)"),
        ("keep = o_c < n", "m_c = (o_c < n) & ok"),
        ("v = tl.load(x + o_c, mask=m_c).to(tl.float32)", "b_x, n = tl.load(x + o_c, mask=m_c), tl.load(x)"),
        ("total = tl.zeros((4,), tl.float32)", "b_total, n = tl.zeros((4,), tl.float32), tl.sum(b_x, 0)"),
        ("u = tl.where(m_c, b_x - k, 0.0)[:, None]", "b_u = tl.where(m_c, b_x - k, 0.0)[:, None]"),
        ("total += b_x * w", "b_total += b_x * w"),
        ("out = x + o_c", "p_out = x + o_c"),
        ("n, c = tl.program_id(0).to(tl.int64), 1", "i_n, n = tl.program_id(0), tl.program_id(1) * 4"),
    ],
)
def test_what_is_found(wrong, right):
    kernel = "@triton.jit(do_not_specialize=['n'])\ndef f(x, n):\n    "
    assert len(list(wrong_names(kernel + wrong))) == 1
    assert not list(wrong_names(kernel + right))
