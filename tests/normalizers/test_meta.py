"""Each normalizer of the package has its paper test."""

from pathlib import Path

import pytest

from lightning_norm import normalizers

HERE = Path(__file__).parent


@pytest.mark.parametrize("key", normalizers())
def test_paper_test_exists(key):
    cls = normalizers()[key]
    package, _, module = cls.__module__.rpartition(".")
    if package != "lightning_norm.normalizers":
        pytest.skip(f"{cls} is not of this package")
    file = HERE / f"test_{module}.py"
    assert file.is_file(), f"write {file.name}: the equation of {cls.paper} on the whole tensor"
    text = file.read_text()
    assert cls.__name__ in text
    assert "lightning_norm.ops" not in text, "the reference must not use the engine"
