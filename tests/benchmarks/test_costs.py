"""The command that says what each normalizer costs a whole network."""

import csv

import pytest

from benchmarks import costs


@pytest.mark.slow
def test_each_normalizer_has_a_row_beside_batchnorm(tmp_path):
    path = tmp_path / "cost.csv"
    rows = costs.run(["--norms", "bn,bnet", "--repeats", "1", "--save", str(path)])
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert [row["norm"] for row in rows] == ["bn", "bnet"]
    for row in rows:
        assert float(row["step_ratio"]) > 0
        # What is kept is counted: the convolutions' inputs, which every network keeps, are most of it.
        assert 0.9 < float(row["kept_ratio"]) < 1.3
    assert [row["added_to_64"] for row in rows] == ["0", str(64 * 8)]
