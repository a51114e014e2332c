"""The scripts that count the source and the lines of a forward."""

import pytest

from benchmarks import house, walk

SOURCE = '''"""One line."""

# a comment
LIMIT = 1  # beside code, so it does not count
"""Under an attribute."""


class A:
    """Two

    lines."""

    def f(self, a: int, *rest, b=2) -> int:
        """Doc."""
        if a:
            raise ValueError(f"a is {a}. Choose another.")
        raise TypeError("no")


@property
def g(x: int) -> int:
    # another comment
    return x
'''


def test_counts(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(SOURCE)
    counts = house.count([file])
    assert counts.files == [23]
    assert counts.docstrings == 1 + 1 + 3 + 1
    assert counts.comments == 2
    assert sorted(length for length, _ in counts.functions) == [3, 4]  # without the docstring, and the decorator
    assert max(counts.arguments)[0] == 4
    assert sorted(counts.annotated) == [False, False, True, True]
    assert counts.row("a").split("|")[-2].strip() == "50 / 50"


def test_the_package_is_printed_by_folder(capsys):
    house.main(["--functions", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| lightning_norm | ")
    assert {"| ops/", "| layers/", "| cli/"} <= {line.split(" |")[0].removesuffix(" *") for line in lines[3:]}


@pytest.mark.parametrize("norm", ["sn", "bn"])
def test_a_walk_names_the_normalizer_and_the_engine(norm, capsys):
    walk.main(["--norm", norm, "--backend", "eager"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[5:]]
    files = {row[0]: [int(n) for n in row[1:]] for row in rows}
    assert "ops/normalize.py" in files
    assert any(name.startswith("normalizers/") for name in files)
    assert not any(name.startswith("kernels/") for name in files)
    total = files.pop(f"{len(files) - 1} files")
    assert total == [sum(column) for column in zip(*files.values(), strict=True)]
    assert all(0 < run <= whole and 0 < way <= whole for run, way, whole in files.values())
